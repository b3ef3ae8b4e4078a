"""Merging from a recipe file to a finished folder: the library form of ``mipipe merge``.

    merge("recipe.yaml", "out", num_ranks=4, memory_cap=8 * 10**9)

One rank runs in this process; several in forks of it, or under torchrun. Recipes chained in one file run one after
another; results of all but the last are kept in ``<out>.steps`` until the last is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, read_checkpoint
from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.merging.moe_recipe import MoeRecipe, build_moe, dry_router, read_moe_recipe
from mipipe.graphs.merging.recipes.read import read_recipes
from mipipe.graphs.merging.recipes.recipe import MergeRecipe
from mipipe.graphs.serialize import load_data
from mipipe.planner.merging.costs import rates_to_run
from mipipe.planner.merging.plan import SHARD_BYTES, MergePlan, plan_chain, plan_graph, plan_recipe
from mipipe.runtime.calibration.tokens import Samples
from mipipe.runtime.merge import worker
from mipipe.runtime.merge.calibrate import with_samples, write_samples
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.forked import can_fork, forks_here, run_forked
from mipipe.runtime.merge.output.card import RECORD
from mipipe.runtime.merge.output.lock import only_one
from mipipe.runtime.merge.output.verify import MARK
from mipipe.runtime.merge.programs.adapters import KeptAdapter, extract_adapter, keep_adapters
from mipipe.runtime.merge.programs.extract import is_whole
from mipipe.runtime.merge.programs.router import make_router
from mipipe.runtime.merge.programs.transplant import transplant, wants_transplant
from mipipe.runtime.merge.pytorch_files import convert_pickled
from mipipe.runtime.train.launching.failures import explain_failure


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge: ranks, device kind, memory cap in bytes per rank (None: no cap), largest output file, dtype.

    ``dtype`` replaces the recipe's out_dtype. ``timeline``: a file for the measured timeline (of the last recipe).
    ``verify``: open every result as transformers would before it is called done (`mipipe.runtime.merge.output.verify`).
    ``loaders``: the functions (``package.module:loader``) that a recipe's calibration may call for samples.
    ``calibration_cache``: a folder in which statistics of running the models are kept for later merges of the same
    models.
    """

    num_ranks: int = 1
    device: str = "cpu"
    memory_cap: int | None = None
    shard_bytes: int = SHARD_BYTES
    dtype: str | None = None
    timeline: str | None = None
    verify: bool = True
    loaders: tuple[str, ...] = ()
    calibration_cache: str | None = None

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise InputError(f"--ranks {self.num_ranks}: expected at least 1")
        if self.shard_bytes < 1:
            raise InputError(f"--shard-size {self.shard_bytes}: expected at least one byte")


