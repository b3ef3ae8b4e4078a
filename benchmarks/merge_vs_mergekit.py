"""mipipe's merges beside mergekit's on the same checkpoints: the same tensors, the wall time, the peak memory.

    python benchmarks/merge_vs_mergekit.py                        # about 1 B parameters, bf16, 4 shards: 10 GB of disk
    python benchmarks/merge_vs_mergekit.py --scale small          # about 0.1 B, a quick look
    python benchmarks/merge_vs_mergekit.py --methods sce --rows rows.json          # one more row of a kept table
    python benchmarks/merge_vs_mergekit.py --scale tiny --dtype float32            # agreement without rounding
    python benchmarks/merge_vs_mergekit.py --scale 0.2b --ranks 1 2 --repeats 3    # our own ranks

Synthetic Llama checkpoints (a base and two experts, base + noise) are written once. Each method runs in a fresh process
with one thread, alternating between the two programs; the best of ``--repeats`` counts. Peak memory is the largest
resident set of the process, or what it and its forks hold together (sampled, shared pages counted once), minus that of
a process that only imports torch; mapped input files count in it, so the peak of anonymous memory alone is compared
too. Processor time, forks included, is shown beside wall time: on a busy machine it is the steadier figure.

Ours opens every result as transformers would, which mergekit does not, and remembers what it has opened: ``linear
first`` is the first merge of an architecture, in a fork that imports transformers; all others are later ones.

Differences of bfloat16 weights are coarse, so many of a tensor's magnitudes equal its k-th largest, and which of them a
trimming method keeps is each program's choice: the first in row order here, whatever an unstable sort leaves there.
Only such entries may differ in ``ties`` and ``sce``: the last column counts entries that differ by more than one step
and are not at the edge of a selection, and is 0. With ``--dtype float32`` magnitudes are hardly ever equal, and the
results agree.

DARE drops entries at random, mergekit's from torch's global generator in the order in which its tasks happen to run,
ours from a counter (seed, tensor, entry). The only masks both rules must share are those of density 1, which keep all;
so ``dare_linear`` and ``dare_ties`` run there and their tensors are compared. Of ``dare_ties half`` (density 0.5) only
time and memory are.

mergekit (LGPL-3.0) is a peer, never a dependency: this script installs it into an environment of its own
(``--environment``), runs its command ``mergekit-yaml`` and reads the files that writes; nothing of it is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from merge_processes import measured
from rich.console import Console
from rich.table import Column, Table
from safetensors import safe_open
from safetensors.torch import save_file

SCALES = {  # hidden, inner, layers, heads, key-value heads, vocabulary
    "tiny": (256, 512, 2, 4, 2, 2000),
    "small": (768, 2048, 12, 12, 4, 16000),
    "0.2b": (1024, 2816, 12, 16, 4, 32000),
    "1b": (2048, 5632, 20, 32, 8, 32000),
}
METHODS: dict[str, dict[str, Any]] = {
    "linear first": {"weight": [0.6, 0.4]},
    "linear": {"weight": [0.6, 0.4]},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": [0.6, 0.4]},
    "ties": {"weight": [0.6, 0.4], "density": [0.5, 0.3]},
    "dare_linear": {"weight": [0.6, 0.4], "density": [1.0, 1.0]},
    "dare_ties": {"weight": [0.6, 0.4], "density": [1.0, 1.0]},
    "sce": {"select_topk": 0.3},
    "model_stock": {},
    "dare_ties half": {"weight": [0.6, 0.4], "density": [0.5, 0.5]},
}
"""Parameters by method; lists are per model."""


# Checkpoints ----------------------------------------------------------------------------------------------------------


def shapes(scale: str) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Llama."""
    hidden, inner, layers, heads, groups, vocabulary = SCALES[scale]
    size = hidden // heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden),
                                         "lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.q_proj.weight": (hidden, hidden),
                  f"{at}.self_attn.k_proj.weight": (groups * size, hidden),
                  f"{at}.self_attn.v_proj.weight": (groups * size, hidden),
                  f"{at}.self_attn.o_proj.weight": (hidden, hidden), f"{at}.mlp.gate_proj.weight": (inner, hidden),
                  f"{at}.mlp.up_proj.weight": (inner, hidden), f"{at}.mlp.down_proj.weight": (hidden, inner),
                  f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,)}
    return found


