"""The instances of a model on some GPUs: what they are, and how they start, stop and exchange requests."""
