"""Sizes from which planning, timing and checking go another way, in elementary actions (F, I, W), what such an action
takes of the planner's time, and the moment that never comes: each once for all."""

from mipipe.graphs.units import MOST

NEVER_NS = MOST
"""Moment, makespan or period of what there is none of: later than any."""

BOUNDED_S, CHECKED_S, JUDGED_S = 2.5e-5, 1.2e-5, 8e-6
"""Seconds per action, about: of a placement's job-shop bound; of checking, explaining and drawing a plan in the end, by
arrays; of judging a schedule."""

COMPILED = 4_000
"""From here loops over actions are compiled: a first plan of a small problem should not wait for a compiler."""

MANY = 5_000
"""Up to here orders may be Python lists, and work in proportion to the actions may be repeated: published schedules are
looked at, several waits are tried for one pattern, and the period of a plan is found beside its makespan."""

MOST_COUNT = 2**16
"""Microbatches of a step, experts of a layer, layers of a trace: more is a slip of the pen, or damage."""

VERY_MANY = 20_000
"""Up to here everything may be looked at, at 20 to 100 microseconds an action: all shapes enter, each placement has its
job-shop bound, plans are checked and timed action by action; beyond, few shapes enter, and arrays do the rest."""
