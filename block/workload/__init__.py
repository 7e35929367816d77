"""Requests: when they arrive and how long they are, from traces, sketches and prompts."""
