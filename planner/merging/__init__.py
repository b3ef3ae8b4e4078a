"""Merge plans: which rank merges which tensors, what it costs, and the program that does it."""
