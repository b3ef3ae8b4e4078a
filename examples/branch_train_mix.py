"""Experts trained apart, assembled into a mixture, and trained together: branch, train, mix (arXiv 2403.07816).

A small model of bytes learns a little of everything. Two branches go on from it, one on Python's source code and one on
sums, each as a plan of one device: they never talk. `mipipe merge` assembles their feed-forward layers into a mixture
of experts with the rest averaged, and a plan for two devices trains that on both kinds of text. Beside it: the average
of the branches, and the first model trained for as many steps on both. ``python examples/branch_train_mix.py`` prints
every command; what it makes is in ``demo-btm/``.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("demo-btm")
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 256, "max_position_embeddings": 128, "tie_word_embeddings": False,
         "use_cache": False}
SEED_STEPS, BRANCH_STEPS, MIX_STEPS, SEQ, BATCH = 200, 200, 120, 96, 8
KINDS = ("code", "sums")


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    write_texts()
    start = WORK / "start"
    start.mkdir()
    (start / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"],
                                                   **SIZES}))
    say("1. One model, a little of everything.")
    train("seed", start, "both", SEED_STEPS, weights=False)
    say("2. Two branches, apart: plans of one device each.")
    for kind in KINDS:
        train(kind, WORK / "seed", kind, BRANCH_STEPS)
    say("3. A mixture of the two, whose router says nothing yet; and their average.")
    merge("mixture", {"base_model": str(WORK / "seed"), "architecture": "mixtral", "gate_mode": "random",
                      "experts_per_token": 2, "dtype": "float32",
                      "experts": [{"source_model": str(WORK / kind)} for kind in KINDS]})
    merge("average", {"merge_method": "linear", "dtype": "float32",
                      "models": [{"model": str(WORK / kind)} for kind in KINDS]})
    say("4. Together, on both: a plan of two devices. And the first model with as many steps, on both.")
    train("mixed", WORK / "mixture", "both", MIX_STEPS, devices=2)
    train("dense", WORK / "seed", "both", 2 * BRANCH_STEPS + MIX_STEPS)
    say("5. What each can do.")
    (WORK / "models.yaml").write_text(yaml.safe_dump({
        "base": "seed", "experts": {kind: kind for kind in KINDS},
        "merged": {name: name for name in ("average", "mixture", "mixed", "dense")},
        "domains": {kind: {"perplexity": f"{kind}-held.txt"} for kind in KINDS}, "samples": 64, "length": SEQ}))
    mipipe("evaluate", WORK / "models.yaml")


def write_texts() -> None:
    """``code`` and ``sums`` to train on, both of them mixed, and what is held out."""
    draw = random.Random(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = {"code": [ast.unparse(ast.parse(file.read_text(encoding="utf-8", errors="replace")))
                      for file in files[:80]],
             "sums": ["\n".join(f"{a}+{b}={a + b}" for a, b in ((draw.randrange(1000), draw.randrange(1000))
                                                               for _ in range(1500))) for _ in range(40)]}
    (WORK / "text-both").mkdir(parents=True)
    for kind, texts in parts.items():
        (WORK / f"text-{kind}").mkdir()
        (WORK / f"text-{kind}" / "text.txt").write_text("\n".join(texts[:-8])[:600_000])
        (WORK / f"{kind}-held.txt").write_text("\n".join(texts[-8:])[:100_000])
    pieces = [(WORK / f"text-{kind}" / "text.txt").read_text() for kind in KINDS]
    cut = [text[place:place + 2000] for text in pieces for place in range(0, 400_000, 2000)]
    draw.shuffle(cut)
    (WORK / "text-both" / "text.txt").write_text("".join(cut))


def train(name: str, model: Path, text: str, steps: int, weights: bool = True, devices: int = 1) -> None:
    """Capture, profile, plan and train one model; ``WORK/name`` is a folder that transformers loads."""
    graph, costs, plan, config = (WORK / f"{name}.{end}" for end in ("graph.json", "costs.json", "plan.json", "yaml"))
    mipipe("capture", model, "--seq", SEQ, "--batch", BATCH, "-o", graph)
    mipipe("profile", graph, "--workers", devices, "-o", costs)
    mipipe("plan", graph, "--cluster", f"examples/cluster_{devices}cpu.yaml", "--costs", costs, "--microbatches",
           2 * devices if devices > 1 else 1, "--time-limit", 3, "-o", plan)
    config.write_text(yaml.safe_dump({
        "steps": steps, "clip": 1.0, "optimizer": {"lr": 2e-3}, "schedule": {"name": "cosine", "warmup": 20},
        "data": {"source": str(WORK / f"text-{text}")}, "save": {"folder": str(WORK / name)},
        **({"weights": str(model)} if weights else {})}))
    mipipe("train", "--plan", plan, "--graph", graph, "--config", config)
    write_tokenizer(WORK / name)


def merge(name: str, recipe: dict[str, object]) -> None:
    file = WORK / f"{name}.recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    mipipe("merge", file, "-o", WORK / name)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose 256 tokens are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def mipipe(*words: object) -> None:
    """Print and run one mipipe command; end with its status if it fails."""
    print("$ mipipe " + " ".join(map(str, words)), flush=True)
    status = subprocess.run([sys.executable, "-m", "mipipe.cli.main", *map(str, words)],
                            stdout=None if words[0] == "evaluate" else subprocess.DEVNULL).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
