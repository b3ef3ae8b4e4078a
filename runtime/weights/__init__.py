"""Weights and checkpoints on disk: read, written, resumed."""
