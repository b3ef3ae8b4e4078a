"""One rank of a merge: ``torchrun -m mipipe.runtime.worker --merge OUT``, or called in-process or in a fork.

The plan and the prepared shards are in ``OUT.partial`` (see `mipipe.runtime.weights.writer`). Rank 0 publishes the
result when all ranks are done.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.merging.checkpoints.files import read_checkpoint
from mipipe.graphs.serialize import load, save
from mipipe.planner.merging.plan import MergePlan
from mipipe.runtime.merge.calibrate import forget_calibration
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.execute import RankReport, merge_timeline, run_rank
from mipipe.runtime.merge.forked import can_fork, run_forked
from mipipe.runtime.merge.methods.parts import describe_parts
from mipipe.runtime.merge.output.card import RECORD, write_companions
from mipipe.runtime.merge.output.opened import key_of_graph, was_opened
from mipipe.runtime.merge.output.verifier import Verifier
from mipipe.runtime.merge.output.verify import MARK
from mipipe.runtime.weights.writer import partial_folder, prepare, publish_folder


def begin(plan: MergePlan, out: Path) -> Path:
    """The prepared partial folder of a merge, with its plan.

    Raises:
        InputError: ``out`` exists, or holds another unfinished merge.
        RunError: no space for the output.
    """
    folder = prepare(out, plan.shards, plan.job_digest())
    save(plan, folder / "plan.json")
    return folder


def work(plan: MergePlan, out: Path, exchange: MergeRanks, device: torch.device,
         progress: Callable[[int], None] | None = None, timeline: str | None = None) -> list[RankReport]:
    """Merge this rank's part; rank 0 then publishes, and writes the measured ``timeline`` where one is wanted.

    Returns all ranks' reports.
    """
    folder = partial_folder(out)
    if len(plan.ranks) != exchange.size:
        raise RunError(f"{folder}: is planned for {len(plan.ranks)} ranks, but {exchange.size} were started")
    if exchange.rank or not plan.graph.config or plan.graph.stores_parts or not (folder / MARK).exists():
        return _work(plan, out, exchange, device, progress, timeline, None)
    named = plan.graph.config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    imports = bool(architecture) and "transformers" not in sys.modules and not was_opened(key_of_graph(plan.graph))
    with Verifier(architecture, imports and can_fork() and device.type == "cpu") as verifier:
        return _work(plan, out, exchange, device, progress, timeline, verifier)


def _work(plan: MergePlan, out: Path, exchange: MergeRanks, device: torch.device,
          progress: Callable[[int], None] | None, timeline: str | None, verifier: Verifier | None) -> list[RankReport]:
    """`work`, beside the verifier of its result."""
    folder = partial_folder(out)
    report, events = run_rank(plan, folder, exchange, device, progress)
    reports = exchange.gather(report)
    if timeline is not None:
        measured = merge_timeline(plan, exchange.gather(events))
        if exchange.rank == 0:
            save(measured, timeline)
    if exchange.rank == 0:
        _check_sources(plan)
        unsure = ""
        if plan.graph.stores_parts:
            save(describe_parts(plan.graph, folder), folder / "parts.json")
        else:
            write_companions(plan, folder)
            if verifier is not None:
                unsure = verifier.check(folder)
        facts = {"job": plan.job_digest(), "ranks": [asdict(item) for item in reports], "unsure": unsure}
        (folder / RECORD).write_text(json.dumps(facts) + "\n")
        forget_calibration(folder)
        publish_folder(folder, out, plan.shards)
    exchange.barrier()
    return reports


def _check_sources(plan: MergePlan) -> None:
    """Raises if a source's files changed while it was merged."""
    for model in plan.graph.models:
        if not model.fingerprint.startswith(read_checkpoint(model.source).fingerprint):
            raise RunError(f"{model.folder}: has changed since the merge began; run it again")


def device_of(kind: str, local_rank: int) -> torch.device:
    """``cpu``, or this rank's CUDA device.

    Raises:
        InputError: another kind, or no CUDA device here.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise InputError(f"device: found {kind!r}, expected cpu or cuda")
    if not torch.cuda.is_available():
        raise InputError("device: cuda asked for, but torch sees no CUDA device; use --device cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def run_prepared(out: Path, device: str | None = None, timeline: str | None = None) -> None:
    """Merge as this process's rank of the prepared merge of ``out``, or without torchrun as all its ranks; started by
    `mipipe.runtime.worker`.

    Args:
        timeline: where rank 0 writes the measured timeline.

    Raises:
        MipipeError: as `work`.
    """
    plan = load(partial_folder(out) / "plan.json", MergePlan)
    if "RANK" not in os.environ and len(plan.ranks) > 1:
        place = device_of(device or "cpu", 0)
        run_forked(lambda ranks: work(plan, out, ranks, place, ranks.tell, timeline), len(plan.ranks), lambda _: None)
        return
    with MergeRanks.from_torchrun() as exchange:
        work(plan, out, exchange, device_of(device or "cpu", exchange.local_rank), timeline=timeline)
