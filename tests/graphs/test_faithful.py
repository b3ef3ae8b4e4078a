"""A captured graph is its model, gradients included: what Python does to them is kept, or refused with its line."""

from __future__ import annotations

import re
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_autograd as own
import pytest
import torch
from graph_checks import assert_same_step
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils.checkpoint import checkpoint

from mipipe.graphs.capture import verify as verifying
from mipipe.graphs.capture.model import capture, capture_module
from mipipe.graphs.capture.verify import seeded_by_shape
from mipipe.graphs.coarse.coverage import warnings_of
from mipipe.graphs.coarse.totals import attended_pairs, flops_per_token, headline
from mipipe.graphs.costs.summary import graph_summary
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operators.dense_attention import bias_of
from mipipe.graphs.tracing.compose import parameter_tensors, run_step


@pytest.mark.parametrize("name", own.KEPT)
def test_what_a_model_does_to_its_gradients_is_kept(name: str) -> None:
    """Loss and all gradients equal eager autograd's, on a module that capture leaves as it was."""
    module, batch = own.KEPT[name](), own.batch()
    before = {key: item.clone() for key, item in module.state_dict().items()}
    graph = capture_module(module, batch)
    for key, item in module.state_dict().items():
        assert torch.equal(item, before[key]), key
    assert all(item.grad is None for item in module.parameters())
    with seeded_by_shape():
        step = run_step(graph, parameter_tensors(graph, before), batch)
        loss = module(**batch)
        loss.backward()
    assert step.outputs[graph.loss].item() == pytest.approx(loss.item(), rel=1e-12)
    expected = {key: item.grad for key, item in module.named_parameters() if item.grad is not None}
    assert set(step.gradients) == set(expected)
    for key, grad in expected.items():
        assert (step.gradients[key] - grad).norm() <= 1e-12 * grad.norm(), key


@pytest.mark.parametrize("name", own.REFUSED)
def test_what_a_graph_cannot_say_is_refused_with_its_line(name: str) -> None:
    make, message = own.REFUSED[name]
    with pytest.raises(GraphError, match=message) as caught:
        capture_module(make(), own.batch())
    assert "\n" not in str(caught.value)


