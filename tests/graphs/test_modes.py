"""Modes as data: the graph file holds them under one key, and nothing else about the graph changes."""

import json
from dataclasses import replace

import pytest

from mipipe.graphs.errors import GraphError, InputError
from mipipe.graphs.modes import (
    Collective,
    CollectiveKind,
    GraphModes,
    KeptBytes,
    Layout,
    ModeProfile,
    ParameterPart,
    PhaseWork,
    Resident,
)
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.serialize import digest, load, save


def profile(of, /, **changes):
    """A profile of a trace of the handmade linear model."""
    work = PhaseWork(100, 200, 3, 0, collectives=(Collective(CollectiveKind.ALL_REDUCE, "tensor", 128),))
    made = ModeProfile(of.digest, "tensor", {"tensor": 2}, (Layout.REPLICATED,), (Layout.REPLICATED,),
                       (ParameterPart(2, 1, "tensor"),), Resident(128, 0, 128), KeptBytes(fw=32), {Phase.F: work})
    return replace(made, **changes)


def test_a_graph_file_with_modes_is_read_as_it_was_written(transformer, tmp_path):
    plain = transformer(2)
    trace = next(item for item in plain.traces if len(item.inputs) == 1)
    graph = replace(plain, modes=GraphModes((profile(trace),)))
    save(graph, tmp_path / "graph.json")
    found = load(tmp_path / "graph.json", OperatorGraph)
    assert found == graph
    assert found.modes.find(trace.digest, "tensor", 2).phases[Phase.F].collectives[0].num_bytes == 128
    assert found.modes.find(trace.digest, "tensor", 4) is None
    assert found.modes.teams == (("tensor", 2),)


def test_modes_leave_the_digest_and_files_without_them_alone(transformer, tmp_path):
    """Plans carry the graph's digest: adding modes must not make them unfit."""
    plain = transformer(1)
    graph = replace(plain, modes=GraphModes((profile(plain.traces[0]),)))
    assert digest(graph) == digest(plain)
    save(plain, tmp_path / "graph.json")
    assert "modes" not in json.loads((tmp_path / "graph.json").read_text())
    assert load(tmp_path / "graph.json", OperatorGraph).modes is None


@pytest.mark.parametrize("changes, message", [
    ({"trace": "0" * 16}, "has no such trace"), ({"mode": "x"}, "expected one of the modes tensor, sequence"),
    ({"inputs": ()}, "has 0 inputs, 1 outputs and 1 parameters")])
def test_profiles_that_do_not_fit_their_trace_are_refused(transformer, tmp_path, changes, message):
    plain = transformer(1)
    graph = replace(plain, modes=GraphModes((profile(plain.traces[0], **changes),)))
    save(graph, tmp_path / "graph.json")
    with pytest.raises(GraphError, match=message):
        load(tmp_path / "graph.json", OperatorGraph)


def test_another_version_of_modes_is_refused(transformer, tmp_path):
    plain = transformer(1)
    save(replace(plain, modes=GraphModes((profile(plain.traces[0]),))), tmp_path / "graph.json")
    data = json.loads((tmp_path / "graph.json").read_text())
    data["modes"]["version"] = 2
    (tmp_path / "graph.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="modes"):
        load(tmp_path / "graph.json", OperatorGraph)
