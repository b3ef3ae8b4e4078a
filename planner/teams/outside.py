"""Where a prediction is far from what its efficiencies were held against, or from how `mipipe train` runs, in one line
for each reason."""

from __future__ import annotations

from mipipe.graphs.efficiency import Evidence
from mipipe.graphs.units import format_bytes
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pricing import Pricer

FAR = 4
"""A size beyond the validated ones by more than this factor is far."""


def outside(pricer: Pricer, degrees: Degrees) -> list[str]:
    """What of a model, its precision, its devices and their number lies far outside the runs behind the efficiencies;
    nothing where layers were measured."""
    machine = pricer.machine
    known = machine.kind.achieved.evidence
    if pricer.measured is not None:
        return []
    if known is None:
        return [f"no published run of {machine.kind.name} was predicted with these efficiencies; they are"
                f" {machine.kind.achieved.origin}"]
    return [*_sizes(pricer, degrees, known), *_kinds(pricer, known)]


def otherwise(pricer: Pricer, degrees: Degrees) -> list[str]:
    """What is priced as engines made for it do it, and run otherwise here."""
    if not pricer.model.sends(degrees) or len(pricer.machine.fabric.counts(degrees.expert, 1)) < 2:
        return []
    rows = max(pricer.fanout(member) for member in range(len(pricer.model.index.traces)))
    if rows == 1:
        return []
    return [f"a token crosses once to a host that has several of its {rows:g} experts, as DeepEP sends it; `mipipe"
            " train` sends a row for each of them"]


def undivided(pricer: Pricer, degrees: Degrees) -> list[str]:
    """What devices that hold the same do not divide though ``zero`` says so, where it is more than a hundredth."""
    found = []
    second = "second" if pricer.model.sends(degrees) else "first"
    for experts, what, dim, alike in ((False, "dense parameters", "first", degrees.alike),
                                      (True, "experts", second, degrees.alike_experts)):
        held, whole = pricer.left_whole(degrees, experts)
        if degrees.zero and whole and whole * 100 >= held:
            found.append(f"{format_bytes(whole)} of {format_bytes(held)} of {what}, whose {dim} dimension does not"
                         f" divide among the {alike} devices that hold the same; zero={degrees.zero} leaves them"
                         " undivided")
    return found


def _sizes(pricer: Pricer, degrees: Degrees, known: Evidence) -> list[str]:
    found = []
    for what, size, (least, most) in (("devices", degrees.devices, known.devices),
                                      ("parameters", pricer.model.parameters(), known.parameters),
                                      ("tokens a sequence", pricer.model.tokens or known.tokens[0], known.tokens)):
        if size * FAR < least or size > FAR * most:
            found.append(f"{size:,} {what}, the runs behind the efficiencies had {least:,} to {most:,}")
    return found


def _kinds(pricer: Pricer, known: Evidence) -> list[str]:
    found = []
    products = pricer.machine.low or "16 bits"
    if products not in known.products:
        found.append(f"products in {products}, the runs behind the efficiencies had {' and '.join(known.products)}")
    elif products in known.thin:
        found.append(f"products in {products}, which runs of one model alone stand for on this device kind")
    kind = "experts" if pricer.model.has_experts else "dense"
    if kind not in known.models:
        found.append(f"a model {'with experts' if kind == 'experts' else 'without experts'}, the runs behind the"
                     f" efficiencies were {' and '.join(known.models)}")
    if pricer.model.tokens is None:
        found.append("a model without tokens, the runs behind the efficiencies were language models")
    return found
