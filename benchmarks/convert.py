"""Conversions of experts on byte-level models trained here: what each keeps of the model, beside plainer choices.

    python benchmarks/convert.py run WORK [SEED...]   # some ten minutes a seed on one core
    python benchmarks/convert.py table WORK           # results/convert.txt: means over the seeds that are there

A mixture of experts and a dense model of every seed are trained by `mipipe train` on text of Python's own library: its
code without comments and strings, and its docstrings. Losses are in nats per byte on files that training never saw.
Errors are standard errors over seeds, and a difference of two rows is judged by its own, seed by seed. What is in WORK
already is not made again.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import statistics
import sys
import sysconfig
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mipipe.cli.main import app
from mipipe.runtime.convert.launch import convert
from mipipe.runtime.merge.launching.launch import merge
from mipipe.runtime.tuning.objectives import Measure, Objectives

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
EXPERTS, INNER, TOP, SEQ, BATCH = 8, 48, 2, 96, 12
STEPS, TUNING, DRAWS = 500, 80, 6
Numbers = dict[str, float]
"""Losses by name."""
CLUSTER = Path(__file__).resolve().parents[1] / "examples" / "cluster_1cpu.yaml"


def texts(work: Path) -> None:
    """``code`` and ``docs``: folders to train on, and samples of files apart from them, as tokens."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for domain in ("code", "docs"):
        parts: dict[str, list[str]] = {"train": [], "held": []}
        for number, file in enumerate(files):
            source = file.read_text(encoding="utf-8", errors="replace")
            with contextlib.suppress(SyntaxError, tokenize.TokenError, IndentationError):
                parts["held" if number % 5 == 0 else "train"].append(
                    bare_code(source) if domain == "code" else docstrings(source))
        (work / domain).mkdir(parents=True, exist_ok=True)
        (work / domain / "text.txt").write_text("\n".join(parts["train"]))
        for part, name, count in (("train", "calibration", 64), ("held", "held", 96)):
            data = "\n".join(parts[part]).encode()
            gap = len(data) // count
            rows = [{"tokens": list(data[start * gap:start * gap + SEQ])} for start in range(count)]
            (work / f"{domain}_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [line for domain in ("code", "docs")
            for line in (work / f"{domain}_calibration.jsonl").read_text().splitlines(keepends=True)]
    for half in range(2):  # both kinds in each
        (work / f"half{half}_calibration.jsonl").write_text("".join(rows[half::2]))
    (work / "both").mkdir(exist_ok=True)
    (work / "both" / "text.txt").write_text("".join((work / domain / "text.txt").read_text()[:1_500_000]
                                                    for domain in ("code", "docs")))
    for name in ("calibration", "held"):
        (work / f"both_{name}.jsonl").write_text("".join((work / f"{domain}_{name}.jsonl").read_text()
                                                         for domain in ("code", "docs")))


def bare_code(source: str) -> str:
    """Source without comments and strings."""
    kept = [item for item in tokenize.generate_tokens(io.StringIO(source).readline)
            if item.type not in (tokenize.COMMENT, tokenize.STRING)]
    return tokenize.untokenize([(item.type, item.string) for item in kept])


def docstrings(source: str) -> str:
    """The documentation of a module's functions and classes."""
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return "\n\n".join(text for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)
                       and (text := ast.get_docstring(node)))


