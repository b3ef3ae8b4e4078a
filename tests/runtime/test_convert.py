"""Conversions of experts through the public path: `mipipe.runtime.convert.launch.convert` and the folders it makes.

Figures are recomputed from the source's tensors in numpy float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mipipe.graphs.converting.decisions import (
    cluster_domains,
    groups_per_layer,
    join_groups,
    kept_fraction,
    low_rank,
    pseudo_groups,
    snake_deal,
)
from mipipe.graphs.errors import InputError
from mipipe.runtime.convert.launch import ConvertResult, convert

transformers = pytest.importorskip("transformers")
EXPERTS, HIDDEN, INNER = 8, 24, 8
TEXT = "".join(f"line {number}: {number * 37 % 101} of {number * number % 89}\n" for number in range(600))
MOE = {"vocab_size": 256, "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 2,
       "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "moe_intermediate_size": INNER,
       "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 64,
       "mlp_only_layers": [], "initializer_range": 0.3}
DENSE = {"vocab_size": 256, "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models ``moe`` (Qwen3-MoE), ``mixtral`` and ``dense`` (Llama), and a text."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    mixtral = {key: value for key, value in MOE.items() if "expert" not in key} | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": INNER}
    for name, config in (("moe", transformers.Qwen3MoeConfig(**MOE)), ("dense", transformers.LlamaConfig(**DENSE)),
                         ("mixtral", transformers.MixtralConfig(**mixtral))):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    write_tokens(folder / "text.jsonl", TEXT)
    return folder


def write_tokens(path: Path, text: str) -> list[list[int]]:
    """A text's bytes as samples of 48 tokens, of which the last is shorter; returns them."""
    rows = [list(text.encode()[start:start + 48]) for start in range(0, 24 * 48 - 10, 48)]
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    return rows


def run(models: Path, out: Path, recipe: Mapping[str, Any]) -> ConvertResult:
    """The conversion of a recipe that lies beside the models."""
    path = models / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(dict(recipe)))
    return convert(path, out)


def loaded(folder: Path) -> Any:
    """The model as a user of transformers loads it, in float64."""
    remote = "auto_map" in json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float64,
                                                              attn_implementation="eager",
                                                              experts_implementation="eager")
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    ids = torch.tensor(list(TEXT.encode()[:96])).view(2, 48)
    with torch.no_grad():
        return loaded(folder)(input_ids=ids).logits