def config(scale: str) -> dict[str, Any]:
    """The Llama's config.json."""
    hidden, inner, layers, heads, groups, vocabulary = SCALES[scale]
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": groups, "vocab_size": vocabulary, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu"}


def write_models(root: Path, scale: str, dtype: torch.dtype = torch.bfloat16, num_shards: int = 4) -> None:
    """A base and two experts, in shards of whole tensors."""
    names = sorted(shapes(scale))
    for number, model in enumerate(("base", "one", "two")):
        folder = root / model
        if (folder / "model.safetensors.index.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config(scale)))
        weight_map = {}
        for shard in range(num_shards):
            file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
            part = {}
            for place, name in enumerate(names):
                if place * num_shards // len(names) != shard:
                    continue
                shape = shapes(scale)[name]
                value = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(place))
                if number:
                    noise = torch.Generator().manual_seed(100_000 * number + place)
                    value += 0.002 * torch.randn(shape, generator=noise)
                part[name] = value.to(dtype)
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def recipe(root: Path, name: str, dtype: str) -> dict[str, Any]:
    """The recipe of a method, whose result has the checkpoints' ``dtype``; the same text for both programs."""
    method = name.split()[0]
    params = METHODS[name]
    shared = {key: value for key, value in params.items() if not isinstance(value, list)}
    own = [{key: value[index] for key, value in params.items() if isinstance(value, list)} for index in range(2)]
    models = [{"model": str(root / model), "parameters": values}
              for model, values in zip(("one", "two"), own, strict=True)]
    data: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32", "out_dtype": dtype}
    if method == "slerp":
        data["base_model"] = str(root / "one")
    elif method != "linear":
        data["base_model"] = str(root / "base")
    if shared:
        data["parameters"] = shared
    return data


# Programs -------------------------------------------------------------------------------------------------------------


def install(environment: Path) -> Path:
    """The interpreter of an environment with mergekit, made on first use; torch stays at this project's version."""
    python = environment / "bin" / "python"
    if not (environment / "bin" / "mergekit-yaml").exists():
        constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-c", str(constraints), "mergekit"], check=True)
    return python


def run_mipipe(file: Path, out: Path, name: str, ranks: int = 1) -> dict[str, float]:
    """``mipipe merge``, with a cache of its own, which is empty for the first merge of an architecture."""
    cache = file.parent / "cache"
    if name.endswith(" first"):
        shutil.rmtree(cache, ignore_errors=True)
    body = "runpy.run_module('mipipe.cli.main', run_name='__main__')"
    arguments = ["mipipe", "merge", str(file), "-o", str(out), "--ranks", str(ranks)]
    return measured(Path(sys.executable), body, arguments, cache)


def estimated(file: Path, out: Path, name: str, ranks: int) -> float:
    """Seconds of a merge by ``--dry-run``."""
    cache = file.parent / "cache"
    if name.endswith(" first"):
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "mipipe.cli.main", "merge", str(file), "-o", str(out), "--ranks", str(ranks),
               "--dry-run", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(json.loads(done.stdout)["total_ns"]) / 1e9


