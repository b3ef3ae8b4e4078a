"""The torchrun entry: ``torchrun --nproc-per-node N -m mipipe.runtime.worker --plan P --graph G --config C``.

With ``--merge OUT`` in place of the files it runs the merge prepared in ``OUT.partial`` (`mipipe.runtime.merge`).

Each process reads the files, takes its rank's part of the plan and trains. Files and options are checked before any
process waits for another. A user's error is one line on stderr (from one rank) and its exit code; any other failure is
reported with its traceback in torchrun's summary. With ``--report FOLDER`` a failing rank also leaves its error there.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from mipipe.graphs.children import die_with_parent
from mipipe.graphs.coarse.totals import num_sequences
from mipipe.graphs.errors import MipipeError, StoppedError, tells_all
from mipipe.graphs.named_code import no_exit
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.experts.balance.maps import ExpertMap
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.layers import expert_degree
from mipipe.runtime.ranks import processes
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.ranks.processes import rank
from mipipe.runtime.recipes.light import CutWeights, is_second
from mipipe.runtime.recipes.policy_branches import BranchPeer, BranchRollouts, Together, check_positions
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.data import Batches, make_batches
from mipipe.runtime.train.expert_run import read_maps
from mipipe.runtime.train.launching import devices, stopping
from mipipe.runtime.train.launching.failures import DONE
from mipipe.runtime.train.launching.prepare import (
    PreparedRun,
    check_outputs,
    check_saving,
    check_world,
    held_otherwise,
    read_job,
    zero_of,
)
from mipipe.runtime.train.launching.rendezvous import start_processes
from mipipe.runtime.train.launching.telling import ProgressBar, announce, report, tell
from mipipe.runtime.train.models import LayeredWeights, empty_module, weights_for_host
from mipipe.runtime.train.prefetch import Prefetched
from mipipe.runtime.train.training import Trainer
from mipipe.runtime.weights.stored_weights import StoredWeights


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The worker's options."""
    parser = argparse.ArgumentParser(prog="mipipe.runtime.worker", description=__doc__)
    parser.add_argument("--plan", help="the plan to run")
    parser.add_argument("--graph", help="the operator graph it was made for")
    parser.add_argument("--config", help="the training configuration (YAML)")
    parser.add_argument("--model", help="the model's source, where the graph names code (package.module:factory)")
    parser.add_argument("--merge", metavar="OUT", help="run the prepared merge of this folder instead")
    parser.add_argument("--timeline", help="where a merge's measured timeline is written")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument("--resume-if-any", action="store_true", help="continue from the newest checkpoint, if any")
    parser.add_argument("--progress", nargs="?", const="-", default="lines", metavar="FILE",
                        help="show progress (rank 0) in a line on stderr that is kept up to date, or in a file such as"
                             " a terminal's; lines (the default): now and then a line on stdout; none: nothing")
    parser.add_argument("--report", help="folder in which a failing rank leaves its error")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: what the plan was made for")
    options = parser.parse_args(arguments)
    if not options.merge and not (options.plan and options.graph and options.config):
        parser.error("expected --plan, --graph and --config, or --merge")
    return options


def train(options: argparse.Namespace) -> list[float]:
    """Train as this process's rank; the losses of all steps."""
    job = read_job(options.plan, options.graph, options.config, options.model)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_world(job, world)
    stopping.listen()
    if job.config.deterministic:
        devices.deterministic()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = devices.bind(devices.choose(options.device, devices.kinds_of(job.plan), here))
    branches = job.branches
    joined = start_processes(world, device, job.config.timeout_s, max(1, len(branches)))
    branch = None
    if branches:
        assert job.config.branches is not None
        branch = BranchPeer(joined.branch, job.config.branches, joined.attempt, job.config.timeout_s)
        job = branches[branch.number]
    losses = run(job, device, options, joined.store, branch)
    if dist.is_initialized():
        dist.barrier()  # who leaves early closes connections on which others may still wait
        dist.destroy_process_group()
    return losses


def _elastic(config: TrainConfig) -> tuple[int, float] | None:
    """Pool and probability of co-activation sampling, where the configuration asks for it."""
    wanted = config.experts.elastic if config.experts is not None else None
    return None if wanted is None else (wanted.pool, wanted.probability)


def engine_options(job: PreparedRun, expert_map: ExpertMap | None) -> EngineOptions:
    """What the configuration says of the engine."""
    config = job.config
    return EngineOptions(config.seed, config.timeout_s, config.compile,
                         getattr(torch, config.dtype) if config.dtype else None, barrier=config.barrier == "step",
                         expert_map=expert_map, load_factor=config.experts.load_factor if config.experts else None,
                         elastic=_elastic(config), zero=zero_of(config, job.plan, job.graph))


def batches_of(job: PreparedRun, engine: Engine, branch: BranchPeer | None) -> Batches | Prefetched:
    """The batches of this process's copy: its part of the data, or what a branch samples."""
    graph, config = job.graph, job.config
    rows = num_sequences(graph) * job.plan.problem.num_microbatches
    loaded = make_batches(config.data, graph, rows, config.seed, engine.mesh.copy, engine.mesh.num_copies) \
        if branch is None else Batches(BranchRollouts(engine, config, branch, rows), rows, in_turn=True)
    if is_second(graph) and config.adapters is not None and config.adapters.light is not None:
        loaded.resume({"taken": config.adapters.light.steps})  # the first stage had those before
    if config.data.prefetch:
        return Prefetched(loaded, engine.mesh.device.type == "cuda", config.timeout_s)
    return loaded


