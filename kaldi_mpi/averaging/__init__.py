"""Strategies: how the models of several learners become one."""