def experts_of(tensors: Mapping[str, torch.Tensor], layer: int, part: str) -> list[np.ndarray]:
    return [np.asarray(tensors[f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"], np.float64)
            for expert in range(EXPERTS)]


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """A copy of a model with changed tensors."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


CALIBRATION = {"data": "text.jsonl", "samples": 24, "length": 48}


# MoLAE (2503.23100)

@pytest.mark.parametrize("latent, rank, grouping",
                         [(8, None, "consecutive"), (5, 3, "consecutive"), (6, None, "similar")])
def test_molae_error_is_the_tail_of_the_stacked_matrices(models: Path, tmp_path: Path, latent: int, rank: int | None,
                                                         grouping: str) -> None:
    result = run(models, tmp_path / "out", {
        "method": "molae", "model": "moe", "group": 4, "latent": latent, "rank": rank, "grouping": grouping,
        "dtype": "float64", "out_dtype": "float64"})
    before, after = load_file(models / "moe/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for layer in range(2):
        figures = result.record["layers"][str(layer)]
        order = figures.get("order", list(range(EXPERTS)))
        assert sorted(order) == list(range(EXPERTS))
        prefix, tail, error, norm = f"model.layers.{layer}.mlp.experts", 0.0, 0.0, 0.0
        shared = np.asarray(after[f"{prefix}.gate_up_latent"])
        for half, part in enumerate(("gate_proj", "up_proj")):
            whole = [experts_of(before, layer, part)[expert] for expert in order]
            norm += sum((item ** 2).sum() for item in whole)
            for group in range(2):
                members = whole[4 * group:4 * group + 4]
                reduced = []
                for item in members:
                    left, values, right = np.linalg.svd(item, full_matrices=False)
                    keep = rank or INNER
                    reduced.append((left[:, :keep] * values[:keep]) @ right[:keep])
                    tail += (values[keep:] ** 2).sum()
                tail += (np.linalg.svd(np.concatenate(reduced), compute_uv=False)[latent:] ** 2).sum()
                base = shared[group, half * latent:(half + 1) * latent]
                assert np.allclose(base @ base.T, np.eye(latent), atol=1e-12)
                for place, item in enumerate(members):
                    own = np.asarray(after[f"{prefix}.{part}"][4 * group + place])
                    error += ((item - own @ base) ** 2).sum()
        assert figures["error"] == pytest.approx(math.sqrt(error / norm), rel=1e-12)
        assert figures["optimal_error"] == pytest.approx(math.sqrt(tail / norm), rel=1e-9)
        assert figures["error"] == pytest.approx(figures["optimal_error"], rel=1e-9 if rank is None else 0.2)
        router = after[f"model.layers.{layer}.mlp.gate.weight"]
        assert torch.equal(router, before[f"model.layers.{layer}.mlp.gate.weight"][order].to(router.dtype))


def test_molae_of_experts_with_a_common_factor_changes_no_output(models: Path, tmp_path: Path) -> None:
    def factored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        for layer in range(2):
            for part in ("gate_proj", "up_proj"):
                for group in range(2):
                    common = torch.randn(3, HIDDEN, generator=generator)
                    for expert in range(4 * group, 4 * group + 4):
                        name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                        tensors[name] = (torch.randn(INNER, 3, generator=generator, dtype=torch.float64)
                                         @ common.double()) / 8
        return {name: item.double() for name, item in tensors.items()}

    rewritten(models / "moe", tmp_path / "factored", factored)
    recipe = {"method": "molae", "model": str(tmp_path / "factored"), "group": 4, "latent": 3, "dtype": "float64"}
    result = run(models, tmp_path / "out", recipe)
    assert all(row["error"] < 1e-14 for row in result.record["layers"].values())
    assert torch.allclose(logits(tmp_path / "out"), logits(tmp_path / "factored"), atol=1e-11)


def test_molae_counts_its_parameters(models: Path, tmp_path: Path) -> None:
    result = run(models, tmp_path / "out", {"method": "molae", "model": "moe", "group": 4})
    assert result.record["gate_up_parameters"] == 2 * (2 * INNER * HIDDEN + EXPERTS * INNER * INNER)
    stored = sum(item.numel() for name, item in load_file(tmp_path / "out/model.safetensors").items()
                 if "gate_up_latent" in name or name.endswith((".gate_proj", ".up_proj")))
    assert stored == 2 * result.record["gate_up_parameters"]


# M-SMoE (2310.01334)

def test_group_numbers_follow_the_global_threshold() -> None:
    assert groups_per_layer([[.5, .3, .2], [.6, .25, .15]], 2) == [2, 2]
    assert groups_per_layer([[.5, .3, .2], [.6, .25, .15]], 3) == [3, 2]  # the least of all values is the threshold
    assert groups_per_layer([[.5, .3, .2], [.6, .25, .15]], 2, whole=[0]) == [3, 1]
    assert groups_per_layer([[.25] * 4], 2) == [1]  # ties at the threshold


def test_experts_join_the_most_similar_leader_with_room() -> None:
    table = np.array([[1, .9, .8, .7], [.9, 1, .1, .2], [.8, .1, 1, .3], [.7, .2, .3, 1.]])
    assert join_groups([.4, .1, .3, .2], table, 2) == [[0, 3, 1], [2]]
    assert join_groups([.4, .1, .3, .2], table, 2, capacity=2) == [[0, 3], [2, 1]]


def permuted_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every expert of a layer made the first one, its units in another order."""
    generator = torch.Generator().manual_seed(2)
    for layer in range(2):
        for expert in range(1, EXPERTS):
            order = torch.randperm(INNER, generator=generator)
            for part in ("gate_proj", "up_proj", "down_proj"):
                place = f"model.layers.{layer}.mlp.experts.{{}}.{part}.weight"
                item = tensors[place.format(0)]
                moved = item[:, order] if part == "down_proj" else item[order]
                tensors[place.format(expert)] = moved.contiguous()
    return tensors


@pytest.mark.parametrize("layout", ["shared", "expanded"])
def test_merging_permuted_copies_changes_no_output(models: Path, tmp_path: Path, layout: str) -> None:
    rewritten(models / "moe", tmp_path / "copies", permuted_copies)
    recipe = {"method": "m_smoe", "model": str(tmp_path / "copies"), "groups": 3, "calibration": CALIBRATION,
              "layout": layout}
    result = run(models, tmp_path / "out", recipe)
    assert any(len(group) > 1 for groups in result.record["groups"].values() for group in groups)
    assert torch.allclose(logits(tmp_path / "out"), logits(tmp_path / "copies"), atol=1e-12)
    assert ("auto_map" in json.loads((tmp_path / "out/config.json").read_text())) == (layout == "shared")
    run(models, tmp_path / "unaligned", {**recipe, "align": False})
    assert not torch.allclose(logits(tmp_path / "unaligned"), logits(tmp_path / "copies"), atol=1e-3)


def test_merged_experts_are_the_usage_weighted_means_of_aligned_ones(models: Path, tmp_path: Path) -> None:
    from scipy.optimize import linear_sum_assignment

    result = run(models, tmp_path / "out", {"method": "m_smoe", "model": "moe", "groups": 4, "calibration": CALIBRATION,
                                            "dtype": "float64", "out_dtype": "float64"})
    before, after = load_file(models / "moe/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert sum(len(groups) for groups in result.record["groups"].values()) in (7, 8)
    for layer in range(2):
        usage, groups = result.record["usage"][str(layer)], result.record["groups"][str(layer)]
        assert sum(usage) == pytest.approx(1)
        parts = {part: experts_of(before, layer, part) for part in ("gate_proj", "up_proj", "down_proj")}
        joined = np.asarray(after[f"model.layers.{layer}.mlp.experts.gate_up_proj"])
        down = np.asarray(after[f"model.layers.{layer}.mlp.experts.down_proj"])
        slots = after[f"model.layers.{layer}.mlp.experts.slots"].tolist()
        for slot, group in enumerate(groups):
            assert [slots[expert] for expert in group] == [slot] * len(group)
            total = sum(usage[expert] for expert in group)
            wanted = [np.zeros((INNER, HIDDEN)), np.zeros((INNER, HIDDEN)), np.zeros((HIDDEN, INNER))]
            for expert in group:
                score = sum(parts[part][group[0]] @ parts[part][expert].T for part in ("gate_proj", "up_proj"))
                score = score + parts["down_proj"][group[0]].T @ parts["down_proj"][expert]
                order = linear_sum_assignment(score, maximize=True)[1]
                share = usage[expert] / total if total else 1 / len(group)
                wanted[0] += share * parts["gate_proj"][expert][order]
                wanted[1] += share * parts["up_proj"][expert][order]
                wanted[2] += share * parts["down_proj"][expert][:, order]
            assert np.allclose(joined[slot], np.concatenate(wanted[:2]), atol=1e-12)
            assert np.allclose(down[slot], wanted[2], atol=1e-12)


def test_usage_counts_every_choice_of_the_model(models: Path, tmp_path: Path) -> None:
    """Against transformers' own router outputs."""
    result = run(models, tmp_path / "out", {"method": "m_smoe", "model": "moe", "calibration": CALIBRATION})
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "moe", attn_implementation="eager").eval()
    totals = [torch.zeros(EXPERTS, dtype=torch.float64) for _ in range(2)]
    for row in write_tokens(tmp_path / "again.jsonl", TEXT):
        with torch.no_grad():
            seen = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
        for total, values in zip(totals, seen, strict=True):
            total += torch.bincount(values.topk(2).indices.flatten(), minlength=EXPERTS)
    for layer, chosen in enumerate(totals):
        assert result.record["usage"][str(layer)] == pytest.approx((chosen / chosen.sum()).tolist())


def test_mixtral_experts_merge_in_both_layouts(models: Path, tmp_path: Path) -> None:
    for layout in ("shared", "expanded"):
        run(models, tmp_path / layout, {"method": "m_smoe", "model": "mixtral", "groups": 2, "layout": layout,
                                        "calibration": CALIBRATION})
    assert torch.allclose(logits(tmp_path / "shared"), logits(tmp_path / "expanded"), atol=1e-10)


OTHERS = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
          "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
          "q_lora_rank": 16, "kv_lora_rank": 8,
          "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "vocab_size": 256,
          "num_experts": 8, "n_routed_experts": 8, "initializer_range": 0.2, "pad_token_id": 0}


@pytest.mark.slow
@pytest.mark.parametrize("host", ["qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"])
def test_other_architectures_convert_alike(models: Path, tmp_path: Path, host: str) -> None:
    """Shared and copied experts give the same, and so does a lossless factorisation."""
    kind = transformers.CONFIG_MAPPING[host]
    fields = {*kind.__dataclass_fields__, *kind.attribute_map}
    known = {key: value for key, value in OTHERS.items() if key in fields}
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(kind(**known)).save_pretrained(tmp_path / "source")
    common = {"model": str(tmp_path / "source")}
    for layout in ("shared", "expanded"):
        run(models, tmp_path / layout, {"method": "m_smoe", "groups": 4, "layout": layout, "calibration": CALIBRATION,
                                        **common})
    run(models, tmp_path / "molae", {"method": "molae", "group": 1, **common})
    assert torch.allclose(logits(tmp_path / "shared"), logits(tmp_path / "expanded"), atol=1e-9)
    assert torch.allclose(logits(tmp_path / "molae"), logits(tmp_path / "source"), atol=1e-5)


# REAM (2604.04356)

def test_leaders_take_the_nearest_in_the_order_of_their_saliency() -> None:
    """By hand: 1 leads before 3; it takes its two nearest though 3 is nearer to one of them."""
    distance = np.array([[0, .5, .9, .1, .9], [.5, 0, .2, .4, .6], [.9, .2, 0, .1, .3], [.1, .4, .1, 0, .7],
                         [.9, .6, .3, .7, 0]])
    saliency = [.1, .9, .2, .8, .3]
    assert pseudo_groups(saliency, distance, 2, 3) == [[1, 2, 0], [3, 4]]
    assert pseudo_groups(saliency, distance, 2, 5) == [[1, 2, 0, 4], [3]]
    assert pseudo_groups(saliency, distance, 4, 2) == [[1, 0], [2], [3], [4]]


@pytest.mark.parametrize("options", [{}, {"align": "weights", "sequential": False},
                                     {"align": "activations", "group_size": 2}, {"align": "none"}])
def test_ream_is_its_formulas(models: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Saliency, groups, matching and means in numpy, from what goes into every block of the merged model itself."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    record = run(models, tmp_path / "out", {"method": "ream", "model": "moe", "groups": 5, "calibration": CALIBRATION,
                                            "dtype": "float64", "out_dtype": "float64", **options}).record
    before, after = load_file(models / "moe/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    seen: dict[int, list[np.ndarray]] = {0: [], 1: []}
    model = loaded(tmp_path / "out" if options.get("sequential", True) else models / "moe")
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _module, inputs, number=number: seen[number].append(inputs[0].detach().numpy()[0]))
    for row in write_tokens(tmp_path / "again.jsonl", TEXT):
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
    assert model.config.num_experts == (5 if options.get("sequential", True) else EXPERTS)

    def unit(value: np.ndarray) -> np.ndarray:
        return value / np.linalg.norm(value, axis=-1, keepdims=True)

    for layer in range(2):
        x = np.concatenate(seen[layer])
        parts = {part: experts_of(before, layer, part) for part in ("gate_proj", "up_proj", "down_proj")}
        router = np.asarray(before[f"model.layers.{layer}.mlp.gate.weight"], np.float64)
        z = x @ router.T
        gates = np.exp(z - z.max(1, keepdims=True))
        gates /= gates.sum(1, keepdims=True)
        best = np.argsort(-gates, 1)[:, :2]
        weights = np.take_along_axis(gates, best, 1)
        weights /= weights.sum(1, keepdims=True)
        inner = [(g := x @ parts["gate_proj"][e].T) / (1 + np.exp(-g)) * (x @ parts["up_proj"][e].T)
                 for e in range(EXPERTS)]
        outputs = [inner[e] @ parts["down_proj"][e].T for e in range(EXPERTS)]
        saliency = np.array([np.mean([weights[t, k] * np.linalg.norm(outputs[e][t])
                                      for t, k in np.argwhere(best == e)]) for e in range(EXPERTS)])
        assert np.allclose(record["saliency"][str(layer)], saliency, rtol=1e-6)  # routers are in float32
        means = unit(np.stack([(gates[:, e, None] * outputs[e]).mean(0) for e in range(EXPERTS)]))
        logits_apart = cdist(unit(z.T), unit(z.T))
        like = ((1 + means @ means.T) / 2 + 1 - logits_apart / logits_apart.max()) / 2
        groups = pseudo_groups(saliency.tolist(), 1 - like, 5, options.get("group_size", 16))
        assert record["groups"][str(layer)] == groups and any(len(group) > 1 for group in groups)
        name = f"model.layers.{layer}.mlp."
        assert np.allclose(after[f"{name}gate.weight"], router[[group[0] for group in groups]])
        for place, group in enumerate(groups):
            total = dict.fromkeys(parts, 0.0)
            for expert in group:
                flat = [unit(np.concatenate([parts["gate_proj"][e], parts["up_proj"][e], parts["down_proj"][e].T], 1))
                        for e in (group[0], expert)]
                cost = np.zeros((INNER, INNER))
                if options.get("align", "both") in ("both", "activations"):
                    cost += cdist(unit(inner[group[0]].T), unit(inner[expert].T))
                if options.get("align", "both") in ("both", "weights"):
                    cost += cdist(*flat)
                order = np.arange(INNER) if options.get("align") == "none" else linear_sum_assignment(cost)[1]
                share = saliency[expert] / saliency[group].sum()
                for part, all_of in parts.items():
                    fitted = all_of[expert][:, order] if part == "down_proj" else all_of[expert][order]
                    total[part] = total[part] + share * fitted
            for part, wanted in total.items():
                assert np.allclose(after[f"{name}experts.{place}.{part}.weight"], wanted, atol=1e-7)


