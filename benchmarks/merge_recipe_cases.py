"""The recipes that `merge_recipes.py` gives to mipipe and to mergekit, and why some results differ by design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYERS = 6
WORDS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A recipe over checkpoints of a family, where ``{name}`` of a model is its folder. ``reason``: why results differ
    by design; ``check`` says of both results and of the inputs whether that is all."""

    name: str
    family: str
    recipe: dict[str, Any]
    reason: str = ""
    check: Callable[[Weights, Weights, dict[str, Weights]], bool] | None = None
    chained: list[dict[str, Any]] = field(default_factory=list)


# Recipes --------------------------------------------------------------------------------------------------------------


def models(*names: str, **values: list[Any]) -> list[dict[str, Any]]:
    """Models by name, with the values that each has of its own."""
    return [{"model": f"{{{name}}}", "parameters": {key: value[place] for key, value in values.items()}}
            for place, name in enumerate(names)]


def stacked(*pieces: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": f"{{{name}}}", "layer_range": [first, last]}]} for name, first, last in pieces]


WEIGHT = {"weight": [0.6, 0.4]}
WHOLE = [{"sources": [{"model": f"{{{name}}}", "layer_range": [0, LAYERS]} for name in ("one", "two")]}]
BASED: dict[str, Any] = {"base_model": "{base}"}
GRADIENT = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5}]
MASKS = "random masks: each program draws its own; both keep the expected share of entries, and the norm"


def keeps(density: float) -> Callable[[Weights, Weights, dict[str, Weights]], bool]:
    """Whether both results leave about as many entries at the base as a density says, and move as far in all."""

    def check(ours: Weights, theirs: Weights, given: dict[str, Weights]) -> bool:
        shares, norms = [], []
        for result in (ours, theirs):
            norms.append(sum(float((value - given["base"][name]).abs().sum()) for name, value in result.items()))
            moved = sum(int((value != given["base"][name]).sum()) for name, value in result.items())
            shares.append(moved / sum(value.numel() for value in result.values()))
        return all(abs(share - density) < 0.01 for share in shares) and abs(norms[0] / norms[1] - 1) < 0.01

    return check


def cases() -> list[Case]:
    """Every recipe."""
    found = [
        # mergekit's examples
        Case("examples/linear", "llama", {"merge_method": "linear", "models": models("one", "two", "three",
                                                                                     weight=[1.0, 0.3, 0.5])}),
        Case("examples/gradient-slerp", "llama", {
            "merge_method": "slerp", "base_model": "{one}", "parameters": {"t": GRADIENT},
            "slices": WHOLE}),
        Case("examples/orcamini-platy-44layer", "llama", {
            "merge_method": "passthrough", "slices": stacked(("one", 0, 4), ("two", 2, 6))}),
        Case("examples/bio-merge", "mistral", {
            **BASED, "merge_method": "ties", "models": models("one", "two", density=[0.5, 0.5], weight=[0.5, 0.5]),
            "parameters": {"normalize": 0.0, "int8_mask": 1.0}}),
        Case("examples/ties", "llama", {
            **BASED, "merge_method": "ties", "parameters": {"normalize": True, "int8_mask": True},
            "models": models("one", "two", density=[[1, 0.7, 0.1], 0.5], weight=[1.0, [0, 0.3, 0.7, 1]])}),
        Case("examples/ties, density 0.33 and filters", "llama", {
            **BASED, "merge_method": "ties", "parameters": {"normalize": True},
            "models": models("one", "two", density=[0.5, 0.33], weight=[0.5, [{"filter": "mlp", "value": 0.5},
                                                                            {"value": 0}]])}),
        Case("examples/mega", "llama", {
            **BASED, "merge_method": "ties", "parameters": {"normalize": True, "int8_mask": True},
            "models": [{"model": "{first}", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
                       {"model": "{three}", "parameters": {"density": 0.33, "weight": [
                           {"filter": "mlp", "value": 0.5}, {"value": 0}]}}]},
             chained=[{"name": "first", "merge_method": "slerp", "base_model": "{one}", "parameters": {"t": GRADIENT},
                       "slices": WHOLE}]),
        Case("modules: default", "llama", {"merge_method": "linear", "modules": {"default": {
            "models": models("one", "two", **WEIGHT), "parameters": {"normalize": True}}}}),
        Case("slices: base_model, residual_weight", "llama", {
            "merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, "slices": [
                {"base_model": {"model": {"path": "{base}"}}, "residual_weight": 0.5,
                 "sources": [{"model": "{base}", "layer_range": [0, 3]}, {"model": "{one}", "layer_range": [0, 3]}]},
                {"base_model": "{three}",
                 "sources": [{"model": "{three}", "layer_range": [3, 6]}, {"model": "{two}", "layer_range": [3, 6]}]},
            ]}),
        Case("slices: gradients of a part", "llama", {
            "merge_method": "slerp", "base_model": "{one}", "parameters": {"t": [0, 1]}, "slices": [
                {"sources": [{"model": "{one}", "layer_range": [1, 5]}, {"model": "{two}", "layer_range": [1, 5]}]}]}),
        Case("tokenizer_source: base", "llama", {
            **BASED, "merge_method": "linear", "models": models("base", "two", **WEIGHT), "tokenizer_source": "base"},
             "rows beyond the tokenizer: mergekit cuts the table to its tokens, here they stay; equal in all others",
             same_rows),
        Case("tokenizer: union, with rows of single tokens", "llama", {
            **BASED, "merge_method": "linear", "models": models("base", "one", **WEIGHT),
            "tokenizer": {"source": "union", "pad_to_multiple_of": 32, "tokens": {
                "<|new|>": {"source": {"kind": "model_token", "model": "{one}", "token": "c"}},
                "<|nil|>": {"source": {"kind": "zero"}}, "b": {"source": "{one}", "force": True}}}},
             "padding rows: the mean of all rows, of rows with a token in mergekit; equal in all others", same_tokens),
        Case("parameters of other methods", "llama", {
            "merge_method": "linear", "models": models("one", "two", **WEIGHT, density=[0.5, 0.5]),
            "parameters": {"int8_mask": True, "lambda": 0.5}}),
        *conventions(),
    ]
    for family in ("llama", "mistral", "qwen2", "qwen3_moe", "mixtral"):
        found += methods_of(family)
    return found + assemblies()


