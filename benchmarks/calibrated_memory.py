"""Memory and bytes of a calibrated merge of two Llama-shaped models of 1.1 billion parameters, on one and two ranks.

    python benchmarks/calibrated_memory.py WORK [--samples 4] [--interrupt SECONDS] [-o FILE]

Random weights in bfloat16, random tokens; ``aim`` runs the base, layer by layer. Samples lie in a file between two
layers, one is in a layer at a time: the head's 32,000 logits of two do not fit in 2 GiB beside its weights. With
``--interrupt`` the merge on two ranks is first begun by the command and gets SIGTERM after so many seconds; then it is
run again to its end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

import mipipe
from mipipe.graphs.units import format_bytes

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
          "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
          "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16"}


def write_model(folder: Path, seed: int) -> None:
    """A model in shards of one layer each."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, kv = 2048, 8192, 512
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    parts = [{f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()} for layer in range(16)]
    parts.append({"model.embed_tokens.weight": (32000, hidden), "model.norm.weight": (hidden,),
                  "lm_head.weight": (32000, hidden)})
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: (0.02 * torch.randn(shape, generator=generator) + (len(shape) == 1)).bfloat16()
                   for name, shape in part.items()}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def interrupt(recipe: Path, out: Path, seconds: float) -> str:
    """Begin a merge on two ranks, stop it after some seconds, and say what became of it."""
    command = ["merge", str(recipe), "-o", str(out), "--ranks", "2", "--memory", "2GiB", "--no-verify"]
    child = subprocess.Popen([sys.executable, "-c", "from mipipe.cli.main import main; main()", *command],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
    code = child.wait(60)
    return f"stopped by SIGTERM after {seconds:g} s (exit {code})" if not out.exists() else "ended before SIGTERM"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--interrupt", type=float, metavar="SECONDS")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    for seed, name in enumerate(("base", "expert")):
        write_model(given.work / name, seed)
    generator = torch.Generator().manual_seed(9)
    (given.work / "samples.jsonl").write_text("".join(
        json.dumps({"tokens": torch.randint(32000, (512,), generator=generator).tolist()}) + "\n"
        for _ in range(given.samples)))
    recipe = {"merge_method": "aim", "base_model": str(given.work / "base"),
              "models": [{"model": str(given.work / "expert")}], "parameters": {"lambda": 0.7},
              "calibration": {"data": str(given.work / "samples.jsonl"), "samples": given.samples, "length": 512,
                              "batch": 1, "parts": 2}}
    lines, seals = [], []
    for ranks in (1, 2):
        out = given.work / f"out-{ranks}"
        shutil.rmtree(out, ignore_errors=True)
        note = ""
        if ranks == 2 and given.interrupt is not None:
            file = given.work / "recipe.json"  # JSON is YAML
            file.write_text(json.dumps(recipe))
            note = f", {interrupt(file, out, given.interrupt)} and resumed"
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # nothing of another merge is in its memory
            result = pool.submit(mipipe.merge, recipe, out, ranks=ranks, memory="2GiB", verify=False).result()
        seal = hashlib.sha256()
        for file in sorted(out.glob("*.safetensors")):
            seal.update(file.read_bytes())
        seals.append(seal.hexdigest())
        note += f" with {done} units done" if note and (done := sum(one["resumed"] for one in result.reports)) else ""
        peak = max(report["peak_bytes"] for report in result.reports)
        lines.append(f"{ranks} rank{'s' * (ranks > 1)}: {given.samples} samples of 512 tokens, peak memory above the"
                     f" bare"
                     f" process {format_bytes(peak)} a rank, {result.seconds:.0f} s, sha256 {seals[-1][:16]}{note}")
        shutil.rmtree(out)
        print(lines[-1], flush=True)
    lines.append("same bytes" if len(set(seals)) == 1 else "BYTES DIFFER")
    print(lines[-1])
    if given.output is not None:
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