def test_ream_of_permuted_copies_changes_no_output_and_all_groups_single_is_the_model(models: Path, tmp_path: Path
                                                                                      ) -> None:
    run(models, tmp_path / "same", {"method": "ream", "model": "moe", "groups": EXPERTS, "calibration": CALIBRATION})
    assert torch.equal(logits(tmp_path / "same"), logits(models / "moe"))

    rewritten(models / "moe", tmp_path / "copies", permuted_copies)
    for align in ("both", "activations", "weights"):
        run(models, tmp_path / align, {"method": "ream", "model": str(tmp_path / "copies"), "groups": 3,
                                       "calibration": CALIBRATION, "align": align})
        # router weights are in float32, and sum up over other experts
        assert torch.allclose(logits(tmp_path / align), logits(tmp_path / "copies"), atol=1e-5)


def test_ream_refuses_what_an_architecture_cannot_have(models: Path, tmp_path: Path) -> None:
    for options, text in (({"groups": 1}, "groups: found 1, expected 2, the experts per token"),
                          ({"groups": 9}, "groups: found 9"), ({"groups": 3, "group_size": 2}, "expected at least 3")):
        with pytest.raises(InputError, match=text):
            run(models, tmp_path / "out", {"method": "ream", "model": "moe", "calibration": CALIBRATION, **options})


