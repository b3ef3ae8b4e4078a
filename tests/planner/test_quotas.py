"""List schedules under quotas: sound, within their limits, reproducible; and large problems end to end."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from mipipe.planner.actions import ActionKind
from mipipe.planner.check import check_plan
from mipipe.planner.jobs.arrays import build, mirror, with_mirrors
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder import large as scale
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.cuts import place_spread
from mipipe.planner.placements.shapes import light_ends, propose_shapes, shapes
from mipipe.planner.plan import Placement, Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_units, two_stream_problem, uniform_problem
from mipipe.planner.search import bidirectional as two_ended
from mipipe.planner.search import quotas
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import may_queue, placements, problems


def uneven(ranks: int, microbatches: int) -> PlanningProblem:
    """The issue's scale problem: light ends, transfers of 0.1, three quarters of 1F1B's activations."""
    return uniform_problem(ranks=ranks, microbatches=microbatches, f=1, i=1, w=1, comm="0.1", layers=4 * ranks,
                           first="0.2", last="0.6", activations=0.75 * ranks)


def spread_two_way(problem: PlanningProblem) -> Placement:
    """The two-way chain with the light ends on all ranks."""
    return place_spread(problem, shapes(problem.num_ranks, "two-way")[0], light_ends(problem))


def test_every_rule_gives_a_sound_schedule_with_the_kernels_own_makespan() -> None:
    problem = uneven(4, 8)
    for placement in (*propose_shapes(problem, "two-way"), spread_two_way(problem), *propose_shapes(problem, "v")):
        stage_view = view(problem, placement)
        for halved in (False, True) if mirror(stage_view) else (False,):
            instance = build(stage_view, halve=halved)
            lines = quotas.lines_of(instance)
            assert lines is not None
            for number, rule in enumerate(quotas.first_rules(lines)):
                orders = quotas.run_rule(instance, lines, rule) if number % 9 == 0 else None
                if orders is not None:
                    schedule = with_mirrors(instance, orders.lists())
                    assert evaluate(stage_view, schedule)[1].makespan_ns == orders.makespan_ns
                    check_plan(Plan("x", problem, placement, schedule, orders.makespan_ns))


def test_quotas_hold() -> None:
    """No stage ever has more activations than its quota; of the memory left over every rank gets its share."""
    problem = uneven(4, 12)
    instance = build(view(problem, next(propose_shapes(problem, "chain"))))
    lines = quotas.lines_of(instance)
    assert lines is not None
    rule = next(quotas.first_rules(lines))
    orders = quotas.run_rule(instance, lines, rule)
    assert orders is not None
    for machine, order in enumerate(orders.lists()):
        held = dict.fromkeys(np.flatnonzero(lines.machine == machine).tolist(), 0)
        for node in order:
            line = int(lines.line[instance.cls[node]])
            held[line] += {0: 1, 3: -1}.get(int(instance.kind[node]), 0)
            assert held[line] <= rule.quota[line]
        room = lines.cap[machine] - sum(int(rule.quota[n] * lines.size[n]) for n in held if lines.size[n])
        assert 0 <= room < max(lines.size[list(held)])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_jobs=24))
def test_random_problems_have_sound_schedules_or_none(problem: PlanningProblem) -> None:
    """Branches, frozen groups, tight memory: where a rule gives orders, they are complete and take what it says."""
    stage_view = placements(problem)[-1]
    instance = build(stage_view)
    lines = quotas.lines_of(instance)
    assert lines is not None
    orders = quotas.run_rule(instance, lines, next(quotas.first_rules(lines)))
    if orders is not None:
        assert sorted(n for order in orders.lists() for n in order) == list(range(instance.size))
        _, evaluation = evaluate(stage_view, with_mirrors(instance, orders.lists()))
        assert evaluation.makespan_ns == orders.makespan_ns or may_queue(problem)


def test_two_streams_have_no_lines() -> None:
    problem = two_stream_problem(ranks=4, microbatches=8)
    assert quotas.lines_of(build(view(problem, next(propose_shapes(problem, "chain"))))) is None
    assert not scale.applies(two_stream_problem(ranks=64, microbatches=1024))


def test_tuning_by_evaluations_is_reproducible_and_helps() -> None:
    problem = uneven(8, 16)
    stage_view = view(problem, spread_two_way(problem))
    instance = build(stage_view, halve=True)
    lines = quotas.lines_of(instance)
    assert lines is not None
    first, again = (quotas.tune(instance, lines, 60, 3, evaluations=300) for _ in range(2))
    start = quotas.run_rule(instance, lines, next(quotas.first_rules(lines)))
    assert first is not None and again is not None and start is not None
    assert (first.orders.seq == again.orders.seq).all() and first.tried == 300
    assert first.orders.makespan_ns < start.makespan_ns


def test_backwards_and_blended_lists_are_sound_and_better() -> None:
    """A list of the reversed instance, read from its end, is a schedule; the blend beats the forward one."""
    problem = uneven(16, 32)
    placement = spread_two_way(problem)
    stage_view = view(problem, placement)
    instance = build(stage_view, halve=True)
    lines = quotas.lines_of(instance)
    assert lines is not None
    mirrored, turned, image = two_ended.backwards(instance, lines)
    assert (image[image] == np.arange(instance.size)).all()
    forward = quotas.tune(instance, lines, 60, 0, evaluations=60)
    backward = quotas.tune(mirrored, turned, 60, 0, rules=two_ended.backward_rules, evaluations=60)
    assert forward is not None and backward is not None
    read = [[int(image[n]) for n in reversed(order)] for order in backward.orders.lists()]
    schedule = with_mirrors(instance, read)
    _, evaluation = evaluate(stage_view, schedule)
    assert evaluation.makespan_ns <= backward.orders.makespan_ns
    check_plan(Plan("x", problem, placement, schedule, evaluation.makespan_ns))
    blended = two_ended.blend(instance, lines, forward.orders, mirrored, image, backward.orders)
    assert blended.makespan_ns < forward.orders.makespan_ns
    check_plan(Plan("x", problem, placement, with_mirrors(instance, blended.lists()), blended.makespan_ns))


def test_rules_move_to_more_microbatches() -> None:
    """Four times the microbatches, less than twice the bubble: most of it is lost at the two ends of the step."""
    bubbles = []
    rule, old = None, None
    for microbatches in (32, 128):
        problem = uneven(8, microbatches)
        placement = spread_two_way(problem)
        instance = build(view(problem, placement), halve=True)
        lines = quotas.lines_of(instance)
        assert lines is not None
        if rule is None or old is None:
            tuned = quotas.tune(instance, lines, 60, 0, evaluations=200)
            assert tuned is not None
            rule, old, orders = tuned.rule, lines, tuned.orders
        else:
            orders = quotas.run_rule(instance, lines, quotas.moved(rule, old, lines))
            assert orders is not None
        bubbles.append(in_units(problem, orders.makespan_ns) - 3.3 * microbatches)
    assert bubbles[1] < 2 * bubbles[0]


@pytest.mark.slow
def test_large_problems_have_a_plan_at_once_and_a_small_gap() -> None:
    """64 ranks x 1,024 microbatches: a first plan in seconds, then within 3.5 % of the bound over all placements."""
    problem = uneven(64, 1024)
    began, first = time.monotonic(), []
    result = plan(problem, PlanOptions(time_limit_s=60), lambda state: first.append(time.monotonic() - began))
    assert result.plan is not None and result.gap is not None
    assert first[0] < 15 and result.gap < 0.035
    kinds = {action.kind for action in result.plan.schedule.actions()}
    assert kinds == {ActionKind.F, ActionKind.I, ActionKind.W}


def test_large_problems_keep_the_shape_asked_for() -> None:
    """A chain asked for by name can be exported; free placement spreads the light ends."""
    problem = uneven(8, 256)
    assert scale.applies(problem)
    for name, expected in (("chain", {"chain"}), ("two-way", {"two-way"}), ("free", {"two-way+spread"})):
        run = Run(problem, PlanOptions(placement=name))  # type: ignore[arg-type]
        assert {placement.name for placement in itertools.islice(scale.large_placements(run), 1)} == expected