@dataclass(frozen=True, slots=True)
class Reuse:
    """A finished merge of the same layout, used up for the next: its tensors of these names are the next one's too."""

    folder: Path
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: the folder, its plan, what each rank did, seconds from start to end.

    ``adapter``: what was written where the result is a LoRA adapter; such a merge has no plan.
    """

    out: Path
    plan: MergePlan | None
    reports: tuple[dict[str, Any], ...]
    seconds: float
    adapter: KeptAdapter | None = None


def merge(recipe: str | Path | Sequence[MergeRecipe], out: str | Path, options: MergeOptions | None = None,
          progress: Callable[[int, int], None] | None = None,
          tell: Callable[[str], None] = lambda _line: None) -> MergeResult:
    """Merge as a recipe file (or recipes) says, into a new folder.

    Args:
        progress: called with (bytes done, bytes in all) of the running recipe.
        tell: called with each line about what is left out, differs, or could not be verified.

    Raises:
        InputError: the recipe, a model or an option is wrong, or ``out`` exists.
        InfeasibleError: the memory cap is below what one tensor needs.
        RunError: no space, a source that changed or is damaged, a rank that died.
    """
    options = options or MergeOptions()
    out = Path(out)
    where = str(recipe) if isinstance(recipe, (str, Path)) else "recipe"
    assembly = read_moe_recipe(recipe) if isinstance(recipe, (str, Path)) else None
    recipes = () if assembly else read_recipes(recipe) if isinstance(recipe, (str, Path)) else recipe
    check_target(out)
    with only_one(out):
        if assembly is not None:
            return assemble_moe(assembly, out, options, where, progress, tell)
        return _merge_recipes(recipes, out, options, where, progress, tell)


def _merge_recipes(recipes: Sequence[MergeRecipe], out: Path, options: MergeOptions, where: str,
                   progress: Callable[[int, int], None] | None, tell: Callable[[str], None]) -> MergeResult:
    """One recipe after another."""
    began = time.monotonic()
    steps = out.with_name(out.name + ".steps")
    known = convert_pickled(recipes, steps, tell)
    converted = [Path(files.path).name for files in known.values()]
    if len(recipes) > 1:  # what is wrong with a later one shall not show after hours of the first
        plan_chain([part for part in recipes if part.adapter is None], where, out, options.num_ranks,
                   options.memory_cap, options.shard_bytes, options.dtype, known, rates_to_run(options.num_ranks))
    for number, part in enumerate(recipes):
        last = number == len(recipes) - 1
        target = out if last else steps / part.name
        target.parent.mkdir(exist_ok=True)
        if wants_transplant(part, known):
            part = transplant(part, known, steps / "tables")
            converted.append("tables")
        if part.adapter is not None:
            return _kept(part, where, out, known, began, options, tell)
        plan = plan_recipe(part, where, out, known, options.num_ranks, options.memory_cap, options.shard_bytes,
                           options.dtype, rates_to_run(options.num_ranks))
        _tell_notes(plan.graph, tell)
        plan, samples = with_samples(plan, options.loaders, where, tell, steps / "learned")
        if not (target.exists() and made_by(target, plan)):
            run_plan(plan, target, options, progress, samples)
        if not last:
            known[part.name] = read_checkpoint(target)
    _forget(steps, [*(part.name for part in recipes[:-1]), *converted, "learned"])
    return _result(out, plan, began, tell)


def _tell_notes(graph: MergeGraph, tell: Callable[[str], None]) -> None:
    for note in graph.notes:
        tell(note)


def _result(out: Path, plan: MergePlan, began: float, tell: Callable[[str], None]) -> MergeResult:
    record = json.loads((out / RECORD).read_text())
    if record.get("unsure"):
        tell(record["unsure"])
    return MergeResult(out, plan, tuple(record["ranks"]), time.monotonic() - began)


def _kept(recipe: MergeRecipe, where: str, out: Path, known: Mapping[str, CheckpointFiles], began: float,
          options: MergeOptions, tell: Callable[[str], None]) -> MergeResult:
    """Adapters merged into an adapter: little data, one process, no plan."""
    assert recipe.adapter is not None
    if options != MergeOptions(shard_bytes=options.shard_bytes, verify=options.verify):
        raise InputError(f"{where}: adapters merged into an adapter are made in one process, without a plan; leave out"
                         " --ranks, --device, --dtype, --memory and --timeline")
    graph = build(recipe, where, known)
    _tell_notes(graph, tell)
    made = extract_adapter(graph, recipe.adapter, out) if is_whole(graph) else keep_adapters(graph, recipe.adapter.rank,
                                                                                             out)
    return MergeResult(out, None, (), time.monotonic() - began, made)


def assemble_moe(recipe: MoeRecipe, out: Path, options: MergeOptions, where: str = "recipe",
                 progress: Callable[[int, int], None] | None = None,
                 tell: Callable[[str], None] = lambda _line: None) -> MergeResult:
    """A mixture of experts made from dense models, with its routers, in a new folder.

    Raises:
        InputError: the recipe or a model is wrong, or ``out`` exists.
    """
    began = time.monotonic()
    build_moe(recipe, dry_router(recipe), where)  # the router takes long, so what is wrong shall show before it
    steps = out.with_name(out.name + ".steps")
    files = make_router(recipe, steps / "router")
    if options.dtype is not None:
        recipe = dataclasses.replace(recipe, dtype=options.dtype)
    plan = plan_graph(build_moe(recipe, files, where), out, options.num_ranks, options.memory_cap, options.shard_bytes,
                      rates_to_run(options.num_ranks))
    _tell_notes(plan.graph, tell)
    run_plan(plan, out, options, progress)
    _forget(steps, ["router"])
    return _result(out, plan, began, tell)


def _forget(steps: Path, names: Sequence[str]) -> None:
    """Remove the results of finished steps, and their folder if nothing else is in it."""
    for name in names:
        shutil.rmtree(steps / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        steps.rmdir()


def check_target(out: Path) -> None:
    """Raise where a new folder cannot be made."""
    if out.exists():
        raise InputError(f"{out}: exists already; give another -o, or remove it")
    if out.is_symlink():
        raise InputError(f"{out}: is a link to nothing; give another -o, or remove it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist; make it first")


def made_by(folder: Path, plan: MergePlan) -> bool:
    """Whether a step's result is that of this very merge."""
    record = folder / RECORD
    return record.exists() and load_data(record).get("job") == plan.job_digest()


