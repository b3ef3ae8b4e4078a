"""Profiling: real tensors through real phase functions, each structure once, inputs that are in range."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.errors import GraphError, InputError, RunError
from mipipe.graphs.operator_graph import OperatorGraph, ParameterSpec, Phase, Segment, Tags, TensorSpec, Value
from mipipe.graphs.profiling.profile import ProfileOptions, _recall, _remember, profile_groups
from mipipe.graphs.profiling.profile_worker import (
    EventMoments,
    _lots,
    candidates,
    in_turn,
    measure_groups,
    timed_rounds,
)
from mipipe.graphs.profiling.rehearse import build_group, index_bound, model_input, rehearse
from mipipe.graphs.tracing.partition import trace_segment

QUICK = ProfileOptions(seconds=0.02, samples=4)
CPU = torch.device("cpu")
VOCAB, CLASSES, TOKENS, WIDTH, EXPERTS = 11, 7, 6, 8, 3


@pytest.fixture(scope="module")
def language_model():
    """Token ids -> embedding -> a router that indexes experts' weights -> loss against labels."""
    def embed(ids, table):
        return (torch.nn.functional.embedding(ids, table),)

    def route(x, gate, scale):
        best = (x @ gate).argmax(dim=-1)
        return x * scale[best].unsqueeze(-1), best

    def loss(x, best, labels, head):
        scores = torch.nn.functional.log_softmax(x @ head, dim=-1)
        return (torch.nn.functional.nll_loss(scores, labels.clamp(min=0)) + 0.0 * best.sum(),)

    f32, i64 = "float32", "int64"
    ids, x = TensorSpec((TOKENS,), i64), TensorSpec((TOKENS, WIDTH), f32)
    weights = {"table": TensorSpec((VOCAB, WIDTH), f32), "gate": TensorSpec((WIDTH, EXPERTS), f32),
               "scale": TensorSpec((EXPERTS,), f32), "head": TensorSpec((WIDTH, CLASSES), f32)}
    traces = (trace_segment(embed, {"ids": ids}, {"table": weights["table"]}),
              trace_segment(route, {"x": x}, {"gate": weights["gate"], "scale": weights["scale"]}),
              trace_segment(loss, {"x": x, "best": ids, "labels": ids}, {"head": weights["head"]}))
    segments = (Segment("embed", "embed", traces[0].digest, ("ids",), ("h0",), ("table",)),
                Segment("route", "route", traces[1].digest, ("h0",), ("h1", "best"), ("gate", "scale")),
                Segment("loss", "loss", traces[2].digest, ("h1", "best", "labels"), ("l",), ("head",), (), Tags()))
    values = (Value("ids", ids, None, False), Value("labels", ids, None, False), Value("h0", x, "embed", True),
              Value("h1", x, "route", True), Value("best", ids, "route", False),
              Value("l", TensorSpec((), f32), "loss", True))
    return OperatorGraph("toy", ("ids", "labels"), ("l",), "l", segments, values,
                         tuple(ParameterSpec(name, spec) for name, spec in weights.items()), traces)


def test_integer_inputs_stay_within_what_they_index(language_model):
    index = index_graph(language_model)
    assert index_bound(index, "ids") == VOCAB
    assert index_bound(index, "labels") == CLASSES
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([model_input(index, "ids", generator) for _ in range(50)])
    assert drawn.min() == 0 and drawn.max() == VOCAB - 1


def test_a_rehearsal_gives_the_losses_and_gradients_of_autograd(language_model):
    index = index_graph(language_model)
    run = build_group(index, [0, 1, 2], CPU)
    generator = torch.Generator().manual_seed(0)
    for name in run.inputs:
        run.slots[f"value:{name}"] = model_input(index, name, generator)
    assert set(run.inputs) == {"ids", "labels"}
    for name in run.gradients:
        run.slots[name] = torch.ones(())
    with torch.no_grad():
        for phase in Phase:
            run.run(phase)
    leaves = {name: run.slots[f"weight:{name}"].clone().requires_grad_() for name in ("table", "gate", "scale", "head")}
    x = leaves["table"][run.slots["value:ids"]]
    best = (x @ leaves["gate"]).argmax(dim=-1)
    x = x * leaves["scale"][best].unsqueeze(-1)
    loss = torch.nn.functional.cross_entropy(x @ leaves["head"], run.slots["value:labels"])
    loss.backward()
    torch.testing.assert_close(run.slots["value:l"], loss.detach())
    for name in ("table", "scale", "head"):
        torch.testing.assert_close(run.slots[f"total:{name}"], leaves[name].grad)


