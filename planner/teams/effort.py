"""What each step of a search over degrees looks at, and until when: from thousands of combinations to one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SearchEffort:
    """``until_*`` are shares of the time limit, ``*_s`` seconds, ``*_bubble`` a share of a microbatch's time, the
    others numbers of what is looked at at most."""

    priced: int = 8_000
    """Combinations up to which all are priced, however long it takes, before anything is solved."""
    until_priced: float = 0.15
    """Where there are more, the most promising are priced before anything is solved."""
    until_first_tried: float = 0.28
    """Where there are more, those are solved quickly, by their bounds."""
    until_more_priced: float = 0.36
    """Those that may be faster than the best of these are priced."""
    until_tried: float = 0.45
    """Combinations are solved quickly, by their bounds."""
    paired: int = 2
    """Meshes that are tried for their overlapped pairs alone by the order level."""
    mixed_s: float = 0.5
    """In which the stages of a published schedule, of which some layers run again, are found."""
    near: float = 1.02
    """By how much longer than the best a guess or a MIP says that a step is where it may still be the best when
    simulated, or searched."""
    until_dualpipev: float = 0.54
    """DualPipeV is tried for its overlapped pairs, on the meshes and microbatches where these may gain most."""
    polished: int = 3
    """Combinations that are solved finely, with every number of chunks."""
    until_polished: float = 0.57
    """They are."""
    until_most_priced: float = 0.7
    """What may be faster than the best of them is priced, the least floors first."""
    until_paired: float = 0.75
    """DualPipeV is tried on what that found."""
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
    until_ordered: float = 0.87
    """It is."""
    until_bounded: float = 0.92
    """Those that may be faster than the best of all are priced, for the bound."""
    until_packed: float = 0.97
    """The bound where every layer is on one rank is worked on."""
    told: int = 3
    """Other degrees that are told."""
    least_s: float = 0.5
    """The least time limit of a search on one number of devices, where degrees of what is left are looked for."""


EFFORT = SearchEffort()
"""That of every search."""
