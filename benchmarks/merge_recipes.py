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
from pathlib import Path
from typing import Any

import merge_vs_mergekit
import torch
import yaml
from merge_recipe_cases import LAYERS, WORDS, Case, Weights, cases
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from mipipe.graphs.errors import MipipeError
from mipipe.runtime.merge.launching.launch import MergeOptions, merge

EQUAL = 8.0

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


def write_near(folder: Path) -> None:
    """Models ``near-one`` and ``near-two``, whose changes of the base are a thousandth and two of the others'."""
    base = load_file(folder / "base" / "model.safetensors")
    for name, share in (("one", 1e-3), ("two", 2e-3)):
        shutil.copytree(folder / name, folder / f"near-{name}")
        other = load_file(folder / name / "model.safetensors")
        save_file({key: base[key] + share * (value - base[key]) for key, value in other.items()},
                  folder / f"near-{name}" / "model.safetensors", {"format": "pt"})


def write_tokenizer(folder: Path, more: list[str]) -> None:
    """A tokenizer of single letters; ``more`` are added tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(WORDS)}, merges=[], unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": more}) if more else None
    made.save_pretrained(folder)


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
        write_near(root / "llama")
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
    given = {folder.name: load(folder) for folder in (root / case.family).iterdir()}
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