def run_plan(plan: MergePlan, out: Path, options: MergeOptions,
             progress: Callable[[int, int], None] | None = None, samples: Mapping[str, Samples] | None = None,
             reuse: Reuse | None = None) -> None:
    """Run a plan: in this process for one rank, in forks of it for several; under torchrun on CUDA devices.

    Args:
        samples: by data source, where the plan runs models.
        reuse: an earlier result that is changed into this one.

    Raises:
        MipipeError: as the failing rank raised it.
    """
    device = worker.device_of(options.device, 0)
    if options.timeline is not None and not Path(options.timeline).absolute().parent.is_dir():
        raise InputError(f"--timeline {options.timeline}: its folder does not exist; make it first")
    folder = worker.begin(plan, out)
    write_samples(plan, dict(samples or {}), folder, options.calibration_cache)
    if reuse is not None:
        for shard in plan.shards:
            os.replace(reuse.folder / shard.file, folder / shard.file)
        (folder / "done-reused.txt").write_text("".join(f"{name}\n" for name in sorted(reuse.names)))
    if options.verify:
        (folder / MARK).touch()
    else:
        (folder / MARK).unlink(missing_ok=True)
    total, done = plan.graph.write_bytes, 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    if options.num_ranks == 1:
        worker.work(plan, out, MergeRanks.alone(), device, advance, options.timeline)
        return
    if device.type == "cpu" and can_fork():
        run_forked(lambda ranks: worker.work(plan, out, ranks, device, ranks.tell, options.timeline),
                   options.num_ranks, advance)
        return
    from mipipe.runtime.train.launching.launch import run_watched  # it imports all of training

    with tempfile.TemporaryDirectory(prefix="mipipe-merge-") as reports:
        log = Path(reports) / "torchrun.log"
        code = run_watched(merge_command(out, options, reports), log, None)
        if code:
            raise explain_failure(Path(reports), log, code, show=False)


def merge_command(out: Path, options: MergeOptions, report: str | None = None) -> list[str]:
    """The command that runs the prepared merge of ``out``; the same line works by hand.

    It starts one process that forks the ranks, or torchrun where they cannot be forks.
    """
    logs = ["--log-dir", f"{report}/logs"] if report else []  # else torchrun makes a folder in /tmp, and leaves it
    start = [] if options.device == "cpu" and forks_here() else \
        ["torch.distributed.run", "--standalone", *logs, "--nproc-per-node", str(options.num_ranks), "-m"]
    command = [sys.executable, "-m", *start, "mipipe.runtime.worker", "--merge", str(out), "--device", options.device]
    command += ["--timeline", options.timeline] if options.timeline else []
    return command + (["--report", report] if report else [])
