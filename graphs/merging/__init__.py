"""Merge recipes, checked against the headers of their checkpoints and resolved into units of work. No torch."""