def call(*arguments: object) -> None:
    """A command of mipipe's, in this process."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            app([str(item) for item in arguments])
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{' '.join(map(str, arguments))}: {out.getvalue()[-2000:]}")


def train(work: Path, source: Path, out: Path, steps: int, *, data: str = "both", seed: int = 0, lr: float = 2e-3,
          weights: bool = True, elastic: int | None = None, settings: tuple[str, ...] = (),
          freeze: str | None = None) -> Path:
    """A model trained by `mipipe train`; what an earlier run of this benchmark left is used again."""
    if out.exists():
        return out
    graph, plan, config = (work / f"{out.name}.{end}" for end in ("graph.json", "plan.json", "yaml"))
    given = [item for setting in settings for item in ("--set", setting)] + (["--freeze", freeze] if freeze else [])
    call("capture", source, "--seq", SEQ, "--batch", BATCH, "--no-verify", "-o", graph,
         *given)
    call("profile", graph, "--workers", "1", "-o", work / f"{out.name}.costs.json")
    call("plan", graph, "--cluster", CLUSTER, "--costs", work / f"{out.name}.costs.json", "--microbatches", "1",
         "--time-limit", "1", "-o", plan)
    config.write_text(yaml.safe_dump({
        "steps": steps, "seed": seed, "clip": 1.0, "optimizer": {"lr": lr}, "save": {"folder": str(out)},
        "schedule": {"name": "cosine", "warmup": 20}, "data": {"source": str(work / data)},
        **({"weights": str(source)} if weights else {}),
        **({"experts": {"elastic": {"pool": elastic}}} if elastic else {})}))
    call("train", "--plan", plan, "--graph", graph, "--config", config)
    if settings:  # of training alone
        kept = json.loads((source / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(kept))
    print(f"  trained {out.name}", file=sys.stderr, flush=True)
    return out


def loss(work: Path, folder: Path, experts: int | None = None, data: str = "both") -> float:
    """Nats per byte on held-out text."""
    wanted = Objectives((str(work / f"{data}_held.jsonl"),), samples=192, length=SEQ, experts_per_token=experts)
    measure = Measure(wanted)
    return next(iter(measure.scores(folder).values()))


def converted(work: Path, name: str, recipe: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A conversion, made once."""
    out = work / name
    if not out.exists():
        path = work / f"{name}.recipe.yaml"
        path.write_text(yaml.safe_dump(dict(recipe)))
        convert(path, out)
    return out, json.loads((out / "mipipe_convert.json").read_text())


