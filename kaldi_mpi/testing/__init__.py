"""What strategies are checked with: float64 references, replays of journals, simulated and threaded worlds."""
