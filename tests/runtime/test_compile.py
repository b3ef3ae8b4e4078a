"""torch.compile of the phase functions, as an option: the same losses and gradients, or one clear error."""

import random
from dataclasses import replace

import pytest
import runtime_cases as cases
import runtime_dags as dags
import runtime_equal as equal
import runtime_models as models
import torch

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import RunError
from mipipe.graphs.models.loss import sum_over
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.operators.collectives import SHAPED, part_of, whole_of
from mipipe.graphs.sharding.gathered import gathered
from mipipe.graphs.sharding.team_graph import MemberGraph
from mipipe.graphs.tracing.trace import phase_signature
from mipipe.planner.team import Team, TeamMode
from mipipe.runtime.engine.compiling import phases
from mipipe.runtime.engine.compiling.team import member_graph
from mipipe.runtime.engine.compiling.team_calls import TeamCalls
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions

COUNT = 2


def one_rank(recompute=False):
    problem = cases.problem_of(cases.chain_graph(), COUNT, 1)
    order = "0F0 0R0 0B0 0F1 0R1 0B1" if recompute else "0F0 0F1 0I0 0I1 0W1 0W0"
    return cases.plan_of(problem, [([0, 1, 2], [0])], [[0] * COUNT], [order], recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_functions_equal_autograd(recompute):
    """A small chain: F, I, W, and B with recomputation; gradients add up over steps in memory of their own."""
    losses, gradients = cases.run_chain(one_rank(recompute), 2, COUNT, steps=2, options=EngineOptions(compile=True))
    loss, expected = cases.chain_reference(2, COUNT)
    assert losses == pytest.approx([loss] * 2, rel=1e-12)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_ranks_equal_uncompiled_ones(pool):
    """Tied weights, replicas and dropout on two ranks: the compiled functions draw the same random numbers."""
    module = models.skip_module(dropout=0.5)
    graph = capture_module(module, models.token_batch(equal.ROWS, equal.LENGTH, 11), granularity="module",
                           loss_info=sum_over("labels"))
    batch = models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 11)
    plan = dags.random_plan(random.Random(3), graph, 2, COUNT)
    plain, fast = (pool.run(2, equal.__file__, "run_case", [plan], graph, dict(module.state_dict()), batch,
                            EngineOptions(compile=flag, timeout_s=400.0), timeout=500.0) for flag in (False, True))
    for ((loss, gradients),), ((other, compiled),) in zip(plain, fast, strict=True):
        assert other == pytest.approx(loss, rel=1e-12)
        assert set(gradients) == set(compiled)
        for name, gradient in gradients.items():
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_nothing_is_compiled_while_peers_wait():
    """The first step runs what was compiled when the engine was built: real parameters, saved values, gradients."""
    from torch._dynamo.utils import counters
    module = models.skip_module()
    graph = capture_module(module, models.token_batch(equal.ROWS, equal.LENGTH, 11), granularity="module",
                           loss_info=sum_over("labels"))
    plan = dags.random_plan(random.Random(3), graph, 1, COUNT)
    engine = Engine(plan, graph, dict(module.state_dict()), options=EngineOptions(compile=True))
    built = counters["stats"]["unique_graphs"]
    engine.step(models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 11))
    assert built and counters["stats"]["unique_graphs"] == built


@pytest.mark.slow
def test_a_mixture_compiles_too():
    """Grouped products are calls in a compiled graph; nothing is left out, and nothing compiled in a step."""
    from torch._dynamo.utils import counters
    module = models.tiny_moe(torch.float32)
    graph = capture_module(module, models.token_batch(equal.ROWS, equal.LENGTH, 64), loss=models.token_losses,
                           granularity="block", loss_info=sum_over("labels", shift=True))
    plan = dags.random_plan(random.Random(3), graph, 1, COUNT)
    losses = []
    for flag in (True, False):
        engine = Engine(plan, graph, module, options=EngineOptions(compile=flag))
        built = counters["stats"]["unique_graphs"]
        losses.append(engine.step(models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 64)))
        assert not engine.compiled.uncompiled and counters["stats"]["unique_graphs"] == built
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("team, zero, kinds", [
    (Team({"tensor": 2}), 0, {"all_reduce"}), (Team({}, 2), 3, {"all_gather", "reduce_scatter"}),
    (Team({"tensor": 2}, modes=(TeamMode("tensor", "sequence"),)), 0,
     {"all_gather", "all_reduce", "reduce_scatter", "take_part"})])
def test_compiled_teams_equal_uncompiled_ones(pool, team, zero, kinds):
    """Members of a team, or copies that gather parameters, talk from inside compiled functions, none of which is left
    out: losses and gradients are those of the same run without compilation."""
    module = models.skip_module()
    graph = capture_module(module, models.token_batch(equal.ROWS, equal.LENGTH, 11), granularity="block",
                           loss_info=sum_over("labels"))
    member = member_graph(team, graph) if not zero else gathered(MemberGraph(graph), team.copies, zero)
    assert {item.kind.split(".")[1] for trace in member.graph.traces for item in trace.operators
            if item.kind.startswith("mipipe.")} == kinds
    plan = replace(dags.random_plan(random.Random(3), graph, 1, COUNT), team=team)
    batch = models.token_batch(equal.ROWS * COUNT * team.copies, equal.LENGTH, 11)
    plain, fast = (pool.run(2, __file__, "run_member", plan, graph, dict(module.state_dict()), batch,
                            EngineOptions(compile=flag, zero=zero, timeout_s=30.0), timeout=500.0)
                   for flag in (False, True))
    for (loss, gradients), (other, compiled) in zip(plain, fast, strict=True):
        assert other == pytest.approx(loss, rel=1e-12)
        assert gradients and set(gradients) == set(compiled)
        for name, gradient in gradients.items():
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-10, atol=1e-12)


