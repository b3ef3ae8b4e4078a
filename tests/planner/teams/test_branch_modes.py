"""Branches with a mode of their own along the tensor axis: their price by hand, and by the members' programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from team_machine import machine

from mipipe.graphs.costs.collectives import collective_ns
from mipipe.graphs.costs.estimate_modes import estimated_profile
from mipipe.graphs.costs.mode_profile import all_work
from mipipe.graphs.costs.products import only_through
from mipipe.graphs.costs.trace_facts import TeamSplit
from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.graphs.modes import Collective, CollectiveKind, Layout
from mipipe.graphs.operator_graph import Phase, Role
from mipipe.graphs.sharding.modes import with_modes
from mipipe.graphs.sharding.samples import samples_together
from mipipe.graphs.sharding.team_graph import MemberGraph
from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan
from mipipe.planner.team import TeamMode
from mipipe.planner.teams.again import TeamTask, made_again, task_of, with_task
from mipipe.planner.teams.bounds.of_degrees import bound_of, packed
from mipipe.planner.teams.evaluate import evaluate_teams, piece_costs, result_of
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.orders import order_of
from mipipe.planner.teams.prices.between_modes import resharded
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.misfit import samples_misfit
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams
from mipipe.planner.teams.space import DegreeSpace, floor_of, roughly_fits
from mipipe.planner.teams.stages import cut_pieces, stages_on, team_problem

MACHINE = replace(machine(), dtype="float32")
VISION = {"vision": "batch"}
KINDS = CollectiveKind


@pytest.fixture(scope="module")
def profiles(llava):
    """What two members do in every mode."""
    return with_modes(llava, ("tensor", "sequence", "batch"), (2,)).modes


def talk(work):
    """The collectives of F and I by their kind and bytes, without sums of a row's statistics and of the loss."""
    return {phase: sorted((item.kind.value, item.num_bytes) for item in one.collectives for _ in range(item.count)
                          if item.num_bytes > 1000) for phase, one in work.items() if phase is not Phase.W}


@pytest.mark.slow
def test_a_batch_estimate_is_what_is_traced(llava, profiles):
    """Of every segment that members run on samples of their own: parameters whole, all gradients sums, no collectives,
    half of the products and of what is kept."""
    for segment in llava.segments:
        trace, role = llava.trace(segment), segment.tags.role
        if segment.tags.branch != "vision" or role is Role.EMBEDDING:
            continue
        traced = profiles.find(trace.digest, "batch", 2)
        estimate = estimated_profile(trace, role, TeamSplit(batch=2), fused=False)
        assert (estimate.resident, estimate.mode, estimate.members) == (traced.resident, "batch", 2)
        assert estimate.outputs == traced.outputs == (Layout.BATCH,)
        for phase, work in traced.phases.items():
            assert estimate.phases[phase].flops == work.flops > 0
            assert not estimate.phases[phase].collectives and not work.collectives
        assert sum((estimate.kept.fi, estimate.kept.fw)) == sum((traced.kept.fi, traced.kept.fw))


@pytest.mark.slow
@pytest.mark.parametrize("common, modes", [
    ("tensor", VISION), ("sequence", VISION), ("tensor", {"text": "batch"}), ("tensor", {**VISION, "text": "batch"}),
    ("sequence", {"vision": "tensor"})], ids=str)
def test_what_passes_between_modes_is_what_members_send(llava, profiles, common, modes):
    """The collectives of every segment of the member's graph in these modes are those of its own mode, changed where it
    reads another's values (in sequence mode the text changes some more than once, which is left out)."""
    of_all = {segment.name: modes.get(segment.tags.branch, common) for segment in llava.segments}
    member = MemberGraph(llava).divided("tensor", 2, of_all).graph
    pricer, degrees = Pricer(model_pieces(llava, modes), MACHINE), Degrees(tensor=2, sequence=common == "sequence")
    changed = 0
    for number, segment in enumerate(llava.segments):
        own = profiles.find(segment.trace, of_all[segment.name], 2)
        phases, moved = resharded(pricer.model, number, own, pricer.columns(number, degrees), degrees)
        changed += phases != own.phases or any(moved.values())
        ours = {phase: replace(work, collectives=(*work.collectives, *moved[phase])) for phase, work in phases.items()}
        assert talk(ours) == talk(all_work(member.trace(member.segments[number]))), segment.name
    assert bool(changed) == ("batch" in modes.values())  # five patches: the tower's values are whole otherwise


