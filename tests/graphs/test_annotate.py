"""Segments are tagged by their names; users correct tags by a file of patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipipe.graphs.capture.annotate import DEFAULT, Patterns, annotate, load_patterns, tag
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph, Role, Segment, SegmentTrace, Tags

TRACE = SegmentTrace("0", (), (), (), (), {}, (), (), {}, (), (), ())


def graph(*names: str) -> OperatorGraph:
    return OperatorGraph("m", (), (), "", tuple(Segment(name, name, "0", (), ()) for name in names), (), (), (TRACE,))


@pytest.mark.parametrize(("name", "layer", "role", "branch"), [
    ("model.embed_tokens", None, Role.EMBEDDING, None),
    ("model.layers.12.self_attn", 12, Role.ATTENTION, None),
    ("model.layers.3.mlp", 3, Role.MLP, None),
    ("model.layers.3.mlp.router", 3, Role.ROUTER, None),
    ("model.layers.3.mlp.shared_experts", 3, Role.SHARED_EXPERTS, None),
    ("model.layers.3.mlp.combine", 3, Role.COMBINE, None),
    ("model.vision_tower.encoder.layers.5.mlp", 5, Role.MLP, "vision"),
    ("model.multi_modal_projector", None, Role.OTHER, "projector"),
    ("transformer.h.7.attn", 7, Role.ATTENTION, None),
    ("lm_head", None, Role.HEAD, None),
])
def test_names_of_common_models(name: str, layer: int | None, role: Role, branch: str | None) -> None:
    assert tag(name) == Tags(layer, branch, role)


def test_expert_groups_are_numbered() -> None:
    assert tag("model.layers.3.mlp.experts.group2") == Tags(3, None, Role.EXPERTS, 2)


def test_the_rest_is_text_where_branches_exist() -> None:
    made = annotate(graph("vision.blocks.0", "projector", "embed", "layers.0.mlp"))
    assert [segment.tags.branch for segment in made.segments] == ["vision", "projector", "text", "text"]
    assert {segment.tags.branch for segment in annotate(graph("embed", "layers.0.mlp")).segments} == {None}
    assert {segment.tags.branch for segment in annotate(graph("vit.blocks.0", "classifier")).segments} == {"vision"}


def test_a_projector_alone_is_no_branch() -> None:
    """A speech classifier's projector, say: there is nothing that it projects between."""
    made = annotate(graph("layers.0.mlp", "projector", "classifier"))
    assert {segment.tags.branch for segment in made.segments} == {None}
    named = annotate(graph("layers.0.mlp", "projector"), Patterns(branches={"projector": "projector"}))
    assert [segment.tags.branch for segment in named.segments] == [None, "projector"]


def test_a_branch_that_the_user_names_is_not_spread() -> None:
    made = annotate(graph("stack.0", "stack.1"), Patterns(branches={r"stack\.0": "audio"}))
    assert [segment.tags.branch for segment in made.segments] == ["audio", None]


def test_users_patterns_win(tmp_path: Path) -> None:
    path = tmp_path / "patterns.yaml"
    path.write_text("roles: {'tower\\.\\d+$': mlp}\nbranches: {tower: audio}\nlayers: ['tower\\.(\\d+)']\n")
    assert tag("tower.4", (load_patterns(path), DEFAULT)) == Tags(4, "audio", Role.MLP)


@pytest.mark.parametrize("text", ["rolls: {}", "roles: {x: no_such_role}", "roles: {'(': mlp}"])
def test_bad_patterns(tmp_path: Path, text: str) -> None:
    path = tmp_path / "patterns.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"patterns\.yaml"):
        load_patterns(path)
