"""The problem that `mipipe compare` is asked about: equal stages, on one stream or two, or a file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from mipipe.cli.requests.files import open_any
from mipipe.graphs.errors import InputError
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem

PHASES = {"attention": ("F", "I", "W"), "dispatch": ("F", "I"), "experts": ("F", "I", "W"), "combine": ("F", "I")}
"""The operators of a stage on two streams, and the phases whose durations are given."""

UNUSED = {"f": 1.0, "i": 1.0, "w": 1.0, "first": 0.0, "last": 0.0}
"""Options that stages on two streams do not have, with their defaults."""


def abstract_problem(path: Path | None, chain: dict[str, Any]) -> PlanningProblem:
    """The problem of the options (by name; None: not given), or of a file.

    Raises:
        InputError: an option is missing, contradicts another or is not what it should be; the file is none of ours.
    """
    if path is not None:
        if chain["ranks"] is not None or chain["microbatches"] is not None:
            raise InputError(f"compare: --problem {path} fixes ranks and microbatches; leave out --ranks and"
                             " --microbatches")
        found = open_any(path, PlanningProblem, Plan)
        return found.problem if isinstance(found, Plan) else found
    for name in ("ranks", "microbatches"):
        if chain[name] is None:
            raise InputError(f"compare: --{name} is missing; give --ranks and --microbatches, or --problem FILE")
    given = {name: value for name, value in chain.items() if value is not None and name not in PHASES}
    if all(chain[name] is None for name in PHASES):
        return uniform_problem(**given)
    missing = [name for name in PHASES if chain[name] is None]
    if missing:
        raise InputError(f"compare: --{missing[0]} is missing; two streams need {', '.join('--' + n for n in PHASES)}")
    for name, default in UNUSED.items():
        if given.pop(name, default) != default:
            raise InputError(f"compare: --{name} does not apply to stages on two streams; their durations are given by"
                             f" {', '.join('--' + n for n in PHASES)}")
    operators = {name: _durations(name, chain[name]) for name in PHASES}
    return two_stream_problem(**{"fb": None, **given, **operators})


def _durations(name: str, text: str) -> tuple[Fraction, ...]:
    """The numbers of ``--name A,B,...``, one for each phase."""
    phases = PHASES[name]
    try:
        found = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        found = ()
    if len(found) != len(phases):
        raise InputError(f"--{name} {text}: expected {len(phases)} numbers, {','.join(phases)}, such as"
                         f" {','.join(['10', '13', '7'][:len(phases)])}")
    return found
