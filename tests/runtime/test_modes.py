"""Each segment in each mode: the members of a team together compute what one process computes, to rounding."""

import itertools
from pathlib import Path

import pytest
import runtime_equal as equal
import torch

from mipipe.graphs.capture.model import capture
from mipipe.graphs.errors import RunError
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.serialize import save
from mipipe.graphs.sharding.modes import member_program
from mipipe.graphs.tracing.trace import build_phase, phase_signature
from mipipe.runtime.engine.compiling.team import team_operators

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).parent / "runtime_modes.py")
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64}
MOE = {**TEXT, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
BY_NAME = {
    "llama": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "moe": ("Qwen3MoeForCausalLM", MOE),
    "shared": ("Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 32}),
    "vit": ("ViTForImageClassification", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                          "intermediate_size": 64, "image_size": 8, "patch_size": 4, "num_labels": 8}),
}
"""Llama with tied tables and fewer key heads than members; routed and shared experts; an encoder with biases."""
ALL = ("tensor", "sequence", "batch", "expert", "context")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: name of a model -> its graph file in float64 and its batch file, if random inputs will not do."""
    folder, found = tmp_path_factory.mktemp("modes"), {}

    def make(name):
        if name not in found:
            graph, batch = folder / f"{name}.json", None
            if name in BY_NAME:
                source, overrides = BY_NAME[name]
                save(capture(source, seq=8, batch=4, dtype="float64", overrides=overrides, verify=False), graph)
            else:
                case = equal.case(name)
                save(case.graph, graph)
                batch = folder / f"{name}.pt"
                torch.save({key: item for key, item in case.batch(1).items() if key in case.graph.inputs}, batch)
            found[name] = str(graph), None if batch is None else str(batch)
        return found[name]

    return make


def check(pool, made, name, members, modes):
    graph, batch = made(name)
    answers = pool.run(members, WORKER, "compare_modes", graph, modes, batch, 8 if name == "vit" else 64, timeout=240)
    assert {mode for mode, _ in answers[0]} == set(modes)
    wrong = {key: error for answer in answers for key, error in answer.items() if not error <= 1e-12}
    assert not wrong


@pytest.mark.parametrize("name, modes", [
    ("llama", ("sequence",)), pytest.param("moe", ("tensor", "expert"), marks=pytest.mark.slow)])
def test_two_members(pool, made, name, modes):
    check(pool, made, name, 2, modes)


def check_step(pool, made, name, members, modes):
    graph, batch = made(name)
    answers = pool.run(members, WORKER, "compare_step", graph, modes, batch, 8 if name == "vit" else 64, timeout=240)
    wrong = {mode: error for answer in answers for mode, error in answer.items() if not error <= 1e-12}
    assert not wrong


@pytest.mark.slow
def test_a_whole_step(pool, made):
    """The loss and all gradients of a model, segment after segment on the team."""
    check_step(pool, made, "vlm-lora", 2, ("sequence",))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_NAME, "skip", "vlm", "vlm-frozen", "llama-frozen"])
def test_whole_steps(pool, made, name):
    check_step(pool, made, name, 4 if name in BY_NAME else 2, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("name, members", list(itertools.product(
    [*BY_NAME, "skip", "vlm", "vlm-frozen", "vlm-lora"], (2, 4))))
def test_every_mode(pool, made, name, members):
    check(pool, made, name, members, ALL)


def test_a_program_does_not_run_on_another_team():
    """A team without the program's axis, or of another size, is named before anything is sent."""
    graph = equal.case("llama").graph
    programs = (member_program(graph, trace, "tensor", 2) for trace in graph.traces)
    program = next(item for item in programs if any(op.kind == "mipipe.all_reduce.default"
                                                    for op in item.trace.phase_operators(Phase.F)))
    names, _ = phase_signature(program.trace, Phase.F)
    specs = program.trace.specs
    with pytest.raises(RunError, match=r"for tensor=2, but this team has no axes"):
        build_phase(program.trace, Phase.F, "cpu", team_operators({}))(
            *[torch.zeros(specs[name].shape, dtype=getattr(torch, specs[name].dtype)) for name in names])
