"""What one GPU can settle about mipipe in a few minutes: ``python benchmarks/gpu_check.py GRAPH.json ...``.

The most valuable parts come first; each prints one line and never stops the others. ``--out FILE`` keeps all as JSON,
``--device cpu`` rehearses here, as the test suite does. ``GRAPH.json``: captured graphs, whose whole traces run on both
devices; whole runs are in `gpu_runs`, beside this file. docs/gpus.md says which open question each part answers.
``--only NAME ...`` runs some parts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gpu_runs
import torch
from gpu_runs import Report, made

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.operators import kernels
from mipipe.graphs.serialize import load
from mipipe.graphs.tracing.compose import run_step
from mipipe.graphs.write_files import write_text

Tensors = Mapping[str, torch.Tensor]

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Relative error of attention against float64 that counts as right."""


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The 2-norm of the difference over that of what was wanted, in float64 on the CPU."""
    a, b = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def moved(tensors: Tensors, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def parity(path: Path, device: torch.device) -> Report:
    """Whole F, I and W of a graph: the largest error against the CPU, whether a rerun gives the same bits, and how
    often the host waited for the device."""
    graph = load(path, OperatorGraph)
    state, batch = made(graph)
    wanted = run_step(graph, state, batch)
    cuda = device.type == "cuda"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        found = run_step(graph, moved(state, device), moved(batch, device), device=device)
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    again = run_step(graph, moved(state, device), moved(batch, device), device=device)
    pairs = [(name, wanted.outputs[name], found.outputs[name]) for name in wanted.outputs]
    pairs += [(name, wanted.gradients[name], found.gradients[name]) for name in wanted.gradients]
    error, where = max(((relative(b, a), name) for name, a, b in pairs if a.is_floating_point()), default=(0.0, ""))
    return {"error": error, "at": where, "repeats": all(torch.equal(found.gradients[name], again.gradients[name])
                                                        for name in found.gradients),
            "host_syncs": sum("synchroniz" in str(item.message) for item in seen)}


CASES = ((True, 0, False, False, 4, 64, 64), (True, 0, False, False, 2, 128, 128),
         (False, 0, False, False, 4, 256, 256), (True, 32, False, False, 2, 64, 64),
         (True, 0, True, False, 2, 64, 64), (False, 0, False, True, 2, 64, 64),
         (True, 0, False, False, 4, 192, 128), (True, 0, False, False, 4, 80, 80), (True, 0, False, False, 4, 36, 36))
"""Attention as (causal, window, sinks, mask, key heads, head size, value head size), with 4 query heads."""


def attention_case(device: torch.device, dtype: torch.dtype, length: int, case: tuple[Any, ...]) -> float:
    """The largest relative error of forward and backward against float64 on the CPU."""
    causal, window, has_sinks, has_mask, groups, size, value_size = case
    q, k, v = (torch.randn(2, heads, length, width, device=device, dtype=dtype)
               for heads, width in ((4, size), (groups, size), (groups, value_size)))
    mask = torch.rand(2, 1, length, length, device=device) > 0.2 if has_mask else None
    sinks = torch.randn(4, device=device, dtype=dtype) if has_sinks else None
    rest = (causal, window, size ** -0.5, 0.0)
    out, lse = kernels.attention(q, k, v, mask, sinks, *rest)
    grad = torch.randn_like(out)
    found = (out, *kernels.attention_backward(grad, q, k, v, mask, sinks, out, lse, *rest))
    wide = [None if item is None else item.cpu() if item.dtype is torch.bool else item.cpu().double()
            for item in (q, k, v, mask, sinks)]
    out, lse = kernels.attention(*wide, *rest)
    wanted = (out, *kernels.attention_backward(grad.cpu().double(), *wide, out, lse, *rest))
    return max(relative(a, b) for a, b in zip(found, wanted, strict=True))


def attention(device: torch.device) -> Report:
    """Every branch of attention, in both dtypes and an odd length."""
    errors = {f"{str(dtype)[6:]} length {length} {case}": (attention_case(device, dtype, length, case), dtype)
              for dtype in TOLERANCE for length in (128, 77) for case in CASES}
    return {"cases": len(errors), "worst": max(error for error, _ in errors.values()),
            "outside": [name for name, (error, dtype) in errors.items() if not error <= TOLERANCE[dtype]]}


def grouped(device: torch.device) -> Report:
    """Grouped products and their weight gradients against the loop on the CPU: aligned or not, transposed banks, empty
    groups, rows beyond the last."""
    ends = torch.tensor([0, 17, 17, 60, 91], dtype=torch.int32)
    found: Report = {}
    for inner, outer in ((64, 128), (192, 128), (36, 52)):
        x, grad = torch.randn(100, inner, dtype=torch.bfloat16), torch.randn(100, outer, dtype=torch.bfloat16)
        bank = torch.randn(5, inner, outer, dtype=torch.bfloat16)
        for name, weight in (("rows", bank), ("columns", bank.transpose(1, 2).contiguous().transpose(1, 2))):
            there = kernels.grouped_mm(x.to(device), weight.to(device), ends.to(device))
            found[f"{name} {inner}x{outer}"] = relative(there, kernels.grouped_mm(x, weight, ends))
        there = kernels.grouped_mm_weight(x.to(device), grad.to(device), ends.to(device))
        found[f"gradient {inner}x{outer}"] = relative(there, kernels.grouped_mm_weight(x, grad, ends))
    return {"worst": max(found.values()), **found}


def dense(device: torch.device) -> Report:
    """Milliseconds and GiB of attention with a window, sinks, a mask and whole scores (a softcap) beside flash, forward
    and backward, bfloat16."""
    cuda = device.type == "cuda"
    heads, length = (32, 4096) if cuda else (2, 64)
    found: Report = {"length": length}
    for name, window, has_sinks, has_mask, softcap in (
            ("flash", 0, False, False, 0.0), ("window", length // 32, False, False, 0.0),
            ("sinks", 0, True, False, 0.0), ("mask", 0, False, True, 0.0), ("softcap", 0, False, False, 30.0)):
        q = torch.randn(1, heads, length, 128, device=device, dtype=torch.bfloat16)
        sinks = torch.zeros(heads, device=device, dtype=q.dtype) if has_sinks else None
        mask = torch.rand(1, 1, length, length, device=device) > 0.2 if has_mask else None
        rest, times, base = (True, window, 128 ** -0.5, softcap), [], 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        for _ in range(3):
            begin = time.perf_counter()
            out, lse = kernels.attention(q, q, q, mask, sinks, *rest)
            kernels.attention_backward(out, q, q, q, mask, sinks, out, lse, *rest)
            if cuda:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        found[name] = {"ms": min(times)} | ({"GiB": (torch.cuda.max_memory_allocated() - base) / 2**30} if cuda else {})
    return found


def fused(device: torch.device) -> Report:
    """Whether fused AdamW goes on with a step counter on the CPU, as a checkpoint brings it."""
    parameter = torch.nn.Parameter(torch.ones(8, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].cpu()
    optimizer.step()
    return {"steps": float(optimizer.state[parameter]["step"]),
            "finite": math.isfinite(float(parameter.detach().sum()))}


def parts(graphs: Iterable[Path], device: torch.device) -> dict[str, Callable[[], Report]]:
    """All parts in the order of their value."""
    found: dict[str, Callable[[], Report]] = {}
    for path in graphs:
        found[f"parity {path.stem}"] = lambda path=path: parity(path, device)  # type: ignore[misc]
    for part in (attention, grouped, dense, fused, *gpu_runs.PARTS):
        found[part.__name__] = lambda part=part: part(device)  # type: ignore[misc]
    return found


def main(arguments: list[str] | None = None) -> dict[str, Report]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graphs", nargs="*", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="parts by their first word")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU (rehearsal)"
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {where}", flush=True)
    results: dict[str, Report] = {}
    for name, part in parts(options.graphs, device).items():
        if options.only is not None and name.split()[0] not in options.only:
            continue
        begin = time.perf_counter()
        try:
            results[name] = part()
        except Exception as error:
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        results[name]["seconds"] = round(time.perf_counter() - begin, 2)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    if options.out is not None:
        write_text(options.out, json.dumps({"device": where, "torch": torch.__version__, "parts": results}, indent=1))
    return results


if __name__ == "__main__":
    main()
