"""How learners talk: communicators, launch, and a fake world for tests."""
