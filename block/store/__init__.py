"""What a run leaves: tables, a summary, where it came from, and its mirror in Weights & Biases."""
