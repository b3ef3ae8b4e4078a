"""Divisions of tensors, the recipe of tensor mode, and what members' programs compute and send."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mipipe.graphs.capture.model import capture, capture_module
from mipipe.graphs.coarse.mode_rows import mode_rows, undivided
from mipipe.graphs.errors import GraphError, InputError
from mipipe.graphs.models.loss import shifted
from mipipe.graphs.modes import Layout
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.operators.collectives import part_of, whole_of
from mipipe.graphs.serialize import save
from mipipe.graphs.sharding.modes import member_program, settle_shared, with_modes
from mipipe.graphs.sharding.parts import WHOLE, divided, fits, local_shape, reshaped, units

COLLECTIVES = {f"mipipe.{name}.default": name for name in ("all_reduce", "all_gather", "reduce_scatter",
                                                           "exchange_parts")}
"""The operator kinds that send something."""

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 64}
MOE = {**TEXT, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
COLUMNS, ROWS = divided(0), divided(1)


@pytest.fixture(scope="module")
def llama():
    return capture("LlamaForCausalLM", seq=8, batch=4, dtype="float64", overrides=TEXT, verify=False)


@pytest.fixture(scope="module")
def moe():
    return capture("Qwen3MoeForCausalLM", seq=8, batch=4, dtype="float64", overrides=MOE, verify=False)


def program(graph, name, mode="tensor", size=2):
    """The trace of the first segment whose name ends so, and its member's program."""
    trace = graph.trace(next(item for item in graph.segments if item.name.endswith(name)))
    return trace, member_program(graph, trace, mode, size)


def collectives(made, phase):
    """The kinds of a phase's collectives, in order."""
    return [COLLECTIVES[op.kind] for op in made.trace.phase_operators(phase) if op.kind in COLLECTIVES]


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


SECTIONS = st.sampled_from([1, 2, 3, (2, 1), (1, 3), (2, 1, 1)])


@given(shapes, SECTIONS, st.sampled_from([2, 4]), st.data())
def test_parts_put_together_are_the_whole(shape, sections, size, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= units(sections) * size
    x = torch.arange(math.prod(shape)).view(shape)
    parts = [part_of(x, member, size, dim, sections) for member in range(size)]
    assert all(tuple(part.shape) == local_shape(shape, divided(dim, sections), size) for part in parts)
    assert torch.equal(whole_of(parts, dim, sections), x)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4), SECTIONS, st.data())
def test_a_view_is_divided_where_the_tensor_is(shape, sections, data):
    """`reshaped` is right: each member's part, viewed, is its part of the view."""
    size, dim = 2, data.draw(st.integers(0, len(shape) - 1))
    part = divided(dim, sections)
    assume(fits(shape, part, size))
    factors = [prime for length in shape for prime in ([2] * (length.bit_length() - 1) if length != 3 else [3])]
    target = [1]
    for factor in factors:
        if data.draw(st.booleans()):
            target.append(factor)
        else:
            target[-1] *= factor
    found = reshaped(shape, target, part, size)
    x = torch.arange(math.prod(shape)).view(shape)
    if found is not None:
        for member in range(size):
            mine = part_of(x, member, size, dim, sections).reshape(local_shape(target, found, size))
            assert torch.equal(mine, part_of(x.view(target), member, size, found.dim, found.sections))


def test_what_a_view_cannot_keep():
    assert reshaped([4, 6], [24], divided(0), 2) == divided(0)
    assert reshaped([4, 6], [24], divided(1), 2) == divided(0, 4)  # one section for each row
    assert reshaped([24], [4, 6], divided(0, 4), 2) == divided(1)
    assert reshaped([6, 4], [3, 8], divided(0), 2) is None  # a member's 3 rows of 4 are 1.5 of 8


def test_the_known_layouts_are_found(llama):
    """Megatron's: heads, gate and up by columns, down and output by rows, table and head by vocabulary."""
    wanted = {"embed_tokens": {"p_weight": COLUMNS}, "lm_head": {"p_weight": COLUMNS},
              "self_attn": {"p_q_proj_weight": COLUMNS, "p_k_proj_weight": COLUMNS, "p_v_proj_weight": COLUMNS,
                            "p_o_proj_weight": ROWS},
              "mlp": {"p_gate_proj_weight": COLUMNS, "p_up_proj_weight": COLUMNS, "p_down_proj_weight": ROWS}}
    assert {name: dict(program(llama, name)[1].given) for name in wanted} == wanted