def compare_ranks(root: Path, names: list[str], dtype: str, repeats: int, counts: list[int]) -> None:
    """The seconds of our merges on one and on several ranks, taking turns; the best of the repeats counts. Before each
    the dry run says how long it will take: from the least to the largest of its estimate over the run after it."""
    table = Table("method", *(f"{count} rank{'s' * (count > 1)}: s, of cpu" for count in counts),
                  "ratio of the last to one", *(f"estimate / run, {count}" for count in counts),
                  title="mipipe's own merges, whole commands, files of the input in memory")
    for name in names:
        best: dict[int, dict[str, float]] = {}
        foreseen: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(repeats):
            for count in counts:
                out, file = root / "out-mipipe", root / "recipe.yaml"
                shutil.rmtree(out, ignore_errors=True)
                file.write_text(yaml.safe_dump(recipe(root, name, dtype)))
                estimate = estimated(file, out, name, count)
                run = run_mipipe(file, out, name, count)
                foreseen[count].append(estimate / run["seconds"])
                seen = best.setdefault(count, run)
                best[count] = {key: min(seen[key], value) for key, value in run.items()}
        ratios = [best[counts[-1]][key] / best[counts[0]][key] for key in ("seconds", "cpu")]
        table.add_row(name, *(f"{best[count]['seconds']:.1f}, {best[count]['cpu']:.1f}" for count in counts),
                      f"{ratios[0]:.2f}, {ratios[1]:.2f}",
                      *(f"{min(foreseen[count]):.2f} to {max(foreseen[count]):.2f}" for count in counts))
    Console(width=120).print(table)


def run_mergekit(python: Path, file: Path, out: Path) -> dict[str, float]:
    """``mergekit-yaml`` with its lazy loader, which bounds its memory."""
    script = python.parent / "mergekit-yaml"
    body = f"runpy.run_path({str(script)!r}, run_name='__main__')"
    return measured(python, body, ["mergekit-yaml", str(file), str(out), "--lazy-unpickle", "--quiet"])


def tensors_of(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint."""
    return {name: file for file in sorted(folder.glob("*.safetensors"))
            for name in safe_open(file, "pt").keys()}  # noqa: SIM118


def at_the_edge(root: Path, method: str, name: str) -> torch.Tensor:
    """Which entries of a tensor equal the last one a method selects, so that keeping them is each program's choice."""
    base, *models = (safe_open(tensors_of(root / model)[name], "pt").get_tensor(name).float()
                     for model in ("base", "one", "two"))
    deltas = [model - base for model in models]
    if method == "ties":
        ranked = [(delta.abs(), int(share * delta.numel()))
                  for delta, share in zip(deltas, METHODS[method]["density"], strict=True)]
    elif method == "sce":
        variance = torch.stack(deltas).var(dim=0, correction=0)
        ranked = [(variance, int(METHODS[method]["select_topk"] * int(variance.count_nonzero())))]
    else:
        return torch.zeros_like(base, dtype=torch.bool)
    found = torch.zeros_like(base, dtype=torch.bool)
    for values, count in ranked:
        place = values.numel() - max(1, count)
        last = float(np.partition(values.flatten().numpy(), place)[place])
        found |= (values - last).abs() <= 1e-6 * last
    return found


def compare(root: Path, method: str, ours: Path, theirs: Path) -> dict[str, float]:
    """How two results differ, in bfloat16's spacing: shares of entries that differ at all and by more than one step,
    the number of the latter that are not at the edge of a selection, and the largest difference. The spacing is taken
    at the entry, or at the tensor's root mean square where the entry is smaller: below that the rounding of the inputs
    decides."""
    places = [tensors_of(folder) for folder in (ours, theirs)]
    assert set(places[0]) == set(places[1]), set(places[0]) ^ set(places[1])
    counts, unexplained = torch.zeros(3, dtype=torch.int64), 0
    worst = 0.0
    for name in places[0]:
        a, b = (safe_open(place[name], "pt").get_tensor(name).float() for place in places)
        floor = float(a.square().mean().sqrt()) or 1e-30
        differ = (a != b).flatten().nonzero().flatten()
        a, b, num_entries = a.flatten()[differ], b.flatten()[differ], a.numel()
        spacing = torch.maximum(a.abs(), b.abs()).clamp_min(floor).log2().floor().exp2() * 2**-7
        steps = (a - b).abs() / spacing
        worst = max([worst, *([float(steps.max())] if len(steps) else [])])
        beyond = differ[steps > 1.0]
        counts += torch.tensor([len(differ), len(beyond), num_entries])
        if len(beyond):
            unexplained += int((~at_the_edge(root, method, name).flatten()[beyond]).sum())
    return {"differing": float(counts[0] / counts[2]), "beyond": float(counts[1] / counts[2]),
            "unexplained": unexplained, "steps": worst}


# The comparison -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="1b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("merge-benchmark"), help="where checkpoints are written")
    parser.add_argument("--environment", type=Path, help="mergekit's environment (default: in the folder)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", type=Path, help="keep the rows here as JSON; those of earlier runs are shown too")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="compare our own merges on 1, 2, ... ranks,"
                                                                          " without mergekit")
    arguments = parser.parse_args()
    suffix = "" if arguments.dtype == "bfloat16" else f"-{arguments.dtype}"
    root = (arguments.folder / f"{arguments.scale}{suffix}").absolute()
    write_models(root, arguments.scale, getattr(torch, arguments.dtype))
    if arguments.ranks:
        compare_ranks(root, arguments.methods, arguments.dtype, arguments.repeats, arguments.ranks)
        return
    python = install((arguments.environment or arguments.folder / "environment").absolute())
    bare = {"mipipe": measured(Path(sys.executable), "import torch", ["import"]),
            "mergekit": measured(python, "import torch", ["import"])}
    records: dict[str, dict[str, Any]] = {}
    if arguments.rows is not None and arguments.rows.exists():
        records = json.loads(arguments.rows.read_text())
    for name in arguments.methods:
        best: dict[str, dict[str, float]] = {}
        for _ in range(arguments.repeats):
            for program in ("mergekit", "mipipe"):
                out = root / f"out-{program}"
                shutil.rmtree(out, ignore_errors=True)
                file = root / "recipe.yaml"
                file.write_text(yaml.safe_dump(recipe(root, name, arguments.dtype)))
                run = run_mipipe(file, out, name) if program == "mipipe" else run_mergekit(python, file, out)
                run["memory"] = run["peak"] - bare[program]["peak"]
                run["anonymous"] -= bare[program]["anonymous"]
                seen = best.setdefault(program, run)
                best[program] = {key: min(seen[key], value) for key, value in run.items()}
        found = {} if name == "dare_ties half" else compare(root, name, root / "out-mipipe", root / "out-mergekit")
        record = {"method": name, "size": f"{arguments.scale} {arguments.dtype}", "agreement": found, **best,
                  "time_ratio": best["mipipe"]["seconds"] / best["mergekit"]["seconds"],
                  "cpu_ratio": best["mipipe"]["cpu"] / best["mergekit"]["cpu"],
                  "memory_ratio": best["mipipe"]["memory"] / max(1.0, best["mergekit"]["memory"]),
                  "anonymous_ratio": best["mipipe"]["anonymous"] / max(1.0, best["mergekit"]["anonymous"])}
        records[f"{record['size']} {name}"] = record
        if arguments.rows is not None:
            arguments.rows.write_text(json.dumps(records, indent=2) + "\n")
    show(list(records.values()))