def test_equal_groups_hand_on_tensors_instead_of_running_again(transformer):
    graph = transformer(5)
    coarse = coarsen(graph, granularity="layer")
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    groups = [[number_of[name] for name in group.segments] for group in coarse.groups]
    with torch.no_grad():
        found = list(rehearse(index_graph(graph), groups, [g.structure for g in coarse.groups], {1, 6}, CPU))
    assert [number for number, _ in found] == [1, 6]
    assert found[1][1].inputs == ("layers.4.mlp",)
    assert torch.isfinite(found[1][1].slots["value:head"]).all()


@pytest.mark.slow
def test_a_table_has_every_group_and_times_grow_with_work(transformer):
    graph = transformer(3, width=512)
    coarse = coarsen(graph, granularity="layer")
    table = profile_groups(graph, coarse, workers=2, cache=None, options=ProfileOptions(0.2), device_kind="here")
    assert [entry.group for entry in table.entries] == [group.name for group in coarse.groups]
    assert [set(entry.times_ns) for entry in table.entries] == [set(group.flops) for group in coarse.groups]
    assert {entry.device_kind for entry in table.entries} == {"here"}
    assert {entry.origin for entry in table.entries} == {"profiled"}
    layers = [table.find(f"layers.{number}", "here").times_ns for number in range(3)]
    assert layers[0] == layers[1] == layers[2]
    assert sum(layers[0].values()) > 1.5 * sum(table.find("head", "here").times_ns.values()) > 0
    assert table.graph_digest == coarse.graph_digest and "core" in table.hardware
    assert table.notes["measured"].startswith("3 of 3") and table.notes["granularity"] == "layer"


def test_results_are_kept_by_structure_and_workers(transformer, tmp_path):
    def measure(layers, **options):
        graph = transformer(layers)
        return profile_groups(graph, coarsen(graph, granularity="layer"), cache=tmp_path, options=QUICK, **options)

    first = measure(2)
    again = measure(2)
    deeper = measure(4)
    assert again.entries == first.entries and again.notes["measured"].startswith("0 of 3")
    assert deeper.notes["measured"].startswith("0 of 3") and len(deeper.entries) == 6


def test_groups_run_in_turn_and_as_many_together_as_fit(transformer):
    graph = transformer(2)
    coarse = coarsen(graph, granularity="layer")
    with torch.no_grad():
        found = list(candidates(graph, coarse, {group.name for group in coarse.groups[1:]}, CPU))
        order = [(item.name, phase) for item, phase in in_turn(found)]
        times = measure_groups(found, CPU, rounds=3)
    names = [group.name for group in coarse.groups[1:]]
    assert order[:3] == [(name, Phase.F) for name in names]
    assert order[3:5] == [(names[-1], Phase.I), (names[-1], Phase.W)] and order[-1] == (names[0], Phase.W)
    assert {name: set(phases) for name, phases in times.items()} == {item.name: set(item.phases) for item in found}
    assert all(len(samples) == 3 and min(samples) > 0 for phases in times.values() for samples in phases.values())
    sizes = [sum(tensor.untyped_storage().nbytes() for tensor in item.run.slots.values()) for item in found]
    split = [[item.name for item in lot] for lot in _lots(iter(found), sizes[0] + sizes[1])]
    assert split == [names[:2], names[2:]]
    assert [len(lot) for lot in _lots(iter(found), 1)] == [1, 1, 1]
    assert [len(lot) for lot in _lots(iter(found), None)] == [3]


