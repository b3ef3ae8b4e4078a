"""Plans executed under torchrun, and merges."""

from mipipe.graphs.lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