def show(records: list[dict[str, Any]]) -> None:
    """The table of all methods: each pair is ours beside mergekit's, each ratio ours over mergekit's."""
    table = Table(*(Column(title, no_wrap=place < 2) for place, title in enumerate((
        "checkpoints", "method", "seconds", "ratio", "of cpu", "peak MB", "ratio", "private", "differ",
        "by > 1 step", "most steps", "not at an edge"))),
                  title="mipipe beside mergekit: whole processes, one thread; peak above a bare `import torch`",
                  caption="private: ratio of memory that is no mapped file; differ: entries of the result, in steps"
                          " of bfloat16")
    for record in records:
        ours, theirs, found = record["mipipe"], record["mergekit"], record["agreement"]
        agreement = ([f"{found['differing']:.2%}", f"{found['beyond']:.3%}", f"{found['steps']:.2g}",
                      str(found["unexplained"])] if found else ["own masks"])
        table.add_row(record["size"], record["method"], f"{ours['seconds']:.1f}, {theirs['seconds']:.1f}",
                      f"{record['time_ratio']:.2f}", f"{record['cpu_ratio']:.2f}",
                      f"{ours['memory'] / 1e6:.0f}, {theirs['memory'] / 1e6:.0f}", f"{record['memory_ratio']:.2f}",
                      f"{record['anonymous_ratio']:.2f}", *agreement)
    Console(width=148).print(table)


if __name__ == "__main__":
    main()
