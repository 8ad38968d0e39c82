"""What learners read: features, alignments, chunks and minibatches (the Python face of csrc)."""