@pytest.mark.slow
@pytest.mark.parametrize("host", ["qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "mixtral"])
def test_ream_takes_other_architectures(models: Path, tmp_path: Path, host: str) -> None:
    """All groups single give the model again, fewer one that runs; experts that are routed in groups are refused."""
    kind = transformers.CONFIG_MAPPING[host]
    fields = {*kind.__dataclass_fields__, *kind.attribute_map}
    known = {key: value for key, value in OTHERS.items() if key in fields}
    for name, groups in (("source", 1), ("grouped", 2)):
        torch.manual_seed(0)
        config = kind(**known | ({"n_group": groups} if "n_group" in known else {}))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    common = {"method": "ream", "calibration": CALIBRATION}
    for name, count in (("whole", 8), ("fewer", 5)):
        run(models, tmp_path / name, {**common, "model": str(tmp_path / "source"), "groups": count})
    assert torch.allclose(logits(tmp_path / "whole"), logits(tmp_path / "source"), atol=1e-9)
    assert bool(logits(tmp_path / "fewer").isfinite().all())
    if "n_group" in known:
        with pytest.raises(InputError, match="routes by 2 groups of neighbouring experts"):
            run(models, tmp_path / "no", {**common, "model": str(tmp_path / "grouped"), "groups": 5})


# MC-SMoE

def test_ranks_and_schedule_of_mc_smoe() -> None:
    assert low_rank(768, 3072, .15) == 93
    assert [kept_fraction(step, 10, 20, .2) for step in (0, 9, 20, 99)] == [1.0, 1.0, .2, .2]
    assert kept_fraction(15, 10, 20, .2) == pytest.approx(.2 + .8 / 8)


def test_compression_that_keeps_all_rows_is_the_merged_model(models: Path, tmp_path: Path) -> None:
    common = {"model": "moe", "groups": 4, "calibration": CALIBRATION}
    run(models, tmp_path / "merged", {"method": "m_smoe", **common})
    run(models, tmp_path / "out", {"method": "mc_smoe", "kept": 1.0, "rank_ratio": 0.3, **common})
    assert torch.allclose(logits(tmp_path / "out"), logits(tmp_path / "merged"), atol=1e-4)


def test_rows_are_kept_by_the_gradient_and_training_lowers_the_loss(models: Path, tmp_path: Path) -> None:
    common = {"method": "mc_smoe", "model": "moe", "groups": 4, "kept": 0.25, "calibration": CALIBRATION}
    bare = run(models, tmp_path / "bare", common).record
    trained = run(models, tmp_path / "trained", {**common, "steps": 12, "lr": 3e-3}).record
    assert bare["rows"] == {"gate_proj": 2, "up_proj": 2, "down_proj": 6} and bare["ranks"]["gate_proj"] == 1
    assert trained["loss"]["end"] < bare["loss"]["end"]
    after = load_file(tmp_path / "bare/model.safetensors")
    assert after["model.layers.0.mlp.experts.gate_proj_sparse"].shape[1:] == (2, HIDDEN)
    assert bool((after["model.layers.0.mlp.experts.down_proj_rows"].diff(dim=1) > 0).all())


# pruning by usage

def test_pruned_experts_are_the_least_used(models: Path, tmp_path: Path) -> None:
    merged = run(models, tmp_path / "merged", {"method": "m_smoe", "model": "moe", "calibration": CALIBRATION})
    usage = merged.record["usage"]
    record = run(models, tmp_path / "out", {"method": "prune_experts", "model": "moe", "keep": 5,
                                            "calibration": CALIBRATION}).record
    before, after = load_file(models / "moe/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 5
    for layer in range(2):
        kept = record["kept"][str(layer)]
        dropped = set(range(EXPERTS)) - set(kept)
        assert min(usage[str(layer)][expert] for expert in kept) >= max(usage[str(layer)][expert] for expert in dropped)
        gate = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(after[gate], before[gate][kept])
        for place, expert in enumerate(kept):
            name = f"model.layers.{layer}.mlp.experts.{{}}.down_proj.weight"
            assert torch.equal(after[name.format(place)], before[name.format(expert)])
    assert logits(tmp_path / "out").isfinite().all()


# DIVE (2506.09351)

def test_dive_keeps_the_channels_that_fluctuate_and_compensates_the_others(models: Path, tmp_path: Path) -> None:
    domains = []
    for number in range(2):
        write_tokens(models / f"domain{number}.jsonl", TEXT[::-1] if number else TEXT)
        domains.append({**CALIBRATION, "data": f"domain{number}.jsonl"})
    run(models, tmp_path / "out", {"method": "dive", "model": "dense", "domains": domains, "experts": 2, "pruned": 0.25,
                                   "dtype": "float64", "out_dtype": "float64"})
    before, after = load_file(models / "dense/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "dense", attn_implementation="eager").eval()
    for number in range(2):
        seen: dict[int, list[np.ndarray]] = {layer: [] for layer in range(3)}
        handles = [model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
            lambda _module, inputs, into=into: into.append(np.asarray(inputs[0][0], np.float64)) or None)
            for layer, into in seen.items()]
        for row in write_tokens(tmp_path / "again.jsonl", TEXT[::-1] if number else TEXT):
            with torch.no_grad():
                model(input_ids=torch.tensor([row]))
        for handle in handles:
            handle.remove()
        for layer, parts in seen.items():
            hidden = np.concatenate(parts)
            down = np.asarray(before[f"model.layers.{layer}.mlp.down_proj.weight"], np.float64)
            score = hidden.var(0) * (down ** 2).sum(0)
            kept = sorted(np.argsort(-score)[:12].tolist())
            block = f"model.layers.{layer}.mlp.experts"
            assert np.allclose(after[f"{block}.down_proj"][number], down[:, kept])
            left = [channel for channel in range(16) if channel not in kept]
            bias = down[:, left] @ hidden.mean(0)[left]
            assert np.allclose(after[f"{block}.down_proj_bias"][number], bias, atol=1e-6)


def test_constant_channels_are_pruned_without_loss() -> None:
    from mipipe.runtime.convert.collect import ChannelMoments
    from mipipe.runtime.convert.from_dense import pruned, scores

    moments = ChannelMoments.of(2)
    for row in ([1., 5.], [3., 5.]):  # in two batches: the variance is that of all tokens
        moments.add(torch.tensor([row]))
    down = torch.tensor([[1., 2.]])
    assert scores(moments, down).tolist() == [1, 0]
    expert, bias = pruned({"gate_proj": torch.eye(2), "up_proj": torch.eye(2), "down_proj": down}, [0], moments.mean)
    assert bias.tolist() == [10] and expert["down_proj"].tolist() == [[1.]]


def test_dive_without_pruning_is_the_dense_model(models: Path, tmp_path: Path) -> None:
    """Gates sum to one, whatever the router does."""
    run(models, tmp_path / "out", {"method": "dive", "model": "dense", "domains": [CALIBRATION] * 3, "experts": 3,
                                   "pruned": 0.0, "experts_per_token": 2})
    assert torch.allclose(logits(tmp_path / "out"), logits(models / "dense"), atol=1e-9)


def test_domains_are_clustered_by_affinity(models: Path, tmp_path: Path) -> None:
    table = np.array([[1., 1.1, 3, 3.2], [1.1, 1, 3.1, 3], [3, 3.2, 1, 1.2], [3.1, 3, 1.1, 1]])
    assert sorted(map(sorted, cluster_domains(table, 2))) == [[0, 1], [2, 3]]
    assert sorted(map(len, cluster_domains(np.ones((3, 3)), 3))) == [1, 1, 1]
    texts = [TEXT, TEXT[::-1], TEXT.replace("line", "lime")]
    for number, text in enumerate(texts):
        write_tokens(models / f"part{number}.jsonl", text)
    record = run(models, tmp_path / "out", {
        "method": "dive", "model": "dense", "experts": 2, "pruned": 0.5,
        "domains": [{**CALIBRATION, "data": f"part{number}.jsonl"} for number in range(3)]}).record
    assert sorted(item for group in record["domains"] for item in group) == [0, 1, 2]
    assert np.shape(record["domain_losses"]) == (3, 3)


# SparseUnifiedModel's adaptation (2512.02351)

def test_the_snake_deal_balances_importance() -> None:
    shared, experts = snake_deal([8, 7, 6, 5, 4, 3, 2, 1], 4)
    assert (shared, experts) == ([], [[0, 7], [1, 6], [2, 5], [3, 4]])
    assert snake_deal(list(range(7, 0, -1)), 3, 0)[0] == [0]  # what fills no row is shared


@pytest.mark.parametrize("shared", [0.0, 0.2])
def test_adaptation_with_all_experts_is_the_dense_model(models: Path, tmp_path: Path, shared: float) -> None:
    run(models, tmp_path / "out", {"method": "moe_adaptation", "model": "dense", "experts": 5, "experts_per_token": 5,
                                   "shared_ratio": shared, "dense_layers": [0], "calibration": CALIBRATION})
    assert torch.allclose(logits(tmp_path / "out"), logits(models / "dense"), atol=1e-9)
    names = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.0.mlp.down_proj.weight" in names and "model.layers.1.mlp.experts.down_proj" in names


# files

def test_an_interrupted_conversion_goes_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mipipe.runtime.convert import molae

    recipe = {"method": "molae", "model": "moe", "group": 4, "latent": 6}
    run(models, tmp_path / "whole", recipe)
    calls, true = [], molae.factorise

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(molae, "factorise", failing)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    again = run(models, tmp_path / "out", recipe)
    assert len(calls) == 9  # the first layer's four were not computed again
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert set(again.record["layers"]) == {"0", "1"}


def test_shards_have_an_index_and_the_folder_its_companions(models: Path, tmp_path: Path) -> None:
    path = models / "sharded.yaml"
    path.write_text(yaml.safe_dump({"method": "molae", "model": "moe", "group": 4, "out_dtype": "bfloat16"}))
    convert(path, tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert {item.name for item in (tmp_path / "out").iterdir() if "safetensors" not in item.name} >= {
        "config.json", "README.md", "mipipe_convert.json", "modeling_mipipe_moe.py", "generation_config.json"}
    made = loaded(tmp_path / "out").generate(torch.tensor([[65, 66]]), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 5)


@pytest.mark.parametrize("recipe, told", [
    ({"model": "moe"}, "has no method; expected one of molae, m_smoe"),
    ({"method": "molea", "model": "moe"}, "method: found 'molea'"),
    ({"method": "molae", "model": "moe", "groups": 4}, "groups: unknown key"),
    ({"method": "molae", "model": "moe", "latent": 100}, "expected at most the hidden size 24"),
    ({"method": "molae", "model": "dense"}, "has no experts"),
    ({"method": "molae", "model": "nowhere"}, "no such folder"),
    ({"method": "m_smoe", "model": "moe"}, "calibration"),
    ({"method": "m_smoe", "model": "moe", "groups": 9, "calibration": CALIBRATION}, "found 9, expected at most 8"),
    ({"method": "m_smoe", "model": "moe", "whole_layers": [7], "calibration": CALIBRATION}, "layer 7 has no experts"),
    ({"method": "m_smoe", "model": "moe", "calibration": {"data": "absent.txt"}}, "absent.txt: no such file"),
    ({"method": "m_smoe", "model": "moe", "calibration": {"data": "text.jsonl", "length": 1}}, "length: found 1"),
    ({"method": "m_smoe", "model": "moe", "calibration": {"samples": 2}}, "has no data"),
    ({"method": "m_smoe", "model": "moe", "calibration": {"data": "my.module:texts"}}, "--loader my.module:texts"),
    ({"method": "prune_experts", "model": "moe", "keep": 1, "calibration": CALIBRATION}, "keep: found 1, expected 2"),
    ({"method": "dive", "model": "moe", "experts": 1, "domains": [CALIBRATION]}, "has experts already"),
    ({"method": "dive", "model": "dense", "domains": [CALIBRATION]}, "at least one for each of the 8"),
    ({"method": "moe_adaptation", "model": "dense", "calibration": CALIBRATION}, "found 32, expected at most 16"),
    ({"method": "mc_smoe", "model": "moe", "kept": 2, "calibration": CALIBRATION}, "kept 2.0"),
])
def test_wrong_recipes_are_one_line(models: Path, tmp_path: Path, recipe: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        run(models, tmp_path / "out", recipe)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe, told", [
    ({"method": "m_smoe", "groups": 9}, "expected at most 8"), ({"method": "mc_smoe", "whole_layers": [7]}, "layer 7"),
    ({"method": "prune_experts", "keep": 1}, "keep: found 1")])
def test_what_does_not_fit_is_refused_before_the_model_runs(models: Path, tmp_path: Path, recipe: dict[str, Any],
                                                            told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mipipe.runtime.convert import collect

    def ran(*_arguments: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(collect, "run_layers", ran)
    monkeypatch.setattr(collect, "load_model", ran)
    with pytest.raises(InputError, match=told):
        run(models, tmp_path / "out", {"model": "moe", "calibration": CALIBRATION, **recipe})


def test_layers_that_predict_further_ahead_are_left_out(models: Path, tmp_path: Path) -> None:
    """As stored with DeepSeek-V3 and GLM-4-MoE: after the layers that the config counts, with experts of their own."""
    rewritten(models / "moe", tmp_path / "source", lambda tensors: {
        **tensors, **{name.replace("layers.1.", "layers.2."): item.clone() for name, item in tensors.items()
                      if "layers.1." in name}})
    recipe = {"method": "m_smoe", "groups": 4, "calibration": CALIBRATION}
    plain = run(models, tmp_path / "plain", {**recipe, "model": "moe"})
    result = run(models, tmp_path / "out", {**recipe, "model": str(tmp_path / "source")})
    assert result.record["groups"] == plain.record["groups"]
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("plain", "out")]
    assert names[0] == names[1]
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_config_without_sizes_is_refused(models: Path, tmp_path: Path) -> None:
    rewritten(models / "moe", tmp_path / "source", dict)
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "vocab_size": None}))
    with pytest.raises(InputError, match="has no vocab_size"):
        run(models, tmp_path / "out", {"method": "molae", "model": str(tmp_path / "source")})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