def run_member(plan, graph, state, batch, options):
    """What a process does: two steps; the loss of the second, and the gradients of both."""
    engine = Engine(plan, graph, state, options=options)
    assert not engine.compiled.uncompiled
    mine = {name: tensor.chunk(engine.mesh.num_copies)[engine.mesh.copy] for name, tensor in batch.items()}
    losses = [engine.step(mine) for _ in range(2)]
    return losses[-1], {name: item.grad for name, item in engine.named_parameters() if item.grad is not None}


@pytest.mark.slow
def test_calls_of_a_team_are_what_the_compiler_is_told():
    """Schemas and shapes of all operators, as two members with equal tensors have them."""
    size, rows = 2, torch.arange(32.0).view(4, 8).t()
    alike = {"all_reduce": lambda x, op, size, axis: size * x,
             "all_gather": lambda x, dim, sections, size, axis: whole_of([x] * size, dim, sections),
             "reduce_scatter": lambda x, dim, sections, size, axis: size * part_of(x, 1, size, dim, sections),
             "take_part": lambda x, dim, sections, size, axis: part_of(x, 1, size, dim, sections).clone(),
             "exchange_parts": lambda x, source, target, size, axis: whole_of(
                 [part_of(x, 1, size, *target)] * size, *source)}
    assert set(alike) == set(SHAPED)
    calls = TeamCalls({f"mipipe.{name}.default": function for name, function in alike.items()})
    where = {"all_reduce": ("sum",), "exchange_parts": ([0, 1], [1, 2])}
    for kind, call in calls.calls.items():
        name = kind.split(".")[1]
        arguments = (rows, *where.get(name, (0, 2)), size, "tensor")
        found = call(*arguments)
        assert torch.equal(found, alike[name](*arguments)) and found.is_contiguous()
        torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))
        with calls.quiet():
            assert not call(*arguments).any()


@pytest.mark.slow
def test_collectives_stay_in_order_where_the_compiler_would_move_them():
    """The first waits for a product, the second for nothing; and nobody talks while functions are made."""
    began = []

    def all_reduce(x, op, size, axis):
        began.append(axis)
        return 2 * x.t()  # laid out otherwise than the compiler is told

    calls = TeamCalls({"mipipe.all_reduce.default": all_reduce})
    reduced = calls.calls["mipipe.all_reduce.default"]

    def phase(a, b):
        first = reduced(a @ b, "sum", 2, "first")
        return reduced(b + 1, "sum", 2, "second").relu(), a + 1, reduced(first * 3, "sum", 2, "third")

    a, b = torch.rand(4, 4), torch.rand(4, 4)
    with torch.no_grad():
        made = torch.compile(phase, dynamic=False, fullgraph=True)
        with calls.quiet():
            assert not made(a, b)[2].any() and not began
        results = made(a, b)
    assert began == ["first", "second", "third"]
    for found, wanted in zip(results, (2 * (b + 1).t(), a + 1, 12 * (a @ b)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", [None, "no-such-compiler -O2"])
def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path, name):
    """Found out before anything runs, not in the middle of the first step."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if name is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", name)
    with pytest.raises(RunError, match=r"torch.compile needs a C.. compiler, but none was found .*train without"):
        Engine(one_rank(), cases.chain_graph(), cases.chain_state(), options=EngineOptions(compile=True))


def slow_compiler(made, graph, state, batch, timeout_s):
    """Rank 1 compiles for longer than a step may take; nothing else is compiled."""
    import time
    original = phases.Phases.code

    def code(self, *arguments):
        time.sleep(0.06 * torch.distributed.get_rank())
        return original(self, *arguments)

    patch = pytest.MonkeyPatch()
    patch.setattr(phases.Phases, "code", code)
    patch.setattr(phases.Phases, "compiles", lambda *arguments: False)
    patch.setattr(phases, "Compiler", lambda rehearsal: rehearsal)
    try:
        engine = Engine(made, graph, state, options=EngineOptions(compile=True, timeout_s=timeout_s))
        return engine.step(batch)
    finally:
        patch.undo()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_compiles_for_long_is_waited_for(pool):
    """The time limit of a step is not that of compiling."""
    case = equal.case("skip")
    made = dags.random_plan(random.Random(3), case.graph, 2, COUNT)
    batch = models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 11)
    one, other = pool.run(2, __file__, "slow_compiler", made, case.graph, case.state(), batch, 0.5)
    assert one == other


@pytest.mark.parametrize("name", [pytest.param("moe", marks=pytest.mark.slow), "skip"])
def test_every_phase_can_be_run_before_the_first_step(name):
    """On zeros, once for each trace, in what it saves and gives of the traced shapes; generators stay as they are."""
    graph = equal.case(name).graph
    warm = phases.Phases(graph, torch.device("cpu"), warm=True)
    seen = []
    original = warm._rehearsal.run

    def run(function, trace, phase, handing):
        given, results = original(function, trace, phase, handing)
        seen.append((trace.digest, phase))
        names = phase_signature(trace, phase)[1]
        for result, label in zip(results, names, strict=True):
            if label in trace.specs:
                assert tuple(result.shape) == trace.specs[label].shape, label
        return given, results

    warm._rehearsal.run = run
    state = torch.get_rng_state()
    for segment in graph.segments * 2:
        for phase in Phase:
            warm.code(warm.trace(segment), phase, segment.name)
    assert torch.equal(torch.get_rng_state(), state) and not warm._rehearsal._values
    wanted = [(trace.digest, phase) for trace in graph.traces for phase in Phase if trace.has(phase)]
    assert sorted(seen) == sorted(wanted)