@pytest.mark.parametrize("zero, context", [(0, 1), (3, 2), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)))])
def test_a_layer_by_samples_by_hand(llava, zero, context):
    """Parameters whole; gradients are summed over the tensor axis, the context and the copies at once where each keeps
    all of them, else the parts, of context members and copies, over the tensor axis; products, kept bytes and kernels
    are half of one device's, as five rows do not divide by two."""
    degrees = Degrees(1, 2, context=context, copies=4, zero=zero, microbatch=2)
    alone, other, pricer = (Pricer(model_pieces(llava, modes), MACHINE) for modes in ({}, {}, VISION))
    number = next(at for at, piece in enumerate(pricer.model.pieces) if piece.name == "vision layer 0")
    one = alone.costs(replace(degrees, tensor=1, copies=1, microbatch=1, zero=0))[number]
    cost, usual = pricer.costs(degrees)[number], other.costs(degrees)[number]
    alike, trained = 4 * context, one.gradients // 4
    shares = [alike if zero >= stage else 1 for stage in (1, 2, 3)]
    assert cost.f.talk.get("tensor", 0.0) == 0 < usual.f.talk["tensor"]
    assert cost.kept == one.kept < usual.kept
    assert (cost.weights, cost.gradients, cost.state) == (
        pytest.approx(one.weights / shares[2], abs=100), 4 * trained // shares[1], 8 * trained // shares[0])
    assert one.weights > 1.8 * usual.weights * shares[2]
    summed = collective_ns(MACHINE.fabric, KINDS.ALL_REDUCE, 4 * trained // shares[1],
                           2 * (1 if zero > 1 else alike))
    assert cost.reduce == pytest.approx(summed / 1e9, abs=5e-9)
    assert cost.gather == (0 if zero in (0, 3) else pytest.approx(
        collective_ns(MACHINE.fabric, KINDS.ALL_GATHER, 4 * trained, alike, 2) / 1e9, abs=5e-9))
    products = [pricer.profile(at, degrees).phases[Phase.F].flops for at in pricer.model.pieces[number].members]
    whole = [alone.profile(at, Degrees()).phases[Phase.F].flops for at in pricer.model.pieces[number].members]
    assert sum(products) * 2 == sum(whole)


@pytest.mark.parametrize("tensor, microbatch", [(2, 2), (2, 8), (4, 4), (4, 8), (8, 8)])
def test_samples_are_shared_whatever_was_captured(llava, tensor, microbatch):
    """Two samples are captured: four members have the time of one sample for every four of a microbatch, not of half a
    sample's products."""
    pricer = Pricer(model_pieces(llava, VISION), MACHINE)
    at = next(at for at, item in enumerate(llava.segments) if item.tags.branch == "vision" and item.tags.layer == 0)
    split, left = pricer.model.split(at, Degrees(tensor=tensor))
    assert (split, left) == (TeamSplit(batch=2), 2 / tensor)
    costs = [pricer.costs(degrees)[pricer.model.layers[0]] for degrees in (
        Degrees(tensor=tensor, microbatch=microbatch), Degrees(microbatch=microbatch // tensor))]
    assert costs[0].kept == costs[1].kept > 0
    whole = pricer.profile(at, Degrees()).phases[Phase.F].flops * microbatch / 2
    assert pricer.profile(at, Degrees(tensor=tensor)).phases[Phase.F].flops * left * microbatch / 2 == whole / tensor


@pytest.mark.parametrize("sequence", [False, True])
def test_one_mode_for_all_is_no_mode(llava, sequence):
    """Given for every branch, the mode of all others changes no figure and nothing of the plan."""
    degrees = Degrees(2, 2, sequence, copies=2, microbatch=2)
    modes = dict.fromkeys(("vision", "projector", "text"), "sequence" if sequence else "tensor")
    plain, told, own = (evaluate_teams(Pricer(model_pieces(llava, given), MACHINE), degrees, 8)
                        for given in ({}, modes, VISION))
    assert (told.plan.team, told.seconds, told.memory, told.times) == (
        plain.plan.team, plain.seconds, plain.memory, plain.times)
    assert own.plan.team.modes[-1] == TeamMode("tensor", "batch", tuple(
        item.name for item in llava.segments if item.tags.branch == "vision"))
    assert own.memory[0].weights > plain.memory[0].weights and own.seconds != plain.seconds
    assert own.plan.provenance["team"]["modes"] == VISION and told.plan.provenance["team"]["modes"] == {}


def test_every_mode_has_its_price(llava):
    """A tower by samples beside a divided text keeps less than by heads; its five positions do not divide."""
    degrees = Degrees(1, 2, copies=1, microbatch=2)
    kept = {mode: Pricer(model_pieces(llava, {"vision": mode}), MACHINE).costs(degrees)[2].kept
            for mode in ("tensor", "sequence", "batch")}
    assert kept["batch"] < kept["sequence"] == kept["tensor"]


def test_no_bound_is_above_a_plan_with_modes(llava):
    """The footprint is what the pieces hold; degrees whose microbatch members cannot share are none."""
    pricer = Pricer(model_pieces(llava, VISION), replace(MACHINE, memory_bytes=10**9))
    points = DegreeSpace(pricer, 4, 8, {}, None, None).all()
    assert {point.degrees.tensor for point in points} == {1, 2, 4}
    for point in points:
        degrees = point.degrees
        assert degrees.microbatch % degrees.tensor == 0 and roughly_fits(pricer, degrees)
        assert pricer.footprint(degrees).dense == sum(cost.weights for cost in pricer.costs(replace(degrees, zero=0)))
        made = evaluate_teams(pricer, degrees, 8).seconds if degrees.ranks <= len(pricer.model.layers) else 1.0
        found = bound_of(pricer, degrees, 8, None)
        assert max(found[0], packed(pricer, degrees, 8, None)[0], floor_of(pricer, degrees, 8)[1]) <= made * (1 + 1e-9)


def test_a_search_has_the_modes_and_a_plan_made_again_keeps_them(llava):
    options = TeamOptions({"tensor": 2}, 2, time_limit_s=20.0, order=False)
    found = search_teams(Pricer(model_pieces(llava, VISION), MACHINE), 4, 8, options).best
    plan = with_task(found.plan, TeamTask(MACHINE, options, VISION))
    again = made_again(plan, llava, 2, copies=plan.team.copies)
    assert again.team.modes[-1] == plan.team.modes[-1] and again.team.modes[-1].mode == "batch"
    assert [item.mode for item in again.team.modes if item.segments] == ["batch"]
    assert task_of(again).modes == again.provenance["team"]["modes"] == VISION
    assert again.team.copies * again.problem.num_ranks == 1


def test_samples_are_told_apart_where_one_was_captured(llava_of):
    graph = llava_of(1)
    assert samples_together(graph, ["vision", "text"]) is None
    assert samples_together(graph, ["vision", "projector"]) == "model.multi_modal_projector"


def test_what_has_no_samples_of_its_own_is_refused(llava):
    assert samples_together(llava, ["vision", "text"]) is None
    with pytest.raises(InputError, match=r"^--modes projector=batch: model\.multi_modal_projector looks at several"
                                         r" samples at once, .*; leave its branch out$"):
        model_pieces(llava, {"projector": "batch"})
    pricer = Pricer(model_pieces(llava, VISION), MACHINE)
    assert samples_misfit(pricer.model, Degrees(tensor=2, microbatch=4)) is None
    with pytest.raises(InputError, match=r"^--modes vision=batch: microbatches of 3 samples do not divide among the 2"
                                         r" members of the tensor axis; --microbatch 2 or 4 would$"):
        evaluate_teams(pricer, Degrees(1, 2, microbatch=3), 6)
    with pytest.raises(InfeasibleError, match=r"^no plan exists: --modes vision=batch: microbatches of 3 samples"):
        search_teams(pricer, 2, 6, TeamOptions({"tensor": 2}, 3))


def test_heads_that_members_do_not_share_need_not_divide(llava):
    """Four heads and eight members: the tower may have samples each, the text's heads do not divide."""
    with pytest.raises(InputError, match=r"tensor=8 does not divide the 4 heads of model\.language_model"):
        evaluate_teams(Pricer(model_pieces(llava, VISION), MACHINE), Degrees(1, 8, microbatch=8), 8)
    both = Pricer(model_pieces(llava, {**VISION, "text": "batch"}), MACHINE)
    assert evaluate_teams(both, Degrees(1, 8, microbatch=8), 8).seconds > 0


def test_the_first_layer_of_a_branch_pays_for_what_it_reads(llava):
    """Text by samples reads embeddings that all members have, and gathers their gradients, of a whole microbatch: not
    so the second layer, which is as the first in all else."""
    pricer = Pricer(model_pieces(llava, {"text": "batch"}), MACHINE)
    costs, text = pricer.costs(Degrees(1, 4, microbatch=4)), 4 * 16 * 32 * 4
    first, second = (costs[next(number for number, piece in enumerate(pricer.model.pieces) if piece.name == name)]
                     for name in ("text layer 0", "text layer 1"))
    spent = collective_ns(MACHINE.fabric, KINDS.ALL_GATHER, text, 4) / 1e9
    assert first.i.talk == {"tensor": pytest.approx(spent)} and not first.f.talk and not second.i.talk
    assert (first.buffers, second.buffers) == (text, 0) and first.i.compute == second.i.compute
    assert pricer.collectives(Degrees(1, 4, microbatch=4)) > Pricer(
        model_pieces(llava, {"text": "batch", "vision": "batch"}), MACHINE).collectives(Degrees(1, 4, microbatch=4))


@pytest.mark.slow
def test_traced_samples_are_taken_where_all_members_had_some(llava, profiles):
    """Of two captured samples for two members, with what their programs send; not for four members."""
    traced, plain = (Pricer(model_pieces(replace(llava, modes=modes), VISION), MACHINE) for modes in (profiles, None))
    two, four = Degrees(1, 2, microbatch=4), Degrees(1, 4, microbatch=4)
    at = next(at for at, item in enumerate(llava.segments) if item.tags.branch == "vision")
    own = profiles.find(llava.segments[at].trace, "batch", 2)
    sums = [item for item in own.phases[Phase.W].collectives if item.axis == "batch"]  # positions, alike in all samples
    assert sums and traced.profile(at, two).phases[Phase.W].collectives == own.phases[Phase.W].collectives
    ours, other = (pricer.costs(two) for pricer in (traced, plain))
    assert traced.origins["traced"] and "traced" not in plain.origins
    assert ours[1].w.talk["tensor"] > 0 and not other[1].w.talk
    assert [(cost.kept, cost.resident, cost.reduce) for cost in ours[1:4]] == [
        (cost.kept, cost.resident, cost.reduce) for cost in other[1:4]]
    assert traced.profile(at, four) == plain.profile(at, four)


def test_what_products_by_columns_alone_read(llava):
    """Images go through the projector's first product; text goes around it, and around attention."""
    pricer, degrees = Pricer(model_pieces(llava), MACHINE), Degrees(1, 2)
    found, branch = {}, {name: segment.tags.branch for segment in llava.segments for name in segment.outputs}
    for at, segment in enumerate(llava.segments):
        trace = llava.trace(segment)
        for name, value in zip(trace.inputs, segment.inputs, strict=True):
            if "float" in trace.specs[name].dtype and segment.tags.branch in ("projector", "text"):
                found[segment.name.rpartition(".")[2], branch.get(value)] = only_through(
                    trace, pricer.columns(at, degrees), name)
    assert found == {("multi_modal_projector", "vision"): True, ("multi_modal_projector", "text"): False,
                     ("self_attn", "projector"): False, ("self_attn", "text"): False, ("mlp", "text"): False,
                     ("lm_head", "text"): True}


def test_a_value_that_passes_between_modes_has_a_buffer(llava):
    """The projector gathers the images and the text's embeddings, at the length of a microbatch."""
    pricer = Pricer(model_pieces(llava, {**VISION, "text": "batch"}), MACHINE)
    degrees = Degrees(1, 2, microbatch=4)
    at = next(at for at, item in enumerate(llava.segments) if item.tags.branch == "projector")
    profile = pricer.profile(at, degrees)
    moved = resharded(pricer.model, at, profile, pricer.columns(at, degrees), degrees)[1]
    images, text = 2 * 5 * 32 * 4, 2 * 16 * 32 * 4
    assert moved[Phase.F] == [Collective(KINDS.ALL_GATHER, "tensor", images),
                              Collective(KINDS.ALL_GATHER, "tensor", text)]
    number = next(number for number, piece in enumerate(pricer.model.pieces) if at in piece.members)
    cost, usual = (Pricer(model_pieces(llava, modes), MACHINE).costs(degrees)[number]
                   for modes in ({**VISION, "text": "batch"}, VISION))
    assert cost.buffers == 2 * text and cost.f.talk["tensor"] == pytest.approx(usual.f.talk["tensor"] + collective_ns(
        MACHINE.fabric, KINDS.ALL_GATHER, 2 * text, 2) / 1e9)


def test_orders_are_searched_on_the_stages_that_a_result_has(llava):
    """The projector lies between layers of the tower and of the text: a stage of its own counts none, as does one that
    it is not in."""
    pricer, degrees = Pricer(model_pieces(llava, {}), MACHINE), Degrees(ranks=2, chunks=2)
    pieces = pricer.model.pieces
    between = next(at for at in range(1, len(pieces)) if pieces[at].layer is None and pieces[at - 1].layer is not None)
    cuts = [tuple(range(between)), (between,), tuple(range(between + 1, len(pieces) - 1)), (len(pieces) - 1,)]
    stages = stages_on(piece_costs(pricer, degrees, ()), cuts, [(0,), (1,), (0,), (1,)], (), MACHINE, split=True)
    problem = team_problem(pricer.model, degrees, MACHINE, stages, 2)
    made = plan(problem, PlanOptions(time_limit_s=1)).plan
    layers = tuple(sum(pieces[at].layer is not None for at in cut) for cut in cuts)
    item = result_of(pricer, degrees, 2, made, stages, "planned order", layers, made.makespan_ns)
    assert layers[1] == layers[3] == 0 and cut_pieces(pricer.model, layers) != cuts
    better = order_of(pricer, item, 2, 1.0, 0)
    assert [stage.pieces for stage in better.stages] == cuts

