"""What a recipe calls: Kaldi's training programs by their names, and the link that puts them into a recipe."""
