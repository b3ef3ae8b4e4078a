"""Merging checkpoints: methods as pure tensor functions, and the worker that streams tensors through them."""

from mipipe.graphs.lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
