"""Recipes of mergekit's documentation, and one for each of its methods, run by mipipe and by mergekit.

    python benchmarks/merge_recipes.py                          # all, about six minutes of one core
    python benchmarks/merge_recipes.py --only slerp ties        # recipes whose names hold a word
    python benchmarks/merge_recipes.py --environment ~/.cache/mergekit

Small synthetic float32 checkpoints (Llama, Mistral, tied Qwen2, Qwen3-MoE, Mixtral; a base and three models each) with
tokenizers are written to a temporary folder; a recipe is one text that both programs read. The table has the largest
difference between the two results over all tensors, in float32's steps at the tensor's largest weight; ``equal`` is at
most 8 of them. Every other row has a reason, which is checked on the two results: equal tensors outside the experts,
the expected share of entries kept, routers by their cosine.

mergekit (LGPL-3.0) is a peer, never a dependency: it is installed into an environment of its own and run there as its
own commands (``mergekit-yaml``, ``mergekit-moe``); nothing of it is imported here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import merge_vs_mergekit
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from mipipe.graphs.errors import MipipeError
from mipipe.runtime.merge.launch import MergeOptions, merge

LAYERS, EQUAL = 6, 8.0
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


# Checkpoints ----------------------------------------------------------------------------------------------------------


def families() -> dict[str, Any]:
    """transformers' configs by family."""
    import transformers

    small = {"vocab_size": 32, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": False,
             "bos_token_id": 0, "eos_token_id": 1}
    return {"llama": transformers.LlamaConfig(**small), "mistral": transformers.MistralConfig(**small),
            "qwen2": transformers.Qwen2Config(**{**small, "tie_word_embeddings": True}),
            "qwen3": transformers.Qwen3Config(**small),
            "qwen3_moe": transformers.Qwen3MoeConfig(**small, num_experts=4, num_experts_per_tok=2,
                                                     moe_intermediate_size=32, decoder_sparse_step=1,
                                                     mlp_only_layers=[]),
            "mixtral": transformers.MixtralConfig(**small, num_local_experts=4)}


def write_models(root: Path) -> None:
    """A base and three models of every family: the base's weights with noise of a tenth of their size."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family, config in families().items():
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for value in base.parameters():
                value.add_(0.1 * torch.randn_like(value))
            start = {name: value.clone() for name, value in base.named_parameters()}
            for number, name in enumerate(("base", "one", "two", "three")):
                torch.manual_seed(100 + number)
                for own, value in base.named_parameters():
                    value.copy_(start[own] + (0.02 * torch.randn_like(value) if number else 0))
                base.save_pretrained(root / family / name)
                write_tokenizer(root / family / name, ["<|one|>"] if name == "one" else [])


def write_tokenizer(folder: Path, more: list[str]) -> None:
    """A tokenizer of single letters; ``more`` are added tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(WORDS)}, merges=[], unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": more}) if more else None
    made.save_pretrained(folder)


# Recipes --------------------------------------------------------------------------------------------------------------


def models(*names: str, **values: list[Any]) -> list[dict[str, Any]]:
    """Models by name, with the values that each has of its own."""
    return [{"model": f"{{{name}}}", "parameters": {key: value[place] for key, value in values.items()}}
            for place, name in enumerate(names)]


