"""Merging checkpoints: methods as pure tensor functions, and the worker that streams tensors through them."""