@pytest.mark.parametrize("source, overrides", [
    pytest.param("LlamaForCausalLM", TEXT, marks=pytest.mark.slow), ("Qwen3MoeForCausalLM", MOE)])
def test_the_recipe_agrees_with_the_plan_that_transformers_ships(llama, moe, source, overrides):
    """Wherever `base_model_tp_plan` says columns or rows of a matrix, so does the recipe."""
    transformers = pytest.importorskip("transformers")
    graph = llama if source.startswith("Llama") else moe
    plan = getattr(transformers, source).config_class.base_model_tp_plan
    checked = 0
    for pattern, style in plan.items():
        if style in ("colwise", "rowwise"):
            block, _, name = pattern.removeprefix("layers.*.").partition(".")
            found = [item for item in graph.segments if item.name.endswith(f"layers.0.{block}")]
            for segment in found:
                if f"{segment.name}.{name}.weight" in segment.parameters:
                    made = program(graph, segment.name)[1]
                    assert made.given[f"p_{name}_weight"] == (COLUMNS if style == "colwise" else ROWS)
                    checked += 1
    assert checked >= 4


@pytest.mark.parametrize("mode, size", [("tensor", 4), ("batch", 2), *(pytest.param(*pair, marks=pytest.mark.slow) for
                                        pair in itertools.product(("sequence", "context"), (2, 4)))])
def test_flops_are_divided_exactly(llama, mode, size):
    for trace in llama.traces:
        made = member_program(llama, trace, mode, size).trace
        for phase in Phase:
            assert made.flops(phase) * size == trace.flops(phase)


def test_experts_are_divided_exactly(moe):
    """By expert, or every expert's matrices; the two matrices in one tensor each by itself."""
    for mode in ("expert", "tensor"):
        trace, made = program(moe, "experts", mode, 4)
        assert [made.trace.flops(phase) * 4 for phase in Phase] == [trace.flops(phase) for phase in Phase]
    assert dict(program(moe, "experts", "tensor")[1].given) == {"p_gate_up_proj": divided(1, 2),
                                                                "p_down_proj": divided(2)}
    assert dict(program(moe, "experts", "expert")[1].given) == {"p_gate_up_proj": COLUMNS, "p_down_proj": COLUMNS}
    assert not program(moe, "router")[1].given  # too small


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_a_block_sums_once_each_way(llama, name):
    """One all-reduce in F, one in I however many projections read the block's input, and none for W to wait for."""
    made = program(llama, name)[1]
    assert [collectives(made, phase) for phase in Phase] == [["all_reduce"], ["all_reduce"], []]
    reduced = next(op for op in made.trace.phase_operators(Phase.I) if op.kind == "mipipe.all_reduce.default")
    reads = {source for op in made.trace.phase_operators(Phase.W) for source in op.inputs}
    assert reduced.name not in reads


@pytest.mark.parametrize("name", [pytest.param("self_attn", marks=pytest.mark.slow), "mlp"])
def test_sequences_are_gathered_and_scattered(llama, name):
    """In F gathered before, scattered after; in W the input once more, so that only a part of it is kept."""
    trace, made = program(llama, name, "sequence", 4)
    assert [collectives(made, phase) for phase in Phase] == [["all_gather", "reduce_scatter"]] * 2 + [["all_gather"]]
    size = {item.name: item.num_bytes for item in trace.saved if item.source is Phase.F}
    assert sum(item.num_bytes for item in made.trace.saved if item.source is Phase.F) * 4 <= sum(size.values()) * 1.05


class Unnormed(torch.nn.Module):
    """A block whose input three matrices read with no norm between, one of them through interleaved pairs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(32, 64, bias=False) for _ in range(3))
        self.down = torch.nn.Linear(64, 32, bias=False)

    def forward(self, x):
        pairs = self.b(x).view(*x.shape[:-1], 8, 8)
        turned = torch.stack((-pairs[..., 1::2], pairs[..., ::2]), -1).flatten(-2)
        return x + self.down(torch.relu(self.a(x)) * (pairs + turned).flatten(-2) * torch.relu(self.c(x)))


class Unnormeds(torch.nn.Module):
    """Three such blocks and a loss."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Unnormed(), Unnormed(), Unnormed()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("mode, sends", [("tensor", [["all_reduce"], ["all_reduce"], []]), (
    "sequence", [["all_gather", "reduce_scatter"], ["all_gather", "reduce_scatter"], ["all_gather"]])])