def conventions() -> list[Case]:
    """What recipes mean where it is easily meant otherwise: whose values count, for which layer, with which base."""
    def piece(*sources: tuple[Any, ...], weight: Any = None) -> dict[str, Any]:
        """A slice of layers ``[first, last)`` of sources, some with a weight of their own, or one weight for all."""
        own = [{"parameters": {"weight": source[3]}} if len(source) > 3 else {} for source in sources]
        return {"sources": [{"model": f"{{{source[0]}}}", "layer_range": list(source[1:3]), **values}
                            for source, values in zip(sources, own, strict=True)],
                **({"parameters": {"weight": weight}} if weight else {})}

    by_level = [piece(("one", 0, 3, [{"filter": "mlp", "value": 0.2}]), ("two", 0, 3),
                      weight=[{"filter": "self_attn", "value": [0.5, 3]}]),
                piece(("one", 0, 3), ("three", 3, 6, [0, 1]))]
    own_layers = piece(("one", 2, 5, [{"filter": "layers.3.", "value": 0.2}, {"value": 1}]),
                       ("two", 0, 3, [{"filter": "layers.2.", "value": 5}, {"value": 0.5}]))
    pair, rescaled = models("one", "two", **WEIGHT), {"density": 0.3, "rescale": True}
    return [
        Case("slices of one layer, gradient", "llama", {
            "merge_method": "slerp", "base_model": "{one}", "parameters": {"t": [0, 0.3, 1]},
            "slices": [piece(("one", layer, layer + 1), ("two", layer, layer + 1)) for layer in range(LAYERS)]}),
        Case("values of sources, slices, recipe", "llama", {"merge_method": "linear", "parameters": {"weight": 1.0},
                                                            "slices": by_level}),
        Case("filters of a source's own layers", "llama", {"merge_method": "linear", "slices": [own_layers]}),
        Case("filters of the result's layers", "llama", {
            "merge_method": "slerp", "base_model": "{one}", "parameters": {"t": [{"filter": "layers.2.", "value": 0.9},
                                                                                 {"filter": "*", "value": 0.1}]},
            "slices": [piece(("one", 2, 5), ("two", 0, 3)), piece(("one", 0, 1), ("two", 5, 6))]}),
        Case("filter for a tied head", "qwen2", {
            "merge_method": "slerp", "base_model": "{one}", "models": models("one", "two"),
            "parameters": {"t": [{"filter": "lm_head", "value": 0.7}, {"filter": "embed_tokens", "value": 0.2},
                                 {"value": 0.5}]}}),
        Case("linear, base_model and a weight for all", "llama", {
            **BASED, "merge_method": "linear", "models": models("one", "two"), "parameters": {"weight": 0.5}}),
        Case("linear, base_model and slices", "llama", {**BASED, "merge_method": "linear", "slices": [
            piece(("one", 0, 3), ("two", 3, 6), weight=[0.3, 0.6])]}),
        Case("karcher, base_model", "llama", {**BASED, "merge_method": "karcher", "models": models("one", "two")}),
        Case("karcher, base_model and slices", "llama", {**BASED, "merge_method": "karcher",
                                                         "slices": [piece(("one", 0, 3), ("two", 0, 3))]}),
        *(Case(f"{method}, rescale", "llama", {**BASED, "merge_method": method, "models": pair, "parameters": rescaled})
          for method in ("ties", "breadcrumbs", "breadcrumbs_ties")),
        *(Case(f"breadcrumbs, density {density:g}, gamma 0.1", "llama", {
            **BASED, "merge_method": "breadcrumbs", "models": pair, "parameters": {"density": density, "gamma": 0.1}})
          for density in (1.0, 0.95)),
        *(Case(f"nuslerp by columns{', of task vectors' if base else ''}", "llama", {
            **base, "merge_method": "nuslerp", "models": pair,
            "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}) for base in ({}, BASED)),
        Case("ties, a negative weight", "llama", {**BASED, "merge_method": "ties", "models": models(
            "one", "two", weight=[0.5, -0.7], density=[0.4, 0.6])}),
        Case("sce of small changes", "llama", {**BASED, "merge_method": "sce",
                                               "models": models("near-one", "near-two")},
             "mean squares of task vectors below 1e-6: weights here, equal ones in mergekit; each follows its rule",
             small_changes),
        Case("task_arithmetic, weights that cancel", "llama", {
            **BASED, "merge_method": "task_arithmetic", "parameters": {"normalize": True},
            "models": models("one", "two", weight=[0.5, -0.5])}),
    ]


def methods_of(family: str) -> list[Case]:
    """One recipe for every method."""
    pair, three = models("one", "two", **WEIGHT), models("one", "two", "three")
    bank = family in ("qwen3_moe", "mixtral")
    per_bank = ("statistics of stacked experts: one for each expert here, one for a whole bank in mergekit; equal in"
                " all other tensors") if bank else ""

    def based(method: str, models_: list[dict[str, Any]], reason: str = "", check: Any = None, **values: Any) -> Case:
        return Case(method, family, {**BASED, "merge_method": method, "models": models_, "parameters": values},
                    reason, check)

    def elsewhere(case: Case) -> Case:
        return Case(case.name, case.family, case.recipe, case.reason or per_bank, case.check or
                    (outside_experts if bank else None))

    def lean(density: float) -> list[dict[str, Any]]:
        return models("one", "two", **WEIGHT, density=[density, density])

    return [
        Case("linear", family, {"merge_method": "linear", "models": pair}),
        elsewhere(Case("slerp", family, {"merge_method": "slerp", "base_model": "{one}", "models": models("one", "two"),
                                         "parameters": {"t": 0.4}})),
        elsewhere(Case("nuslerp", family, {"merge_method": "nuslerp", "models": pair})),
        elsewhere(Case("nuslerp of task vectors", family, {**BASED, "merge_method": "nuslerp", "models": pair})),
        Case("nuslerp, not flattened", family, {"merge_method": "nuslerp", "models": pair,
                                                "parameters": {"nuslerp_flatten": False}}),
        elsewhere(Case("karcher", family, {"merge_method": "karcher", "models": three})),
        elsewhere(Case("multislerp", family, {"merge_method": "multislerp", "models": models(
            "one", "two", "three", weight=[1.0, 0.5, 0.2])})),
        elsewhere(based("multislerp of task vectors", models("one", "two", "three", weight=[1.0, 0.5, 0.2]))),
        Case("passthrough", family, {"merge_method": "passthrough", "models": models("one")}),
        based("task_arithmetic", pair, **{"lambda": 0.7}),
        elsewhere(based("ties", lean(0.5))),
        based("dare_linear, density 1", lean(1.0)),
        based("dare_ties, density 1", lean(1.0)),
        based("dare_linear, density 0.5", [models("one", weight=[1.0], density=[0.5])[0]], MASKS, keeps(0.5)),
        based("dare_ties, density 0.5", [models("one", weight=[1.0], density=[0.5])[0]], MASKS, keeps(0.5)),
        based("della, density 1", lean(1.0)),
        based("della, density 0.5", [models("one", weight=[1.0], density=[0.5])[0]], MASKS, keeps(0.5)),
        based("della_linear, density 0.5", [models("one", weight=[1.0], density=[0.5])[0]], MASKS, keeps(0.5)),
        elsewhere(based("breadcrumbs", models("one", "two", **WEIGHT, density=[0.5, 0.5], gamma=[0.02, 0.05]))),
        elsewhere(based("breadcrumbs_ties", models("one", "two", **WEIGHT, density=[0.5, 0.9], gamma=[0.02, 0.05]))),
        elsewhere(based("sce", three, select_topk=0.3)),
        elsewhere(based("model_stock", three)),
        based("model_stock, filter_wise", three, filter_wise=True),
        elsewhere(based("arcee_fusion", models("one"))),
        based("nearswap", models("one"), t=0.01),
        based("ram", three),
        elsewhere(based("ramplus_tl", three)),
    ]


def same_rows(ours: Weights, theirs: Weights, _given: dict[str, Weights]) -> bool:
    """Whether results agree in all rows that both have."""
    return all(float((value[:len(theirs[name])] - theirs[name]).abs().max()) < 1e-5 for name, value in ours.items())


def same_tokens(ours: Weights, theirs: Weights, _given: dict[str, Weights]) -> bool:
    """Whether results agree in the rows of the union's tokens: the words, one added by a model, two by the recipe."""
    count = len(WORDS) + 3
    return all(float((value[:count] - theirs[name][:count]).abs().max()) < 1e-5 if "norm" not in name and
               value.shape[0] == 32 else torch.allclose(value, theirs[name], atol=1e-5) for name, value in ours.items())


def small_changes(ours: Weights, theirs: Weights, given: dict[str, Weights]) -> bool:
    """Whether SCE's result is that of weights by squares (arXiv 2408.07990), and mergekit's that of equal ones."""
    for name, base in given["base"].items():
        deltas = torch.stack([given[model][name] - base for model in ("near-one", "near-two")]).double()
        agreed = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        squares = deltas.square().flatten(1).mean(1)
        for found, weight in ((ours, squares / squares.sum()), (theirs, torch.full((2,), 0.5, dtype=torch.float64))):
            share = weight.reshape(-1, *[1] * base.dim()) * agreed
            expected = base + (deltas * share).sum(0) / share.sum(0).clamp_min(1e-12)
            if float((found[name] - expected).abs().max()) > 1e-6 * float(base.abs().max()):
                return False
    return True


def outside_experts(ours: Weights, theirs: Weights, _given: dict[str, Weights]) -> bool:
    """Whether results agree in all tensors but the experts'."""
    return all(float((value - theirs[name]).abs().max()) < 1e-5 for name, value in ours.items()
               if ".experts." not in name)


def assemblies() -> list[Case]:
    """mergekit-moe's gate modes and targets."""
    def experts(prompts: bool) -> list[dict[str, Any]]:
        words = (("a b c", "d e"), ("x y z", "u v"))
        return [{"source_model": f"{{{name}}}", **({"positive_prompts": [good], "negative_prompts": [bad]}
                                                   if prompts else {})}
                for name, (good, bad) in zip(("one", "two"), words, strict=True)]

    def near(ours: Weights, theirs: Weights, _given: dict[str, Weights]) -> bool:
        """Experts equal to the last bit, routers by cosine: mergekit runs the base in bfloat16."""
        for name, value in ours.items():
            if "gate.weight" in name or "expert_gate" in name:
                if float(torch.nn.functional.cosine_similarity(value, theirs[name], dim=-1).min()) < 0.9995:
                    return False
            elif not torch.equal(value, theirs[name]):
                return False
        return True

    bf16 = "routers: cosine above 0.9995 in every row (mergekit runs the base in bfloat16); all other tensors equal"
    found = [Case(f"moe {mode}", "llama", {"base_model": "{base}", "gate_mode": mode, "dtype": "float32",
                                           "experts": experts(True)}, "" if mode == "cheap_embed" else bf16, near)
             for mode in ("hidden", "hidden_avg", "hidden_last", "cheap_embed")]
    shared = {"shared_experts": [{"source_model": "{two}", "residual_scale": 0.1, "positive_prompts": ["m n"]}]}
    plain = {"shared_experts": [{"source_model": "{two}", "residual_scale": 0.1}]}
    found += [
        Case("moe Qwen2, shared expert", "qwen2", {"base_model": "{base}", "gate_mode": "cheap_embed", "dtype":
                                                   "float32", "experts": experts(True), **shared}),
        Case("moe Qwen3", "qwen3", {"base_model": "{base}", "gate_mode": "cheap_embed", "dtype": "float32",
                                    "experts": experts(True)}),
        Case("moe DeepSeek, shared expert", "llama", {
            "base_model": "{base}", "gate_mode": "cheap_embed", "dtype": "float32", "architecture": "deepseek",
            "experts": experts(True), **plain}),
    ]
    return found
