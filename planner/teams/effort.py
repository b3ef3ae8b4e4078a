"""What each step of a search over degrees looks at, and until when: from thousands of combinations to one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SearchEffort:
    """``until_*`` and ``packing`` are shares of the time limit, ``*_s`` seconds, the others numbers of what is looked
    at at most."""

    priced: int = 8_000
    """Combinations that are priced however long it takes, before anything is solved."""
    until_priced: float = 0.3
    """Further combinations are priced."""
    until_tried: float = 0.45
    """Combinations are solved quickly, by their bounds."""
    packing: float = 0.1
    """The bound where every layer is on one rank."""
    polished: int = 3
    """Combinations that are solved finely, with every number of chunks."""
    until_polished: float = 0.55
    """They are."""
    paired: int = 2
    """Meshes that are tried for their overlapped pairs alone."""
    listed: int = 200
    """Combinations of the least bounds among which those are chosen whose orders are made by lists."""
    rules: int = 100
    """List rules tried for one of them before its quotas are tuned."""
    tuned_s: float = 0.5
    """In which these are tuned."""
    until_listed: float = 0.8
    """Orders are."""
    published: int = 3
    """Pipelines on which published schedules are tried."""
    ordered: int = 4
    """Meshes whose order is searched: that of the best pipeline, then those that overlapped pairs may make the best."""
    until_ordered: float = 0.9
    """It is."""
    told: int = 3
    """Other degrees that are told."""
    least_s: float = 0.5
    """The least time limit of a search on one number of devices, where degrees of what is left are looked for."""


EFFORT = SearchEffort()
"""That of every search."""
