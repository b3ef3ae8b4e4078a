"""Conversions of experts on byte-level models trained here: what each keeps of the model, beside plainer choices.

    python benchmarks/convert.py WORK [SEED...]   # some ten minutes a seed on one core: results/convert.txt

Two mixtures of experts (seeds 0 and 1) and two dense models are trained by `mipipe train` on text of Python's own
library: its code without comments and strings, and its docstrings. Losses are in nats per byte on files that training
never saw.
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
from mipipe.runtime.merge.launch import merge
from mipipe.runtime.tuning.objectives import Measure, Objectives

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
EXPERTS, INNER, TOP, SEQ, BATCH = 8, 48, 2, 96, 12
STEPS, TUNING = 500, 80
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
          freeze: str | None = None, router_loss: float = 0.0) -> Path:
    """A model trained by `mipipe train`; what an earlier run of this benchmark left is used again."""
    if out.exists():
        return out
    graph, plan, config = (work / f"{out.name}.{end}" for end in ("graph.json", "plan.json", "yaml"))
    given = [item for setting in settings for item in ("--set", setting)] + (["--freeze", freeze] if freeze else [])
    call("capture", source, "--seq", SEQ, "--batch", BATCH, "--router-loss", router_loss, "--no-verify", "-o", graph,
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


def pruning(work: Path, moe: Path, seed: int) -> list[str]:
    """Half the experts: merged by M-SMoE, by chance, by others' measures; pruned; compressed."""
    common = {"model": moe.name, "groups": EXPERTS // 2, "calibration": calibration("both")}
    whole, rows = loss(work, moe), []
    rows.append(f"{'all experts':34s} {whole:7.4f}")
    for similarity in ("router_logits", "router_weights", "weights"):
        out, record = converted(work, f"{moe.name}_{similarity}",
                                {"method": "m_smoe", "similarity": similarity, **common})
        share = record["bytes"] / record["source_bytes"]
        rows.append(f"{f'm_smoe, {similarity}':34s} {loss(work, out):7.4f}  {share:.0%} of the bytes")
    chance = [loss(work, converted(work, f"{moe.name}_random{draw}", {
        "method": "m_smoe", "similarity": "random", "seed": draw, **common})[0]) for draw in range(20)]
    rows.append(f"{'random groups, 20 draws':34s} {statistics.mean(chance):7.4f}  +-"
                f" {statistics.stdev(chance):.4f} (s.d.), {min(chance):.4f} to {max(chance):.4f}")
    bare, _ = converted(work, f"{moe.name}_unaligned", {"method": "m_smoe", "align": False, **common})
    rows.append(f"{'m_smoe without alignment':34s} {loss(work, bare):7.4f}")
    for by in ("usage", "weight"):
        out, _ = converted(work, f"{moe.name}_pruned_{by}", {"method": "prune_experts", "model": moe.name, "by": by,
                                                             "keep": EXPERTS // 2, "calibration": calibration("both")})
        rows.append(f"{f'pruned by {by}':34s} {loss(work, out):7.4f}")
    merged = work / f"{moe.name}_router_logits"
    tuned = train(work, merged, work / f"{merged.name}_tuned", TUNING, seed=seed, lr=5e-4)
    rows.append(f"{f'm_smoe, {TUNING} steps of training':34s} {loss(work, tuned):7.4f}")
    for steps in (0, 100):
        out, record = converted(work, f"{moe.name}_mc{steps}",
                                {"method": "mc_smoe", "steps": steps, "lr": 1e-3, **common})
        share = record["bytes"] / record["source_bytes"]
        rows.append(f"{f'mc_smoe, {steps} steps':34s} {loss(work, out):7.4f}  {share:.0%} of the bytes")
    return rows


def molae(work: Path, moe: Path, seed: int) -> list[str]:
    """Error and loss against the parameters of gate and up projections."""
    rows = [f"{'latent, grouping':34s} {'kept':>6s} {'error':>7s} {'optimal':>8s} {'loss':>7s}"]
    for latent, grouping in ((48, "consecutive"), (48, "similar"), (40, "similar"), (32, "similar"), (24, "similar")):
        out, record = converted(work, f"{moe.name}_molae{latent}{grouping}", {
            "method": "molae", "model": moe.name, "group": 4, "latent": latent, "grouping": grouping})
        error, optimal = (statistics.mean(row[key] for row in record["layers"].values())
                          for key in ("error", "optimal_error"))
        kept = record["gate_up_parameters"] / record["gate_up_parameters_before"]
        rows.append(f"{f'{latent}, {grouping}':34s} {kept:6.1%} {error:7.4f} {optimal:8.4f} {loss(work, out):7.4f}")
    out = train(work, work / f"{moe.name}_molae32similar", work / f"{moe.name}_molae32_tuned", TUNING, seed=seed,
                lr=5e-4)
    rows.append(f"{f'32, similar, {TUNING} steps of training':42s} {'':16s} {loss(work, out):7.4f}")
    return rows


def elastic(work: Path, moe: Path, seed: int) -> list[str]:
    """The same model trained further, plainly and with co-activation sampling, at 1 to 3 times its experts."""
    rows = [f"{'experts per token':34s} " + " ".join(f"{count:7d}" for count in range(TOP, 3 * TOP + 1))]
    for name, pool, sharp in (("plain", None, 0.0), ("elastic", 3 * TOP, 0.0),
                              ("elastic, router loss 0.001", 3 * TOP, 1e-3)):
        out = train(work, moe, work / f"{moe.name}_{name.split(' ')[0].strip(',')}{sharp}", 2 * TUNING, seed=seed,
                    lr=1e-3, elastic=pool, router_loss=sharp)
        rows.append(f"{name:34s} " + " ".join(f"{loss(work, out, count):7.4f}" for count in range(TOP, 3 * TOP + 1)))
    return rows


def dive(work: Path, dense: Path, seed: int) -> list[str]:
    """Experts pruned for code and for prose beside experts of channels chosen at random."""
    recipe = {"method": "dive", "model": dense.name, "experts": 2, "pruned": 0.5, "seed": seed,
              "domains": [calibration("code"), calibration("docs")]}
    made, record = converted(work, f"{dense.name}_dive", recipe)
    chance = work / f"{dense.name}_chance"
    if not chance.exists():
        at_random(made, dense, chance, seed)
    rows = [f"{'dense':34s} {loss(work, dense):7.4f}",
            f"  (the two experts share {statistics.mean(record['overlap'].values()):.0%} of their channels)"]
    for name, folder in (("dive", made), ("random channels", chance)):
        router = train(work, folder, work / f"{folder.name}_router", TUNING, seed=seed, lr=5e-3,
                       freeze=r"^(?!.*gate\.weight)", settings=("num_experts_per_tok=2", "router_temperature=0.5"))
        tuned = train(work, router, work / f"{folder.name}_tuned", TUNING, seed=seed, lr=5e-4)
        rows.append(f"{name:34s} {loss(work, folder):7.4f}  router trained {loss(work, router):7.4f}  all trained"
                    f" {loss(work, tuned):7.4f}")
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


def routers(work: Path, moe: Path, seed: int) -> list[str]:
    """Two mixtures tuned on code and on prose, merged, with and without their routers solved for afterwards."""
    tuned = {data: train(work, moe, work / f"{moe.name}_{data}", 2 * TUNING, data=data, seed=seed, lr=2e-3)
             for data in ("code", "docs")}
    names = [{"model": folder.name, "calibration": f"{data}_calibration.jsonl"} for data, folder in tuned.items()]
    sizes = {"samples": 64, "length": SEQ}
    half = {"merge_method": "linear", "models": [{"model": item["model"], "parameters": {"weight": 0.5}}
                                                 for item in names]}
    merged = work / f"{moe.name}_mean"
    if not merged.exists():
        path = work / f"{merged.name}.recipe.yaml"
        path.write_text(yaml.safe_dump(half))
        merge(path, merged)
        path = work / f"{merged.name}_routed.recipe.yaml"
        path.write_text(yaml.safe_dump({"merge_method": "router_calibration", "base_model": merged.name,
                                        "models": names, "calibration": sizes}))
        merge(path, work / f"{merged.name}_routed")
    rows = [f"{'':34s} {'code':>7s} {'docs':>7s}"]
    for name, folder in (("before tuning", moe), ("tuned on code", tuned["code"]), ("tuned on docs", tuned["docs"]),
                         ("mean", merged), ("mean, routers calibrated", work / f"{merged.name}_routed")):
        rows.append(f"{name:34s} " + " ".join(f"{loss(work, folder, data=data):7.4f}" for data in ("code", "docs")))
    return rows


def main(work: Path, seeds: Sequence[int] = (0, 1)) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    texts(work)
    for seed in seeds:
        moe = train(work, start(work, "moe"), work / f"moe{seed}", STEPS, seed=seed, weights=False)
        dense = train(work, start(work, "dense"), work / f"dense{seed}", STEPS, seed=seed, weights=False)
        for title, rows in (("Half the experts", pruning(work, moe, seed)), ("MoLAE", molae(work, moe, seed)),
                            ("Elastic MoE", elastic(work, moe, seed)), ("DIVE", dive(work, dense, seed)),
                            ("Merged mixtures", routers(work, moe, seed))):
            print(f"{title}, seed {seed}: held-out loss in nats per byte\n  " + "\n  ".join(rows) + "\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), [int(item) for item in sys.argv[2:]] or (0, 1))
