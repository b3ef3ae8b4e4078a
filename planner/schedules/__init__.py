"""The published schedules. To add one: a function in a file here, and a line in `BASELINES`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mipipe.graphs.errors import InputError
from mipipe.planner.schedules import closed_forms
from mipipe.planner.schedules.baseline import Baseline, OrderAccounting
from mipipe.planner.schedules.chimera import chimera
from mipipe.planner.schedules.cut import CutRule, merge_streams
from mipipe.planner.schedules.dualpipe import dualpipe, dualpipe_v
from mipipe.planner.schedules.one_f_one_b import gpipe, interleaved, one_f_one_b
from mipipe.planner.schedules.pattern import EvenTimes, StagePattern
from mipipe.planner.schedules.v_shape import v_half, v_min, zb_v
from mipipe.planner.schedules.zero_bubble import zb1p, zb_h1, zb_h2

__all__ = [
    "BASELINES",
    "INTERLEAVED",
    "Baseline",
    "CutRule",
    "EvenTimes",
    "OrderAccounting",
    "StagePattern",
    "baseline_named",
    "folded_name",
    "merge_streams",
    "with_chunks",
]

_BOTH: tuple[OrderAccounting, ...] = ("indivisible", "split")
_SPLIT: tuple[OrderAccounting, ...] = ("split",)

INTERLEAVED = "Interleaved 1F1B"

BASELINES: tuple[Baseline, ...] = (
    Baseline("GPipe", gpipe, _BOTH, closed_forms.one_f_one_b, "Huang et al., 2019"),
    Baseline("1F1B", one_f_one_b, _BOTH, closed_forms.one_f_one_b, "Narayanan et al., 2021"),
    Baseline(INTERLEAVED, interleaved, _BOTH, closed_forms.interleaved, "Narayanan et al., 2021"),
    Baseline("ZB-H1", zb_h1, _SPLIT, closed_forms.zb1p, "Qi et al., 2023"),
    Baseline("ZB-H2", zb_h2, _SPLIT, closed_forms.zb_h2, "Qi et al., 2023"),
    Baseline("ZB1P", zb1p, _SPLIT, None, "Qi et al., 2023; interleaved, two stages per rank"),
    Baseline("ZB-V", zb_v, _SPLIT, None, "Qi et al., 2023 and 2024"),
    Baseline("V-Half", v_half, _SPLIT, None, "Qi et al., 2024"),
    Baseline("V-Min", v_min, _SPLIT, None, "Qi et al., 2024"),
    Baseline("DualPipe", dualpipe, _BOTH, closed_forms.dualpipe, "DeepSeek-AI, 2024"),
    Baseline("DualPipeV", dualpipe_v, _BOTH, closed_forms.dualpipe_v, "DeepSeek-AI, 2025"),
    Baseline("Chimera", chimera, _BOTH, closed_forms.chimera, "Li and Hoefler, 2021"),
)


def with_chunks(chunks: int) -> tuple[Baseline, ...]:
    """`BASELINES` with ``chunks`` stages per rank in interleaved 1F1B."""
    return tuple(replace(baseline, make=partial(interleaved, chunks=chunks),
                         closed_form=partial(closed_forms.interleaved, chunks=chunks))
                 if baseline.name == INTERLEAVED else baseline for baseline in BASELINES)


def baseline_named(name: str) -> Baseline:
    """The published schedule of a name, whatever its case and hyphens (``zb-h1``, ``interleaved``).

    Raises:
        InputError: there is none.
    """
    known = {folded_name(baseline.name): baseline for baseline in BASELINES}
    known["interleaved"] = known[folded_name("Interleaved 1F1B")]
    if folded_name(name) not in known:
        raise InputError(f"schedule {name!r}: unknown; expected one of"
                         f" {', '.join(baseline.name for baseline in BASELINES)}")
    return known[folded_name(name)]


def folded_name(name: str) -> str:
    """A name without case, hyphens and spaces."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
