"""Models, merge recipes and clusters as data: the operator graph, what its operators cost, the devices it runs on."""

from mipipe.graphs.lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
