"""Fit a latency model to operator profiles."""