def test_a_module_keeps_no_tensor_of_an_export() -> None:
    module = own.model(own.maps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture_module(module, own.batch(), verify=False)
    assert "shown" not in module.__dict__ and "shown" not in module.second.__dict__
    capture_module(module, own.batch(), verify=True)


def test_an_export_leaves_torch_as_it_was() -> None:
    """Also after a refusal: what it exchanges in torch is put back."""
    def look() -> tuple[Any, ...]:
        return (Function.__dict__["apply"].__func__.__code__, Tensor.register_hook,
                Tensor.register_post_accumulate_grad_hook, torch.autograd._engine_run_backward,
                torch.autograd.graph.saved_tensors_hooks.__enter__, sys.getprofile())

    before = look()
    for name in ("function bound early", "hook"):
        capture_module(own.KEPT[name](), own.batch(), verify=False)
    for name in ("gradients in the forward", "hook on a node", "random"):
        with pytest.raises(GraphError):
            capture_module(own.REFUSED[name][0](), own.batch(), verify=False)
    assert look() == before


class Checkpointed(nn.Module):
    """Reentrant checkpoints right on the data, where PyTorch gives the layers no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3)
        self.spare = nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return nn.functional.cross_entropy(self.head(x), y)


def test_parameters_without_gradient_and_parts_left_out_are_named() -> None:
    module, batch = Checkpointed(), {"x": torch.randn(5, 4), "y": torch.randint(0, 3, (5,))}
    graph = capture_module(module, batch)
    assert_same_step(graph, module, batch, module(**batch), rtol=1e-6)
    first, second, third = warnings_of(graph)
    assert "test_faithful.py" in first and "use_reentrant=False" in first
    assert second.startswith("spare (25 parameters in 2 tensors) is no part of the graph")
    assert third.startswith("layers (40 parameters in 4 tensors) has requires_grad but gets no gradient")


def test_a_loss_without_gradient_is_refused() -> None:
    module = own.model()
    with pytest.raises(GraphError, match="its loss 'loss' has no gradient for any of the 7 parameters that train"):
        capture_module(module, own.batch(), loss=lambda out, inputs: out.detach())


class Awkward(nn.Module):
    """What eager autograd does without complaint, and a verification that is careless does not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.head = kind, nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("scale", torch.rand(1, 4).expand(5, 4) if kind == "expanded" else torch.ones(4))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        if self.kind == "nested":
            x = x["a"] + x["b"][1]
        if self.kind == "in place":
            x.mul_(2)
        x = self.first(x) * self.scale
        if self.kind == "not finite":  # the gradient of a square root below 0, times 0
            x = torch.where(x > 0, x.sqrt(), 0)
        return nn.functional.cross_entropy(self.head(x), y)


@pytest.mark.parametrize("kind", ["expanded", "nested", "in place", "not finite"])
def test_a_verification_is_no_more_particular_than_eager_autograd(kind: str) -> None:
    """Buffers that cannot be written, inputs that the forward changes or that are nested, gradients NaN on both
    sides: the model is verified, and no reason is made up why it is not."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    inputs = {"x": {"a": x, "b": [x, x + 1]} if kind == "nested" else x, "y": y}
    before = x.clone()
    graph = capture_module(Awkward(kind), inputs, verify=True)
    assert not warnings_of(graph) and torch.equal(x, before)


def damaged(graph: Any, factor: float) -> Any:
    """The graph with every gradient of its first linear layer's weight times a factor."""
    traces = []
    for trace in graph.traces:
        operators = tuple(replace(item, args=[item.args[0], item.args[1] * factor])
                          if item.kind == "aten.mul.Tensor" and item.args[1] == 0.1 else item
                          for item in trace.operators)
        traces.append(replace(trace, operators=operators, digest=f"{trace.digest}-{factor}"))
    names = {old.digest: new.digest for old, new in zip(graph.traces, traces, strict=True)}
    segments = tuple(replace(item, trace=names[item.trace]) for item in graph.segments)
    return replace(graph, traces=tuple(traces), segments=segments)


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.05, False), (9.0, False)])
def test_verification_finds_a_gradient_that_is_off(factor: float, right: bool) -> None:
    """A graph in which one gradient is scaled differs, by name; the untouched one does not."""
    module, batch = own.KEPT["hook"](), own.batch()
    graph = damaged(capture_module(module, batch, verify=False), factor)
    wrapped = Wrapped(module)
    if right:
        verifying.verify(graph, wrapped, batch)
        return
    with pytest.raises(GraphError, match=r"differs from eager autograd: first\.(weight|bias) is off by") as caught:
        verifying.verify(graph, wrapped, batch)
    assert "second" not in str(caught.value) and "head" not in str(caught.value)


class Wrapped(nn.Module):
    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.wrapped(**inputs)}


def test_verification_that_cannot_run_is_a_warning_or_an_error_if_asked_for() -> None:
    module = nn.Linear(2, 1, device="meta")
    batch, loss = {"input": torch.randn(3, 2, device="meta")}, lambda out, inputs: out.square().mean()
    graph = capture_module(module, batch, loss=loss)
    assert warnings_of(graph) == ["not verified against eager autograd: the module has no values (meta device)"]
    with pytest.raises(GraphError, match="cannot be verified: the module has no values"):
        capture_module(module, batch, loss=loss, verify=True)
    assert warnings_of(capture_module(module, batch, loss=loss, verify=False)) == []


