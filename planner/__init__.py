"""From a problem to a plan with a bound: placement, routes and the order of every action on every rank."""

from mipipe.graphs.lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