def run(job: PreparedRun, device: torch.device, options: argparse.Namespace,
        store: dist.Store | None = None, branch: BranchPeer | None = None) -> list[float]:
    """Build the engine and train. ``store``: torchrun's, which lives as long as the run, over all restarts;
    ``branch``: which of several this is."""
    start, began = start_of(options), None
    again = store is not None and store.check([RUN_KEY])
    if store is not None and again and start is Start.FRESH:
        start, began = Start.RESTART, store.get(RUN_KEY).decode()
    check_saving(job.config, start is not Start.FRESH)
    if rank() == 0:
        check_outputs(job.config)
    plan, program, graph, config = job.plan, job.program, job.graph, job.config
    weights = weights_for_host(graph, config)
    sharing = expert_degree(plan.team, graph, max(1, processes.world() // job.processes(1)))
    maps = read_maps(config, graph, sharing)
    engine = Engine(plan, graph, weights, program=program, device=device, options=engine_options(job, maps.get(0)))
    if engine.compiled.uncompiled and rank() == 0:
        tell(options.report, "compile: runs without torch.compile, as ranks exchange rows there, or members of a team"
                             " talk: " + ", ".join(engine.compiled.uncompiled))
    inner: Any = weights
    while isinstance(inner, (LayeredWeights, CutWeights)):
        inner = inner.base
    stored = inner if isinstance(inner, StoredWeights) else None
    del weights, inner  # the whole model, where it was made here
    if config.save is not None:
        from mipipe.runtime.checkpoints.save_check import check_save
        check_save(engine, config, stored)
    batches = batches_of(job, engine, branch)
    shown = options.progress != "none" and (branch is None or not branch.number)
    show = ProgressBar(config.steps, options.progress) if shown else None
    say = functools.partial(tell, options.report)
    stop = Together(branch, stopping.asked, lambda: engine.steps_done) if branch is not None else stopping.asked
    trainer = Trainer(engine, config, batches, show, simulate(plan, program), maps, say, stop)
    if "period" in plan.provenance and config.barrier == "step":
        trainer.say("the plan was made for steps without a barrier; 'barrier: none' in the configuration runs them so")
    otherwise = held_otherwise(plan, config)
    if otherwise is not None:
        trainer.say(otherwise)
    done = trainer.begin(start, began, again)
    if branch is not None:
        check_positions(branch, done)
    if trainer.first:
        if store is not None:
            store.set(RUN_KEY, trainer.run_id)
        announce(options.report, trainer, done, "" if branch is None else f"branch {branch.name}: ")
    losses = trainer.run(done)
    if trainer.light is not None:
        trainer.light.write(config, empty_module(graph, config))
    if config.save is not None:
        from mipipe.runtime.checkpoints.save_check import save_or_rescue
        save_or_rescue(engine, config, stored, replace=start is not Start.FRESH)
    if branch is not None and rank() == 0:
        branch.meet("done")
    if options.report is not None and os.environ.get("LOCAL_RANK", "0") == "0":  # each host has a launcher
        (Path(options.report) / DONE).write_text("")
    return losses


RUN_KEY = "mipipe/run"
"""Where torchrun's store has the id of the run that began."""


def start_of(options: argparse.Namespace) -> Start:
    """How the user wants to begin."""
    return Start.RESUME if options.resume else Start.RESUME_IF_ANY if options.resume_if_any else Start.FRESH


@record
def guarded(options: argparse.Namespace) -> int:
    """Train or merge; a user's error becomes its exit code, everything else torchrun's report."""
    try:
        with no_exit():
            if options.merge:
                from mipipe.runtime.merge.worker import run_prepared
                run_prepared(Path(options.merge), options.device, options.timeline)
            else:
                train(options)
    except MipipeError as error:
        report(options.report, error)
        if isinstance(error, StoppedError) and not stopping.asked():
            return 0  # another worker was asked; torchrun is to restart for its sake only
        if not tells_all(error):
            raise
        if os.environ.get("RANK", "0") == "0" and options.report is None:  # else the launcher says it
            sys.stderr.write(f"mipipe: error: {error}\n")
        return error.exit_code
    except Exception as error:
        report(options.report, error)
        raise
    return 0


def main() -> None:
    """Run the worker and end the process with its exit code, at once.

    Threads of a failed one may wait for a peer that is gone, or hangs; and what libraries do as the interpreter ends (a
    thread that is not joined aborts the process) must not turn a run that is done and saved into a failed one.
    """
    die_with_parent(signal.SIGKILL)
    options = parse_arguments()
    if options.report is not None:  # what an earlier attempt of this rank ended with
        (Path(options.report) / f"error-rank{os.environ.get('RANK', '0')}.json").unlink(missing_ok=True)
    try:
        code = guarded(options)
    except Exception:
        traceback.print_exc()
        code = 1
    for child in multiprocessing.active_children():  # data loaders' workers
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
