"""Weights on disk and in a worker: read, cut to the pieces that a rank holds, written."""
