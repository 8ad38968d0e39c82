"""The persistent learner: loop, optimiser, schedule."""