def test_a_block_without_a_norm_sums_once_each_way(mode, sends):
    """Gradients of an input by several matrices and by the residual are added up before one sum over the members, of a
    residual that each has a part of, too; pairs side by side are divided with their heads."""
    graph = capture_module(Unnormeds(), {"x": torch.zeros(4, 16, 32)}, granularity="layer")
    made = program(graph, "layers.1", mode, 4)[1]
    assert [collectives(made, phase) for phase in Phase] == sends
    assert sum(name.startswith("p_") for name in made.given) == 4


def test_no_logits_are_gathered(llama):
    """Vocabulary-parallel cross-entropy: what crosses the team beside the input's gradient is a number per row."""
    _, made = program(llama, "lm_head", "tensor", 4)
    rows = 4 * 8
    for op in made.trace.operators:
        if op.kind.startswith("mipipe.all_"):
            assert math.prod(op.outputs[0].shape) in (rows, 1, 4 * 8 * 32)


class Predicts(torch.nn.Module):
    """A table, a head and a loss of the next token, with the last row of logits cut off or its label ignored."""

    def __init__(self, cut):
        super().__init__()
        self.cut, self.table, self.head = cut, torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64, bias=False)

    def forward(self, ids):
        logits = self.head(self.table(ids))
        logits, labels = (logits[:, :-1], ids[:, 1:]) if self.cut else (logits, shifted(ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")}


@pytest.mark.parametrize("width, whole", [(32, ()), (16, ("what has no gradient is not divided along the sequence",))])
def test_frozen_segments_are_divided_along_the_sequence_as_those_that_train(width, whole):
    """Where their activations are of the shape that those have; else each member has all, with a reason that is not one
    of its sizes."""
    sizes = (24, width, width, 32, 32)
    model = torch.nn.Sequential(*itertools.starmap(torch.nn.Linear, itertools.pairwise(sizes)))
    model[:2].requires_grad_(False)
    graph = capture_module(model, {"input": torch.zeros(2, 8, 24)}, loss=lambda output, inputs: output.square().sum(),
                           granularity="module")
    trace, made = program(graph, "1", "context", 4)
    assert made.whole == whole and trace.flops(Phase.F) == (1 if whole else 4) * made.trace.flops(Phase.F)


@pytest.mark.parametrize("cut", [False, True])
def test_context_members_have_rows_of_logits_each(cut):
    """Table and head whole, each member with its own positions, and no logits sent, but where rows do not divide: then
    all are gathered, and a line says so."""
    graph = capture_module(Predicts(cut), {"ids": torch.zeros(2, 8, dtype=torch.int64)}, granularity="module")
    traces = [program(graph, name, "context", 4) for name in ("table", "head")]
    assert not any(name.startswith("p_") for _, made in traces for name in made.given)
    sent = {op.outputs[0].shape for _, made in traces for op in made.trace.operators if op.kind in COLLECTIVES}
    assert sent == ({(2, 8, 64)} if cut else {()})
    lookup, = (op for op in traces[0][1].trace.operators if op.kind == "aten.embedding.default")
    assert lookup.outputs[0].shape == (2, 2, 32)
    trace, made = traces[1]
    assert [trace.flops(phase) / made.trace.flops(phase) for phase in Phase] == ([4, 1, 4] if cut else [4, 4, 4])
    assert [line.partition(",")[0] for line in made.whole] == ["7 of 8 positions do not divide by 4 members"] * cut


def test_fewer_key_heads_than_members(llama):
    """Query heads are divided, keys and values whole, and the reason is said."""
    trace, made = program(llama, "self_attn", "tensor", 8)
    assert made.given == {"p_q_proj_weight": COLUMNS, "p_o_proj_weight": ROWS}
    assert made.whole == ("keys and values: 4 heads do not divide by 8 members",)
    matrix = 2 * 32 * 32 * 32
    work = {op.kind: op.flops for op in made.trace.phase_operators(Phase.F) if op.flops and "attention" in op.kind}
    assert 8 * work["mipipe.attention.default"] == sum(
        op.flops for op in trace.operators if op.kind == "mipipe.attention.default")
    assert made.trace.flops(Phase.F) == work["mipipe.attention.default"] + 2 * matrix // 8 + 2 * matrix // 2


def test_odd_sizes_stay_whole_with_a_reason(llama):
    trace, made = program(llama, "self_attn", "tensor", 3)
    assert not made.given and made.whole[0] == "attention: 8 heads do not divide by 3 members"
    assert made.trace.flops(Phase.F) == trace.flops(Phase.F)
    assert "no size of [64, 32] divides by 3" in program(llama, "lm_head", "tensor", 3)[1].whole[0]


class Adapted(torch.nn.Module):
    """A frozen MLP whose second matrix has a low-rank part that trains."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)
        self.requires_grad_(False)
        self.a, self.b = torch.nn.Linear(32, 2, bias=False), torch.nn.Linear(2, 128, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x) + self.b(self.a(x))))


class Tower(torch.nn.Module):
    """Two such layers and a loss."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Adapted(), Adapted()])

    def forward(self, x):
        return {"loss": self.layers[1](self.layers[0](x)).square().mean()}


def test_low_rank_parts_follow_their_matrix():
    """The narrow matrix stays whole, the wide one is divided as the frozen matrix beside it; no sum in F but one."""
    graph = capture_module(Tower(), {"x": torch.zeros(16, 32)}, granularity="layer")
    made = program(graph, "layers.0")[1]
    assert made.given == {"p_up_weight": COLUMNS, "p_up_bias": COLUMNS, "p_down_weight": ROWS, "p_b_weight": COLUMNS}
    assert collectives(made, Phase.F) == ["all_reduce"] and made.trace.has(Phase.W)


def test_what_segments_share_lies_in_one_way():
    """A tied table that the head cannot divide (a loss it does not know) stays whole in the embedding too."""
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(64, 32)
            self.head = torch.nn.Linear(32, 64, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return {"loss": torch.cumsum(self.head(self.embed(ids)), -1).softmax(-1).square().sum()}

    graph = capture_module(Tied(), {"ids": torch.zeros(4, 8, dtype=torch.int64)}, granularity="module")
    assert len(graph.traces) > 1
    parts = set()
    settled = settle_shared(graph, "tensor", 2)
    for trace in graph.traces:
        made = member_program(graph, trace, "tensor", 2, settled.get(trace.digest))
        parts |= {made.given.get(name, WHOLE) for name in trace.parameters}
    assert len(parts) == 1


def test_profiles_of_a_graph(llama, tmp_path):
    """Every block and mode has a row; layouts, memory and reasons are in it; the file grows by little."""
    graph = with_modes(llama, ["tensor", "sequence", "batch"], [4])
    rows = mode_rows(graph, 4)
    assert [row["mode"] for row in rows] == ["one device", "tensor", "sequence", "batch"] * len(graph.traces)
    block = next(row for row in rows if row["block"].endswith("layers.0.mlp"))
    tensor, sequence, batch = rows[rows.index(block) + 1:][:3]
    assert block["alike"] == 2 and tensor["F_gflop"] * 4 == block["F_gflop"]
    assert tensor["F_sends"] == "AR 8.19 kB" and batch["F_sends"] == ""
    assert (sequence["takes"], sequence["gives"], batch["takes"]) == ("sequence", "sequence", "batch")
    profile = graph.modes.find(program(llama, "layers.0.mlp")[0].digest, "batch", 4)
    assert profile.inputs == (Layout.BATCH,) and profile.resident.summed == profile.resident.trainable_dense
    save(llama, tmp_path / "plain.json")
    save(graph, tmp_path / "modes.json")
    assert (tmp_path / "modes.json").stat().st_size < 2 * (tmp_path / "plain.json").stat().st_size
    assert undivided(graph, 4) == []
    with pytest.raises(InputError, match="found those for 4 members in the graph"):
        mode_rows(graph, 8)


@pytest.mark.parametrize("mode, size, message", [("tensr", 2, "expected one of tensor"), ("tensor", 1, "at least 2")])
def test_unknown_modes_and_teams_of_one(llama, mode, size, message):
    with pytest.raises(GraphError, match=message):
        member_program(llama, llama.traces[0], mode, size)
