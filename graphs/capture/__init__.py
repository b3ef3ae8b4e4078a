"""A PyTorch model becomes an operator graph: exported, cut into segments, annotated."""