def start(work: Path, kind: str) -> Path:
    """A model's configuration."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    folder = work / f"{kind}_start"
    folder.mkdir(exist_ok=True)
    config = (Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=INNER, num_experts=EXPERTS,
                             num_experts_per_tok=TOP, norm_topk_prob=True, mlp_only_layers=[],
                             output_router_logits=True, router_aux_loss_coef=0.01)
              if kind == "moe" else LlamaConfig(**SIZES, intermediate_size=192))
    config.architectures = ["Qwen3MoeForCausalLM" if kind == "moe" else "LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def calibration(data: str) -> dict[str, Any]:
    return {"data": f"{data}_calibration.jsonl", "samples": 128, "length": SEQ}


def pruning(work: Path, moe: Path, seed: int) -> Numbers:
    """Half the experts: merged by M-SMoE, by chance, by others' measures; pruned; compressed."""
    common = {"model": moe.name, "groups": EXPERTS // 2, "calibration": calibration("both")}
    rows = {"all experts": loss(work, moe)}
    for similarity in ("router_logits", "router_weights", "weights"):
        out, _ = converted(work, f"{moe.name}_{similarity}", {"method": "m_smoe", "similarity": similarity, **common})
        rows[f"m_smoe, {similarity}"] = loss(work, out)
    chance = [loss(work, converted(work, f"{moe.name}_random{draw}", {
        "method": "m_smoe", "similarity": "random", "seed": draw, **common})[0]) for draw in range(DRAWS)]
    rows[f"random groups, mean of {DRAWS}"] = statistics.mean(chance)
    rows[f"random groups, best of {DRAWS}"] = min(chance)
    bare, _ = converted(work, f"{moe.name}_unaligned", {"method": "m_smoe", "align": False, **common})
    rows["m_smoe without alignment"] = loss(work, bare)
    for size in (2, 16):
        out, _ = converted(work, f"{moe.name}_ream{size}", {
            "method": "ream", "model": moe.name, "groups": EXPERTS // 2, "group_size": size,
            "calibration": calibration("both")})
        rows[f"ream, groups of at most {size}"] = loss(work, out)
    mild = EXPERTS * 3 // 4  # the paper's share
    out, _ = converted(work, f"{moe.name}_ream_mild", {"method": "ream", "model": moe.name, "groups": mild,
                                                       "group_size": 2, "calibration": calibration("both")})
    rows[f"ream, {mild} experts"] = loss(work, out)
    out, _ = converted(work, f"{moe.name}_pruned_mild", {"method": "prune_experts", "model": moe.name, "by": "weight",
                                                         "keep": mild, "calibration": calibration("both")})
    rows[f"pruned by weight, {mild} experts"] = loss(work, out)
    for by in ("usage", "weight"):
        out, _ = converted(work, f"{moe.name}_pruned_{by}", {"method": "prune_experts", "model": moe.name, "by": by,
                                                             "keep": EXPERTS // 2, "calibration": calibration("both")})
        rows[f"pruned by {by}"] = loss(work, out)
    for name in ("router_logits", "random0", "ream2", "pruned_weight"):
        tuned = train(work, work / f"{moe.name}_{name}", work / f"{moe.name}_{name}_tuned", TUNING, seed=seed, lr=5e-4)
        rows[f"{name}, {TUNING} steps of training"] = loss(work, tuned)
    for steps in (0, 100):
        out, _ = converted(work, f"{moe.name}_mc{steps}", {"method": "mc_smoe", "steps": steps, "lr": 1e-3, **common})
        rows[f"mc_smoe, {steps} steps"] = loss(work, out)
    return rows


def molae(work: Path, moe: Path, seed: int) -> Numbers:
    """Loss by the share of the parameters of gate and up projections."""
    rows = {}
    for latent, grouping in ((48, "consecutive"), (48, "similar"), (32, "similar"), (24, "similar")):
        out, record = converted(work, f"{moe.name}_molae{latent}{grouping}", {
            "method": "molae", "model": moe.name, "group": 4, "latent": latent, "grouping": grouping})
        error, optimal = (statistics.mean(row[key] for row in record["layers"].values())
                          for key in ("error", "optimal_error"))
        assert error <= 1.001 * optimal, f"{out}: error {error}, optimal {optimal}"
        kept = record["gate_up_parameters"] / record["gate_up_parameters_before"]
        rows[f"latent {latent}, {grouping} ({kept:.0%})"] = loss(work, out)
    out = train(work, work / f"{moe.name}_molae32similar", work / f"{moe.name}_molae32_tuned", TUNING, seed=seed,
                lr=5e-4)
    rows[f"latent 32, similar, {TUNING} steps of training"] = loss(work, out)
    return rows


def elastic(work: Path, moe: Path, seed: int) -> Numbers:
    """The same model trained further, plainly and with co-activation sampling, at 1 to 3 times its experts."""
    rows = {}
    for name, pool in (("plain", None), ("elastic", 3 * TOP)):
        out = train(work, moe, work / f"{moe.name}_{name}", 2 * TUNING, seed=seed, lr=1e-3, elastic=pool)
        rows |= {f"{name}, {count} experts a token": loss(work, out, count) for count in range(TOP, 3 * TOP + 1, 2)}
    return rows


def dive(work: Path, dense: Path, seed: int) -> Numbers:
    """Experts pruned for code and for prose beside experts of channels chosen at random, and of a random split."""
    recipe = {"method": "dive", "model": dense.name, "experts": 2, "pruned": 0.5, "seed": seed}
    made, _ = converted(work, f"{dense.name}_dive", {**recipe, "domains": [calibration("code"), calibration("docs")]})
    split, _ = converted(work, f"{dense.name}_split", {**recipe, "domains": [calibration("half0"),
                                                                             calibration("half1")]})
    chance = work / f"{dense.name}_chance"
    if not chance.exists():
        at_random(made, dense, chance, seed)
    rows = {"dense": loss(work, dense)}
    for name, folder in (("dive", made), ("texts split at random", split), ("random channels", chance)):
        router = train(work, folder, work / f"{folder.name}_router", TUNING, seed=seed, lr=5e-3,
                       freeze=r"^(?!.*gate\.weight)", settings=("num_experts_per_tok=2", "router_temperature=0.5"))
        tuned = train(work, router, work / f"{folder.name}_tuned", TUNING, seed=seed, lr=5e-4)
        rows |= {name: loss(work, folder), f"{name}, router trained": loss(work, router),
                 f"{name}, all trained": loss(work, tuned)}
    return rows


def at_random(made: Path, dense: Path, out: Path, seed: int) -> None:
    """DIVE's folder with channels drawn at random, and no compensation."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(made, out)
    whole, tensors = load_file(dense / "model.safetensors"), load_file(made / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        block = name.removesuffix(".experts.gate_up_proj")
        parts = [whole[f"{block}.{part}.weight"] for part in ("gate_proj", "up_proj", "down_proj")]
        for expert in range(2):
            kept = torch.randperm(len(parts[0]), generator=generator)[:tensors[name].shape[1] // 2]
            tensors[name][expert] = torch.cat([parts[0][kept], parts[1][kept]])
            tensors[f"{block}.experts.down_proj"][expert] = parts[2][:, kept]
            tensors[f"{block}.experts.down_proj_bias"][expert] = 0
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def routers(work: Path, moe: Path, seed: int) -> Numbers:
    """Two mixtures tuned on code and on prose, merged, with and without their routers solved for afterwards; the mean
    of the losses on both."""
    tuned = {data: train(work, moe, work / f"{moe.name}_{data}", 2 * TUNING, data=data, seed=seed, lr=2e-3)
             for data in ("code", "docs")}
    names = [{"model": folder.name, "calibration": f"{data}_calibration.jsonl"} for data, folder in tuned.items()]
    half = {"merge_method": "linear", "models": [{"model": item["model"], "parameters": {"weight": 0.5}}
                                                 for item in names]}
    mean = work / f"{moe.name}_mean"
    routed = {"merge_method": "router_calibration", "base_model": mean.name, "models": names,
              "calibration": {"samples": 64, "length": SEQ}}
    for out, recipe in ((mean, half), (work / f"{mean.name}_routed", routed)):
        if not out.exists():
            path = work / f"{out.name}.recipe.yaml"
            path.write_text(yaml.safe_dump(recipe))
            merge(path, out)
    return {name: statistics.mean(loss(work, folder, data=data) for data in ("code", "docs"))
            for name, folder in (("before tuning", moe), ("tuned on code", tuned["code"]),
                                 ("tuned on docs", tuned["docs"]), ("mean", mean),
                                 ("mean, routers calibrated", work / f"{mean.name}_routed"))}


SECTIONS = {"Half the experts (4 of 8 a layer on average)": pruning, "MoLAE, groups of 4": molae,
            "Elastic MoE: trained further, pool 6, probability 0.5": elastic,
            "DIVE: 2 experts of half the channels, one per token": dive,
            "Two mixtures tuned apart, merged": routers}
CLAIMS = (("m_smoe, router_logits", f"random groups, mean of {DRAWS}"),
          ("m_smoe, router_logits", "m_smoe without alignment"),
          ("ream, groups of at most 2", "m_smoe, router_logits"), ("ream, groups of at most 2", "pruned by weight"),
          ("ream, 6 experts", "pruned by weight, 6 experts"),
          (f"router_logits, {TUNING} steps of training", f"random0, {TUNING} steps of training"),
          ("elastic, 6 experts a token", "plain, 6 experts a token"),
          ("elastic, 2 experts a token", "plain, 2 experts a token"),
          ("dive", "random channels"), ("dive, all trained", "random channels, all trained"),
          ("dive", "texts split at random"), ("dive, all trained", "texts split at random, all trained"),
          ("mean, routers calibrated", "mean"))


def run(work: Path, seeds: Sequence[int]) -> None:
    """Make and measure what ``WORK/results.json`` lacks, every section on all seeds before the next."""
    file = work / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for title, section in SECTIONS.items():
        found, kind = results.setdefault(title, {}), "dense" if section is dive else "moe"
        for seed in [seed for seed in seeds if str(seed) not in found]:
            model = train(work, start(work, kind), work / f"{kind}{seed}", STEPS, seed=seed, weights=False)
            found[str(seed)] = section(work, model, seed)
            file.write_text(json.dumps(results, indent=1))
            print(f"seed {seed}, {title}", flush=True)


def spread(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):8.4f} +- {error:.4f}"


def table(work: Path) -> None:
    """Rows of every section, and which differences are beyond two standard errors."""
    results = {title: seeds for title, seeds in json.loads((work / "results.json").read_text()).items() if seeds}
    every: dict[str, dict[str, float]] = {}
    for title, seeds in results.items():
        print(f"{title}: {len(seeds)} seeds")
        for name in next(iter(seeds.values())):
            every[name] = {seed: rows[name] for seed, rows in seeds.items()}
            print(f"  {name:46s} {spread(list(every[name].values()))}")
        print()
    print("Differences, seed by seed")
    for better, worse in CLAIMS:
        if better in every and worse in every:
            apart = [every[worse][seed] - value for seed, value in every[better].items()]
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("inf")
            mean = statistics.mean(apart)
            verdict = "holds" if mean > 2 * error else "is the other way round" if mean < -2 * error else "is not shown"
            print(f"  {better} below {worse}: {spread(apart).strip()}, {verdict}")


def main() -> None:
    step, work = sys.argv[1], Path(sys.argv[2]).resolve()
    if step == "table":
        table(work)
        return
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    texts(work)
    run(work, [int(item) for item in sys.argv[3:]] or range(5))


if __name__ == "__main__":
    main()
