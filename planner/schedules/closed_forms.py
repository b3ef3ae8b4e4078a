"""The bubbles their papers state: equal stages, no transfers, no gradient reduction. B = I + W throughout.

All take an even stage's F, I, W and overlapped F&B, P ranks and M microbatches, and give the idle time of a device, or
None where the statement does not apply. The zero-bubble papers let the optimizer's step of a rank follow its own last
action; a makespan counts until the last rank's, so a simulated bubble can be larger than theirs (ZB-H2, ZB-V).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

ClosedForm = Callable[[Fraction, Fraction, Fraction, Fraction, int, int], Fraction | None]


def one_f_one_b(f: Fraction, i: Fraction, w: Fraction, fb: Fraction, ranks: int, microbatches: int) -> Fraction | None:
    """(P - 1)(F + B): 1F1B and GPipe (Narayanan et al., 2021)."""
    return (ranks - 1) * (f + i + w)


def interleaved(f: Fraction, i: Fraction, w: Fraction, fb: Fraction, ranks: int, microbatches: int,
                chunks: int = 2) -> Fraction | None:
    """(P - 1)(F + B) / chunks: that many stages per rank, whole rounds of microbatches (Narayanan et al., 2021)."""
    return None if microbatches % ranks else Fraction(ranks - 1, chunks) * (f + i + w)


def zb1p(f: Fraction, i: Fraction, w: Fraction, fb: Fraction, ranks: int, microbatches: int) -> Fraction | None:
    """(P - 1)(F + B - 2W) while W <= F: ZB-H1, and ZB1P with one stage per rank (Qi et al., 2023)."""
    return (ranks - 1) * (f + i - w) if w <= f else None


def zb_h2(f: Fraction, i: Fraction, w: Fraction, fb: Fraction, ranks: int, microbatches: int) -> Fraction | None:
    """(P - 1)(F + B - 3W) where that is not below 0 (Qi et al., 2023), between a rank's own first and last action."""
    bubble = (ranks - 1) * (f + i - 2 * w)
    return bubble if bubble >= 0 else None


def dualpipe(f: Fraction, i: Fraction, w: Fraction, fb: Fraction, ranks: int, microbatches: int) -> Fraction | None:
    """(P / 2 - 1)(F&B + B - 3W) (DeepSeek-V3 technical report, table 2)."""
    return Fraction(ranks - 2, 2) * (fb + i - 2 * w) if ranks % 2 == 0 and microbatches >= 2 * ranks else None


def dualpipe_v(f: Fraction, i: Fraction, w: Fraction, fb: Fraction, ranks: int, microbatches: int) -> Fraction | None:
    """(P - 1)(F&B + B - 3W) / 2: DualPipe's form with 2P stages of half the size on P ranks (its release's table)."""
    return Fraction(ranks - 1, 2) * (fb + i - 2 * w) if microbatches >= 2 * ranks else None


def chimera(f: Fraction, i: Fraction, w: Fraction, fb: Fraction, ranks: int, microbatches: int) -> Fraction | None:
    """(P - 2) B: one unit of P microbatches, and B = 2F as the paper counts (Li and Hoefler, 2021, table 2)."""
    return (ranks - 2) * (i + w) if microbatches == ranks and ranks % 2 == 0 and i + w == 2 * f else None