class Queue:
    """A device that a host runs ahead of: launching takes ``launch_ns`` of the host, working ``work_ns`` of the
    device."""

    def __init__(self, launch_ns, work_ns):
        self.launch_ns, self.work_ns, self.host_ns, self.free_ns = launch_ns, work_ns, 0, 0

    def launch(self):
        self.host_ns += self.launch_ns
        self.free_ns = max(self.free_ns, self.host_ns) + self.work_ns

    def event(self):
        queue = self

        class Event:
            def record(self):
                self.at_ns = max(queue.free_ns, queue.host_ns)

            def elapsed_time(self, later):
                return (later.at_ns - self.at_ns) / 1e6

        return Event()

    def synchronize(self):
        self.host_ns = max(self.host_ns, self.free_ns)


@pytest.mark.parametrize(("launch_ns", "work_ns", "wanted"), [(4_000, 9_000, 9_000), (9_000, 4_000, 9_000)])
def test_a_device_s_spans_have_no_gap_that_a_run_has_not(launch_ns, work_ns, wanted):
    """What a kernel takes where it outlasts its launch, the launch where it does not: also for a round's first call,
    which after a wait would have both."""
    queue = Queue(launch_ns, work_ns)
    moments = EventMoments(queue.event, queue.synchronize)
    found = list(timed_rounds([queue.launch] * 3, 25, moments))
    assert found == [pytest.approx([wanted] * 3)] * 25
    moments.together = 1  # as it was: a wait before every round
    spans = list(timed_rounds([queue.launch] * 3, 5, moments))
    assert [max(item) for item in spans] == pytest.approx([launch_ns + work_ns] * 5)


@pytest.mark.slow
def test_known_groups_are_neighbours_of_new_ones_and_stay(transformer, tmp_path):
    """What another model's profile left of a structure is used; the groups it lacks are measured."""
    small = transformer(2)
    first = profile_groups(small, coarsen(small, granularity="layer"), cache=tmp_path, options=QUICK)
    split = coarsen(small, granularity="block")
    again = profile_groups(small, split, cache=tmp_path, options=QUICK)
    ends = [group.name for group in split.groups if group.structure in
            {other.structure for other in coarsen(small, granularity="layer").groups}]
    assert len(ends) == 2 and again.notes["measured"].startswith("2 of 4")
    assert all(again.find(name, "cpu") == first.find(name, "cpu") for name in ends)


def test_a_cache_that_cannot_be_written_or_read_is_no_error(tmp_path):
    samples = [{"F": [1.0]}]
    _remember(Path("/proc/nowhere"), "key", samples)
    assert _recall(Path("/proc/nowhere"), "key") is None
    _remember(tmp_path, "key", samples)
    assert _recall(tmp_path, "key") == samples and _recall(tmp_path, "other") is None
    (tmp_path / "key.json").write_text("{ broken")
    assert _recall(tmp_path, "key") is None


def test_a_group_that_cannot_run_is_one_line(builder):
    builder.linear("a", builder.source("x"))
    builder.linear("b", "a", all_to_all=True)
    graph = builder.graph()
    with pytest.raises((GraphError, RunError), match=r"mipipe\.all_to_all"):
        profile_groups(graph, coarsen(graph, granularity="operator"), cache=None, options=QUICK)


@pytest.mark.parametrize(("options", "message"), [
    ({"workers": 0}, "0 workers; expected at least 1"),
    ({"device": "tpu"}, "device 'tpu' is not available"),
])
def test_impossible_requests_are_refused(transformer, options, message):
    graph = transformer(1)
    with pytest.raises(InputError, match=message):
        profile_groups(graph, coarsen(graph, granularity="layer"), cache=None, **options)


def test_options_must_be_positive():
    with pytest.raises(InputError, match="samples is 0"):
        dataclasses.replace(QUICK, samples=0)
    with pytest.raises(InputError, match="seconds is 0"):
        ProfileOptions(seconds=0)
    assert math.isfinite(ProfileOptions().seconds)
