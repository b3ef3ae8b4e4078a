"""What estimates of modes know of a trace whatever the team, and the degrees inside a team."""

from __future__ import annotations

from dataclasses import dataclass

from mipipe.graphs.costs.forward_lives import Life, forward_lives
from mipipe.graphs.costs.fusion import Kernel, LiveTensor, kept, kernels, made_in_backward, origins
from mipipe.graphs.costs.products import ATTENTION, banks_of, products_of
from mipipe.graphs.operator_graph import Phase, SegmentTrace


@dataclass(frozen=True, slots=True)
class TeamSplit:
    """Degrees inside a team: ``tensor`` members share products and heads, ``context`` the sequence, ``expert`` the
    banks. ``sequence``: activations between blocks are divided over the tensor members too. ``batch`` members have
    their samples each, and parameters whole."""

    tensor: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False
    batch: int = 1

    @property
    def mode(self) -> str:
        return "batch" if self.batch > 1 else "sequence" if self.sequence else "tensor"

    @property
    def samples_and_positions(self) -> int:
        """Into how many parts the rows of every activation are divided, whatever shares products."""
        return self.context * self.batch


def heads_of(trace: SegmentTrace) -> tuple[int, int] | None:
    """Query heads and key heads of a segment's attention; None where it has none."""
    found = next((item for item in trace.phase_operators(Phase.F) if item.kind.startswith(ATTENTION)), None)
    if found is None:
        return None
    specs = {item.name: item.outputs[0] for item in trace.operators} | trace.specs
    query, key = (specs[name].shape for name in found.inputs[:2])
    return query[1], key[1]


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What estimates need to know of a trace, whatever the team: its ``products`` with a parameter, or to the gradient
    of one, with that parameter, the ``banks`` of experts among these, its kernels where they are fused (else none),
    what fused kernels keep, ``late`` of it from I on, what F has in memory (``lives``), and the names among it, and of
    inputs, that stay for the backward (``stays``)."""

    products: dict[str, str]
    banks: frozenset[str]
    kernels: tuple[Kernel, ...]
    kept: tuple[LiveTensor, ...]
    late: frozenset[str]
    lives: tuple[Life, ...]
    stays: frozenset[str]


def trace_facts(trace: SegmentTrace, *, fused: bool = True, attention_again: bool = False,
                cut: bool | None = None) -> TraceFacts:
    """The facts of one trace, as for `estimated_profile`."""
    again = (f"{ATTENTION}.",) if attention_again else ()
    cut = fused if cut is None else cut
    chosen, origin = tuple(kept(trace, again)) if cut else (), origins(trace)
    stays = [item.name for item in chosen] if cut else [item.alias or item.name for item in trace.saved]
    products = products_of(trace)
    return TraceFacts(products, banks_of(trace, products), tuple(kernels(trace)) if fused else (), chosen,
                      made_in_backward(trace), forward_lives(trace, fused),
                      frozenset(origin.get(name, name) for name in stays))
