"""Every model family as an operator graph: sizes, time, memory, and whether the counts are right.

    python benchmarks/families.py [--only llama mixtral ...] [--seq 4096] [--json FILE]

Each family is captured at full size on the meta device, in a process of its own (its peak memory is in the table).
``parameters`` is compared with ``sum(p.numel())`` of the module. ``F TFLOP`` and ``B TFLOP`` (I and W) are compared
with torch.utils.flop_counter over an eager training step on fake tensors, with the formulas it lacks registered
(attention on the CPU, grouped matrix products); transformers' own attention and experts run there, not ours (but for
the vision towers of Qwen-VL, whose spans fake tensors cannot give: their attention is ours, by torch's formula). The
``off`` columns are differences: of counts, and relative.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3 8B": ("LlamaForCausalLM", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "Qwen3 8B": ("Qwen3ForCausalLM", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                                      "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                                      "vocab_size": 151936}),
    "Gemma 3 4B text": ("Gemma3ForCausalLM", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                                              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}),
    "Mixtral 8x7B": ("MixtralForCausalLM", {}),
    "Qwen3 MoE 30B": ("Qwen3MoeForCausalLM", {"hidden_size": 2048, "moe_intermediate_size": 768, "head_dim": 128,
                                              "num_hidden_layers": 48, "num_attention_heads": 32,
                                              "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {}),
    "OLMoE 7B": ("OlmoeForCausalLM", {"intermediate_size": 1024}),
    "GPT-OSS 120B": ("GptOssForCausalLM", {}),
    "LLaVA 7B": ("LlavaForConditionalGeneration", {}),
    "Qwen2.5-VL 7B": ("Qwen2_5_VLForConditionalGeneration", {
        **{f"text_config.{key}": value for key, value in {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}.items()},
        "vision_config.hidden_size": 1280, "vision_config.out_hidden_size": 3584}),
    "Qwen3-VL 8B": ("Qwen3VLForConditionalGeneration", {
        **{f"text_config.{key}": value for key, value in {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 151936, "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}}.items()},
        "vision_config.out_hidden_size": 4096}),
    "ResNet-50": ("ResNetForImageClassification", {"num_labels": 1000}),
    "CLIP": ("CLIPModel", {}),
    "Whisper": ("WhisperForConditionalGeneration", {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32,
                                                    "encoder_attention_heads": 20, "decoder_attention_heads": 20,
                                                    "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120,
                                                    "num_mel_bins": 128, "vocab_size": 51866}),
}
"""Family -> transformers class and the entries in which the model differs from the class's defaults."""

SEQUENCE = {"CLIP": 64, "Whisper": 448}
"""Tokens where the architecture allows fewer than the option asks."""


def capture_row(name: str, seq: int) -> dict[str, Any]:
    """One family: captured, then counted independently."""
    from mipipe.graphs.capture.model import capture
    from mipipe.graphs.costs.summary import graph_summary

    source, overrides = FAMILIES[name]
    begin, started = time.perf_counter(), time.process_time()
    graph = capture(source, seq=seq, overrides=overrides, dtype="bfloat16")
    seconds, busy = time.perf_counter() - begin, time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = graph_summary(graph)
    back = found["flops"]["I"] + found["flops"]["W"]
    row = {"family": name, "operators": found["operators"], "segments": found["segments"],
           "distinct": found["distinct_segments"], "parameters": found["parameters"],
           "F TFLOP": found["flops"]["F"] / 1e12, "B TFLOP": back / 1e12, "seconds": seconds,
           "CPU seconds": busy, "peak GB": peak / 1e9}
    counted = count_independently(source, seq, overrides)
    row["parameters off"] = row["parameters"] - counted["parameters"]
    row["F off"] = found["flops"]["F"] / counted["forward"] - 1
    row["B off"] = back / counted["backward"] - 1
    if not counted["flash"] and row["B off"]:
        row["note"] = "counted without flash attention, whose backward computes the scores again"
    return row


def count_independently(source: str, seq: int, overrides: dict[str, Any]) -> dict[str, int]:
    """Parameters of the module, and flop_counter's count of an eager forward and backward on fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from mipipe.graphs.models.sources import open_source
    from mipipe.graphs.operators.layers import PACKED

    def forward(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    def grouped(a: Any, b: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        """Rows of a through one matrix each (3-D b), or the weight gradient (2-D b): both 2 x rows x two sizes."""
        return 2 * math.prod(a) * b[-1]

    aten = torch.ops.aten
    extra = {aten._scaled_dot_product_flash_attention_for_cpu: forward, aten._grouped_mm: grouped,
             aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
             torch.ops.mipipe.attention: forward, torch.ops.mipipe.attention_backward: backward}
    with FakeTensorMode(allow_non_fake_inputs=True):
        opened = open_source(source, seq=seq, overrides=overrides, dtype="bfloat16")
        model = opened.build("cpu")
        packed = [part.config for part in model.modules()
                  if getattr(getattr(part, "config", None), "_attn_implementation", None) == PACKED]
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            model.set_attn_implementation("eager")
        for config in packed:  # Qwen-VL's towers read their spans from tensors otherwise, which fake ones cannot give
            config._attn_implementation = PACKED
        modeling = sys.modules[type(model).__module__]
        if hasattr(modeling, "torch_compilable_check"):
            modeling.torch_compilable_check = lambda *arguments, **options: None  # it reads values, fakes have none
        for part in model.modules():
            config = getattr(part, "config", None)
            if config is not None:
                config._experts_implementation = "grouped_mm"
        inputs = opened.inputs("cpu")
        given = {key: item for key, item in inputs.items() if key not in opened.withheld}
        counter = FlopCounterMode(display=False, custom_mapping=extra)
        with counter:
            output = model(**given, **opened.constants)
            loss = output.loss if opened.loss is None else opened.loss(output, inputs)
            ahead = counter.get_total_flops()
            loss.backward()
        # Elsewhere (attention sinks, values of another size than keys) the backward keeps the scores: B counts lower.
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward in counter.get_flop_counts()["Global"]
        return {"parameters": sum(item.numel() for item in model.parameters()), "forward": ahead,
                "backward": counter.get_total_flops() - ahead, "flash": flash}


def run_family(name: str, seq: int) -> dict[str, Any]:
    """The row of a family from a process of its own, or why there is none."""
    code = ("import json, sys; sys.path.insert(0, sys.argv[1]); import families;"
            "print(json.dumps(families.capture_row(sys.argv[2], int(sys.argv[3]))))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), name, str(seq)],
                          capture_output=True, text=True)
    if done.returncode:
        return {"family": name, "note": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        rows.append(run_family(name, min(options.seq, SEQUENCE.get(name, options.seq))))
        print(rows[-1], file=sys.stderr)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=f"Captured on the meta device, {options.seq} tokens, bfloat16", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("family", "note") else "right")
    for row in rows:
        cells = ("" if row.get(column) is None else row[column] for column in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else f"{cell}" for cell in cells))
    Console(width=160).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "seq": options.seq}) + "\n")


if __name__ == "__main__":
    main()