def stacked(*pieces: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": f"{{{name}}}", "layer_range": [first, last]}]} for name, first, last in pieces]


WEIGHT = {"weight": [0.6, 0.4]}
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
            "slices": [{"sources": [{"model": "{one}", "layer_range": [0, LAYERS]},
                                    {"model": "{two}", "layer_range": [0, LAYERS]}]}]}),
        Case("examples/orcamini-platy-44layer", "llama", {
            "merge_method": "passthrough", "slices": stacked(("one", 0, 4), ("two", 2, 6))}),
        Case("examples/bio-merge", "mistral", {
            **BASED, "merge_method": "ties", "models": models("one", "two", density=[0.5, 0.5], weight=[0.5, 0.5]),
            "parameters": {"normalize": False, "int8_mask": True}}),
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
                       "slices": [{"sources": [{"model": "{one}", "layer_range": [0, LAYERS]},
                                               {"model": "{two}", "layer_range": [0, LAYERS]}]}]}]),
        # a modules section, and keys of slices
        Case("modules: default", "llama", {"merge_method": "linear", "modules": {"default": {
            "models": models("one", "two", **WEIGHT), "parameters": {"normalize": True}}}}),
        Case("slices: base_model, residual_weight", "llama", {
            "merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, "slices": [
                {"base_model": "{base}", "residual_weight": 0.5,
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
    ]
    for family in ("llama", "mistral", "qwen2", "qwen3_moe", "mixtral"):
        found += methods_of(family)
    return found + assemblies()


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


# Running --------------------------------------------------------------------------------------------------------------

DRIVER = """
import json, sys, traceback
from click import Context
from mergekit.scripts.run_yaml import main as run_yaml
from mergekit.scripts.moe import main as run_moe
for job in json.load(open(sys.argv[1])):
    try:
        for command, file, out in job["steps"]:
            main = run_moe if command == "mergekit-moe" else run_yaml
            main.main([file, out, "--quiet"] if main is run_yaml else [file, out], standalone_mode=False)
        print("DONE " + json.dumps([job["name"], ""]), flush=True)
    except BaseException as error:
        print("DONE " + json.dumps([job["name"], f"{type(error).__name__}: {error}"]), flush=True)
"""
"""Runs mergekit's commands one after another, in its environment, so that its libraries are imported once."""


def text_of(data: Any, root: Path, family: str, first: Path | None) -> Any:
    """A recipe with folders in place of names."""
    if isinstance(data, dict):
        return {key: text_of(value, root, family, first) for key, value in data.items()}
    if isinstance(data, list):
        return [text_of(value, root, family, first) for value in data]
    if isinstance(data, str) and data.startswith("{") and data.endswith("}"):
        return (str(first) if first else "first") if data == "{first}" else str(root / family / data[1:-1])
    return data


def write_job(case: Case, root: Path, number: int) -> tuple[Path, dict[str, Any]]:
    """The recipe's file for mipipe, and what mergekit has to do (one file for each of chained recipes)."""
    method = case.recipe.get("merge_method", "")
    plain = {**case.recipe, **({"merge_method": method.split(",")[0].split(" ")[0]} if method else {})}
    command = "mergekit-yaml" if method else "mergekit-moe"
    out = root / f"theirs-{number}"
    steps, first = [], None
    for place, part in enumerate([*case.chained, plain]):
        last = place == len(case.chained)
        file, target = root / f"theirs-{number}-{place}.yaml", out if last else root / f"theirs-{number}-first"
        data = {key: value for key, value in text_of(part, root, case.family, first).items() if key != "name"}
        file.write_text(yaml.safe_dump(data))
        steps.append((command, str(file), str(target)))
        first = target
    ours = root / f"ours-{number}.yaml"
    ours.write_text(yaml.safe_dump_all([text_of(part, root, case.family, None) for part in (*case.chained, plain)]))
    return ours, {"name": number, "steps": steps}


def run_theirs(python: Path, jobs: list[dict[str, Any]], root: Path) -> dict[int, str]:
    """What went wrong with each of mergekit's merges; empty where nothing did."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([str(python), "-c", DRIVER, str(root / "jobs.json")], capture_output=True, text=True,
                          check=False, timeout=3600)
    lines = [json.loads(line.removeprefix("DONE ")) for line in done.stdout.splitlines() if line.startswith("DONE ")]
    if len(lines) < len(jobs):
        raise SystemExit(f"mergekit ended after {len(lines)} of {len(jobs)} recipes\n{done.stderr[-3000:]}")
    return dict(lines)


def load(folder: Path) -> Weights:
    """A checkpoint's tensors with experts as banks, so that two layouts can be compared."""
    tensors: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    banks: dict[str, dict[tuple[int, str], Tensor]] = {}
    found: Weights = {}
    for name, value in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        block, mark, rest = name.partition(".experts.")
        if not mark or not rest[0].isdigit():
            found[name] = value
            continue
        number, part = rest.split(".")[:2]
        part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(part, part)
        banks.setdefault(block, {})[int(number), part] = value
    for block, parts in banks.items():
        numbers = sorted({number for number, _ in parts})
        found[f"{block}.experts.gate_up_proj"] = torch.stack([torch.cat([parts[number, "gate_proj"],
                                                                        parts[number, "up_proj"]])
                                                              for number in numbers])
        found[f"{block}.experts.down_proj"] = torch.stack([parts[number, "down_proj"] for number in numbers])
    return found


def difference(ours: Weights, theirs: Weights) -> tuple[float, str]:
    """The largest difference in float32's steps at its tensor's largest weight, and the tensor; infinite where names or
    shapes differ."""
    if set(ours) != set(theirs):
        return float("inf"), f"only in one: {min(set(ours) ^ set(theirs))}"
    worst, where = 0.0, ""
    for name, value in ours.items():
        other = theirs[name]
        if value.shape != other.shape:
            return float("inf"), f"{name}: {list(value.shape)} and {list(other.shape)}"
        step = 2.0**-23 * (float(value.abs().max()) or 1.0)
        apart = float((value - other).abs().max()) / step
        if apart > worst:
            worst, where = apart, name
    return worst, where


def main() -> None:
    """Run all recipes and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="recipes whose family and name hold one of these")
    parser.add_argument("--environment", type=Path, help="mergekit's environment (default: in a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-recipes-") as folder:
        root = Path(folder)
        python = merge_vs_mergekit.install((arguments.environment or root / "environment").absolute())
        write_models(root)
        chosen = [case for case in cases() if not arguments.only or any(word in f"{case.family} {case.name}"
                                                                         for word in arguments.only)]
        jobs = [write_job(case, root, number) for number, case in enumerate(chosen)]
        failed = run_theirs(python, [job for _, job in jobs], root)
        rows = [compare(case, root, number, jobs[number][0], failed[number]) for number, case in enumerate(chosen)]
    show(rows)
    if any(row[3] in ("DIFFERS", "FAILED") for row in rows):
        sys.exit(1)


def compare(case: Case, root: Path, number: int, file: Path, failure: str) -> tuple[str, str, str, str, str]:
    """A row of the table: family, recipe, difference, verdict, reason."""
    out = root / f"ours-{number}"
    try:
        merge(file, out, MergeOptions())
    except MipipeError as error:
        return case.family, case.name, "", "FAILED", str(error)
    if failure:
        return case.family, case.name, "", "mergekit refuses", failure[:160]
    ours, theirs = load(out), load(root / f"theirs-{number}")
    given = {name: load(root / case.family / name) for name in ("base", "one", "two", "three")}
    worst, where = difference(ours, theirs)
    shutil.rmtree(out)
    figure = f"{worst:.2g}"
    if worst <= EQUAL:
        return case.family, case.name, figure, "equal", ""
    if case.reason and (case.check is None or case.check(ours, theirs, given)):
        return case.family, case.name, figure, "explained", case.reason
    return case.family, case.name, figure, "DIFFERS", f"{where} {case.reason}"


def show(rows: list[tuple[str, str, str, str, str]]) -> None:
    """The table of all recipes."""
    table = Table("checkpoints", "recipe", "steps", "verdict", "where, or why",
                  title="the same recipes by mipipe and by mergekit: largest difference over all tensors, in float32's"
                        " steps")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    count = {verdict: sum(row[3] == verdict for row in rows) for verdict in dict.fromkeys(row[3] for row in rows)}
    print(", ".join(f"{number} {verdict}" for verdict, number in count.items()))


if __name__ == "__main__":
    main()