class Mixed(nn.Module):
    """Half-precision layers, a head in float32, and a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 3)
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.body(x.to(self.body.weight.dtype)).float()
        x = torch.fft.irfft(torch.fft.rfft(x) * self.phase.to(torch.complex64), n=4)
        return nn.functional.cross_entropy(self.head(x.to(self.head.weight.dtype)).float(), y)


@pytest.mark.parametrize(("asked", "dtypes"), [
    (None, ("bfloat16", "float32", "complex64")), ("float64", ("float64", "float64", "complex128")),
    ("bfloat16", ("bfloat16", "bfloat16", "complex64"))])
def test_a_factory_keeps_its_dtypes_unless_asked(monkeypatch: pytest.MonkeyPatch, asked: str | None,
                                                 dtypes: tuple[str, ...]) -> None:
    space = types.ModuleType("mixed_models")
    space.make = lambda: (Mixed(), {"x": torch.randn(5, 4), "y": torch.randint(0, 3, (5,))})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mixed_models", space)
    graph = capture("mixed_models:make", dtype=asked)
    found = {item.fqn: item.spec.dtype for item in graph.parameters}
    assert (found["body.weight"], found["head.weight"], found["phase"]) == dtypes
    assert warnings_of(graph) == []


@pytest.mark.slow
def test_real_weights_are_verified_where_a_folder_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    seen: list[Tensor] = []
    original = verifying.eager_step

    def watched(module: nn.Module, *rest: Any) -> verifying.LossAndGradients:
        seen.append(module.wrapped.lm_head.weight.detach().clone())  # type: ignore[union-attr]
        return original(module, *rest)

    monkeypatch.setattr(verifying, "eager_step", watched)
    capture(tmp_path, seq=8, verify=True)
    assert seen and torch.equal(seen[0], model.lm_head.weight)


@pytest.mark.parametrize(("queries", "keys", "causal", "window"), [
    (5, 5, True, 0), (5, 5, True, 3), (3, 7, True, 0), (7, 3, True, 0), (6, 6, False, 2), (4, 6, False, 0),
    (1, 9, True, 4)])
def test_pairs_that_attention_computes(queries: int, keys: int, causal: bool, window: int) -> None:
    """Counted from the mask that the attention operator itself makes."""
    bias = bias_of(torch.zeros(1, 1, queries, 2), torch.zeros(1, 1, keys, 2), None, causal, window)
    seen = queries * keys if bias is None else int((bias == 0).sum())
    assert attended_pairs(queries, keys, causal, window) == seen


@pytest.mark.slow
def test_active_parameters_and_both_ways_of_counting_attention() -> None:
    """Two of four experts a token; half of a causal square and its diagonal."""
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 4, "num_experts": 4,
             "num_experts_per_tok": 2}
    graphs = [capture("Qwen3MoeForCausalLM", overrides=sizes, seq=8, expert_groups=groups) for groups in (1, 2)]
    for graph in graphs:
        summary = graph_summary(graph)
        assert summary["parameters"] - summary["active_parameters"] == 2 * 2 * 3 * 8 * 4
        assert summary["flops_per_token"] == 3 * summary["flops"]["F"] / 8
        assert summary["flops_per_token_full_attention"] == 3 * summary["flops_full_attention"]["F"] / 8
        pairs = 2 * 2 * 2 * (8 * 8 - 8 * 9 // 2)  # multiply-adds, layers, heads
        assert summary["flops_full_attention"]["F"] - summary["flops"]["F"] == pairs * (4 + 4)
        assert summary["flops_full_attention"]["I"] - summary["flops"]["I"] == pairs * (3 * 4 + 2 * 4)
    both = r".* kflop{} \(.* kflop with causal attention in full\)"
    assert re.search(rf"1\.78 k parameters, 1\.40 k active; {both.format(' per token of training')}; a microbatch: F"
                     rf" {both.format('')}, I", headline(graphs[0]))


LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
QWEN = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "seq", "published", "sizes"), [
    ("LlamaForCausalLM", 8192, 51.5, {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                      "num_attention_heads": 32}),
    ("LlamaForCausalLM", 8192, 449.2, {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672,
                                       "num_hidden_layers": 80, "num_attention_heads": 64}),
    ("LlamaForCausalLM", 4096, 432.5, {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672,
                                       "num_hidden_layers": 80, "num_attention_heads": 64}),
    ("LlamaForCausalLM", 8192, 2524, {**LLAMA, "hidden_size": 16384, "intermediate_size": 53248,
                                      "num_hidden_layers": 126, "num_attention_heads": 128}),
    ("Qwen3MoeForCausalLM", 4096, 23.0, {**QWEN, "hidden_size": 2048, "moe_intermediate_size": 768,
                                         "num_hidden_layers": 48, "num_attention_heads": 32}),
    ("Qwen3MoeForCausalLM", 4096, 148.0, {**QWEN, "hidden_size": 4096, "moe_intermediate_size": 1536,
                                          "num_hidden_layers": 94, "num_attention_heads": 64}),
    ("DeepseekV3ForCausalLM", 4096, 249.7, {}),
    ("DeepseekV3ForCausalLM", 4096, 204.4, {"vocab_size": 163840, "n_routed_experts": 384, "first_k_dense_replace": 1,
                                            "num_attention_heads": 64, "num_key_value_heads": 64, "n_group": 1,
                                            "topk_group": 1})])
def test_flops_per_token_are_those_that_others_publish(architecture: str, seq: int, published: float,
                                                       sizes: dict[str, Any]) -> None:
    """NVIDIA's and torchtitan's model flops per token of Llama 3, Qwen3 MoE, DeepSeek-V3 and Kimi-K2, within 1 %."""
    pytest.importorskip("transformers")
    graph = capture(architecture, overrides=sizes, seq=seq)
    assert (flops_per_token(graph) or 0) / 1e9 == pytest.approx(published, rel=0.01)
