"""Experiments: the configuration, one run, a capacity search, a sweep, a campaign."""
