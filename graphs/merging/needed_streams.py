"""Which streams a merge needs: from its units and what their methods want to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mipipe.graphs.calibration.rule import CalibrationRule
from mipipe.graphs.calibration.streams import CalibrationPlan, Member, ModelStream, Need, Who
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.graph import MergeUnit
from mipipe.graphs.merging.method_table.methods import BY_NAME


def calibration_of(units: Sequence[MergeUnit], rule: CalibrationRule | None, own: Mapping[int, str],
                   num_layers: int, seed: int, where: str) -> CalibrationPlan | None:
    """The streams that all units' methods need together; None where none runs a model.

    Args:
        own: the data that models (by index) bring along, in place of the rule's.

    Raises:
        InputError: a method runs models and the recipe has no calibration, or no data for a model.
    """
    wanted: dict[tuple[Member, ...], dict[str, bool]] = {}
    for unit in units:
        spec = BY_NAME.get(unit.method)
        needs = spec.needs(unit.parameters) if spec is not None else ()
        if rule is None and (needs or (spec is not None and spec.learned)):
            raise InputError(f"{where}: {unit.method} runs the models on samples of text; give the recipe a calibration"
                             " (calibration: {data: FILE, samples: 100})")
        for need in needs:
            assert rule is not None
            for members in _members(unit, need, own, rule.data):
                if not all(member.data for member in members):
                    raise InputError(f"{where}: calibration: has no data for some models that {unit.method} runs; give"
                                     " it data, or every model a calibration of its own")
                found = wanted.setdefault(members, {})
                found[need.statistic] = found.get(need.statistic, False) or need.gradients
    if not wanted or rule is None:
        return None
    if num_layers < 1:
        raise InputError(f"{where}: calibration runs decoder layers, and the models' config tells no num_hidden_layers")
    streams = [ModelStream(members, tuple(sorted(name for name, backward in found.items() if backward == gradients)),
                      gradients, part, rule.parts)
               for members, found in sorted(wanted.items(), key=lambda item: [(m.model, m.data) for m in item[0]])
               for gradients in (False, True) if gradients in found.values() for part in range(rule.parts)]
    return CalibrationPlan(rule.samples, rule.length, rule.batch, seed, num_layers, tuple(streams))


def _members(unit: MergeUnit, need: Need, own: Mapping[int, str], shared: str) -> list[tuple[Member, ...]]:
    models = [Member(item.model, own.get(item.model) or shared) for item in unit.models]
    if need.who is Who.MODELS:
        return [(member,) for member in models]
    if need.who is Who.TOGETHER:
        return [tuple(models)]
    if need.who is Who.SAME:
        return [tuple(Member(member.model, models[-1].data) for member in models)]
    assert unit.base is not None
    if need.who is Who.BASE:
        return [(Member(unit.base.model, own.get(unit.base.model) or shared),)]
    chosen = models[-1:] if need.who is Who.LAST else models
    return [(Member(unit.base.model, member.data), member) for member in chosen]
