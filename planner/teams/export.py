"""A plan of teams as options of the engines that large runs use: Megatron-LM, Megatron-Bridge, torchtitan.

What an engine cannot say is refused; nothing is rounded to what it can. Grammar and names are those of Megatron Core's
documentation ("Custom Pipeline Model Parallel Layout", "Parallelism Strategies Guide") and of torchtitan 0.3's
``torchtitan/config/configs.py``.

Legend: P ranks, v stages per rank; stage s of a chain is on rank s mod P.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mipipe.graphs.errors import InputError, PlanError
from mipipe.planner.execution.export import torch_csv
from mipipe.planner.plan import Plan
from mipipe.planner.team import Team


@dataclass(frozen=True, slots=True)
class Configuration:
    """What engines are told of a plan. ``recompute``: none, latents, selective, full, or ``block`` with layers per
    stage; ``tokens`` of a sequence (None: the model has none)."""

    team: Team
    ranks: int
    chunks: int
    layers: tuple[int, ...]
    schedule: str
    microbatch: int
    microbatches: int
    recompute: str
    block: int
    turned: bool
    experts: bool
    tokens: int | None

    @property
    def tensor(self) -> int:
        return self.team.axes.get("tensor", 1)

    @property
    def context(self) -> int:
        return self.team.axes.get("context", 1)

    @property
    def shards(self) -> int:
        """Devices that have the same parameters, but for experts: what ZeRO divides is divided over them."""
        return self.context * self.team.copies

    @property
    def expert_shards(self) -> int:
        """Devices that have the same experts."""
        return self.tensor * self.shards // self.team.expert

    @property
    def sequence(self) -> bool:
        return any(item.mode == "sequence" and not item.segments for item in self.team.modes)

    @property
    def global_batch(self) -> int:
        return self.microbatch * self.microbatches * self.team.copies


def configuration(plan: Plan, engine: str) -> Configuration:
    """What an engine is told of a plan.

    Raises:
        InputError: the plan is of single devices, or of something that no engine here takes: branches, modes of some
            segments, a stage on several ranks, layers that differ in what runs again.
    """
    team, facts = plan.team, plan.provenance.get("team")
    if team is None or not isinstance(facts, dict):
        raise InputError(f"plan {plan.name}: has no degrees to export to {engine}; plan with --global-batch")
    layers, branches = facts.get("layers"), facts.get("branches")
    if not isinstance(branches, list) or not isinstance(layers, list) or len(layers) != len(plan.placement.stages) \
            or not all(isinstance(count, int) and 0 <= count < 10_000 for count in layers):
        raise InputError(f"plan {plan.name}: does not say the layers of its {len(plan.placement.stages)} stages; plan"
                         " again with this version of mipipe")
    experts, tokens = facts.get("experts"), facts.get("tokens")
    if not isinstance(experts, bool) or not (tokens is None or isinstance(tokens, int)):
        raise InputError(f"plan {plan.name}: does not say whether its model has experts, and its tokens; plan again"
                         " with this version of mipipe")
    if len(branches) > 1:
        raise _cannot(plan, engine, f"layouts of one chain of layers; this model has the branches"
                                    f" {', '.join(map(str, branches))}")
    apart = [item for item in team.modes if item.segments and item.mode != "expert"]
    if apart:
        raise _cannot(plan, engine, f"one mode for all layers; this plan has {apart[0].mode} for some")
    ranks, stages = plan.problem.num_ranks, plan.placement.stages
    homes = [stage.ranks[0] for stage in stages]
    chunks = -(-len(stages) // ranks)
    looped = homes == [number % ranks for number in range(len(stages))]
    turned = chunks == 2 and homes == [*range(ranks), *reversed(range(ranks))]
    if any(len(stage.ranks) > 1 for stage in stages) or not (looped or turned):
        raise _cannot(plan, engine, "chains of stages, interleaved or in a V, each stage on one rank")
    recompute, block = _recompute(plan, team, engine, sum(layers))
    found = Configuration(team, ranks, chunks, tuple(layers), str(facts.get("schedule")), team.microbatch,
                          plan.problem.num_microbatches, recompute, block, turned, experts, tokens)
    if found.context > 1 and found.tokens is not None and found.tokens % (2 * found.context):
        raise _cannot(plan, engine, f"sequences in multiples of 2 x context = {2 * found.context} tokens; this plan's"
                                    f" have {found.tokens}")
    if found.experts and team.zero > 1 and found.expert_shards > 1:
        raise _cannot(plan, engine, f"ZeRO-{team.zero} of all parameters; this plan's experts are whole on the"
                                    f" {found.expert_shards} devices that hold the same; plan with --degrees zero=1")
    return found


def _recompute(plan: Plan, team: Team, engine: str, layers: int) -> tuple[str, int]:
    ways = {"layers": team.again, "attention": team.attention_again, "up-projections": team.latents_again}
    found = [name for name, again in ways.items() if again]
    if not found:
        return "none", 0
    if len(found) > 1:
        raise _cannot(plan, engine, f"one way of recomputation; this plan has {' and '.join(found)} that run again")
    for way, segments in (("selective", team.attention_again), ("latents", team.latents_again)):
        if segments:
            if len(segments) != layers:
                raise _cannot(plan, engine, f"{found[0]} that run again in all layers or in none; here they do in"
                                            f" {len(segments)} of {layers}; plan with --recomputation {way}")
            return way, 0
    counts = [sum(bool(run) and run[0] in group.segments for run in team.again) for group in plan.problem.groups]
    if sum(counts) == layers:
        return "full", 0
    if len(set(counts)) > 1:
        raise _cannot(plan, engine, f"as many layers that run again in every stage; here they are {counts}; plan with"
                                    " --recomputation none, latents, selective or full")
    return "block", counts[0]


def _cannot(plan: Plan, engine: str, what: str) -> InputError:
    return InputError(f"plan {plan.name}: {engine} takes {what}")


def pipeline_layout(layers: tuple[int, ...]) -> str:
    """Megatron's layout string of stages in the order of the forward, equal neighbours counted: ``Et*3|(tt|)*2tL``."""
    stages = ["t" * count for count in layers]
    stages[0] = "E" + stages[0]
    stages[-1] += "L"
    text, place = "", 0
    while place < len(stages):
        times = 1
        while place + times < len(stages) - 1 and stages[place + times] == stages[place]:
            times += 1
        last = place + times == len(stages)
        short = stages[place] if len(stages[place]) < 4 else _counted(stages[place])
        text += short if last else f"({short}|)*{times}" if times > 1 else f"{short}|"
        place += times
    return text


def _counted(stage: str) -> str:
    count = stage.count("t")
    return stage.replace("t" * count, f"t*{count}") if count > 2 else stage


def megatron_options(plan: Plan, engine: str = "Megatron-LM") -> dict[str, Any]:
    """Megatron's options by the names of its command line, without dashes in front; True: a flag.

    Raises:
        InputError: Megatron cannot express the plan.
    """
    found = configuration(plan, engine)
    team = found.team
    if found.ranks > 1 and (found.turned or found.schedule.lower() not in ("1f1b", "interleaved 1f1b")):
        raise _cannot(plan, engine, f"1F1B and interleaved 1F1B; this plan's schedule is {found.schedule}; plan with"
                                    " --schedule 1f1b or interleaved")
    if found.chunks > 1 and found.microbatches % found.ranks:
        raise _cannot(plan, engine, f"microbatches in multiples of the {found.ranks} ranks where stages are"
                                    f" interleaved; this plan has {found.microbatches}")
    if team.zero > 1 and found.shards > 1 and found.ranks > 1:
        raise _cannot(plan, engine, f"ZeRO-1 with a pipeline; this plan has ZeRO-{team.zero}; plan with --degrees"
                                    " zero=1")
    if found.experts and found.tensor > 1 and not found.sequence:
        raise _cannot(plan, engine, f"models with experts on tensor members in sequence mode; this plan has tensor="
                                    f"{found.tensor}; plan with --degrees sequence={found.tensor}")
    options: dict[str, Any] = {
        "tensor-model-parallel-size": found.tensor, "pipeline-model-parallel-size": found.ranks,
        "context-parallel-size": found.context}
    if found.sequence:
        options["sequence-parallel"] = True
    if found.ranks > 1:
        options["pipeline-model-parallel-layout"] = pipeline_layout(found.layers)
    if found.experts and team.expert * found.tensor > 1:  # banks are whole: else Megatron divides them as tensor does
        options |= {"expert-model-parallel-size": team.expert, "expert-tensor-parallel-size": 1}
    options |= {"num-layers": sum(found.layers), "micro-batch-size": found.microbatch,
                "global-batch-size": found.global_batch}
    if team.zero > 0 and found.shards > 1:
        options["use-distributed-optimizer"] = True
    if team.zero > 1 and found.shards > 1:
        options |= {"use-megatron-fsdp": True, "data-parallel-sharding-strategy":
                    "optim_grads" if team.zero == 2 else "optim_grads_params",
                    "no-gradient-accumulation-fusion": True, "ckpt-format": "fsdp_dtensor"}
    modules = {"selective": "core_attn", "latents": "mla_up_proj"}.get(found.recompute)
    if modules is not None:
        options |= {"recompute-granularity": "selective", "recompute-modules": modules}
    elif found.recompute != "none":
        options |= {"recompute-granularity": "full", "recompute-method": "block" if found.block else "uniform",
                    "recompute-num-layers": found.block or 1}
    return options


def megatron_flags(plan: Plan) -> str:
    """Megatron-LM's options as its command line takes them, one a line; raises as `megatron_options`."""
    def line(name: str, value: Any) -> str:
        shown = f'"{value}"' if isinstance(value, str) and not value.replace("_", "").isalnum() else value
        return f"--{name}" + ("" if value is True else f" {shown}")

    return "".join(f"{line(name, value)}\n" for name, value in megatron_options(plan).items())


_BRIDGE = {"micro-batch-size": "train", "global-batch-size": "train", "use-distributed-optimizer": "ddp",
           "use-megatron-fsdp": "ddp", "data-parallel-sharding-strategy": "ddp", "ckpt-format": "checkpoint"}
"""The sections of Megatron-Bridge's ConfigContainer that options are in; all others are the model's."""


def bridge_config(plan: Plan) -> str:
    """The same as overrides of Megatron-Bridge's ConfigContainer, in JSON; raises as `megatron_options`."""
    sections: dict[str, dict[str, Any]] = {"model": {}, "train": {}, "ddp": {}, "dist": {}, "checkpoint": {}}
    for name, value in megatron_options(plan, "Megatron-Bridge").items():
        key = name.replace("-", "_")
        if key == "use_megatron_fsdp":
            sections["dist"][key] = value
        if key.startswith("no_"):
            key, value = key.removeprefix("no_"), False
        sections[_BRIDGE.get(name, "model")][key] = [value] if key == "recompute_modules" else value
    return json.dumps({name: found for name, found in sections.items() if found}, indent=2) + "\n"


def torchtitan_config(plan: Plan, csv_file: str) -> tuple[str, str | None]:
    """Fields of torchtitan's ``ParallelismConfig`` and others as JSON, and the schedule's CSV (None: no pipeline).

    ``csv_file``: the name under which the CSV will be. Optimizer state or gradients that copies share (ZeRO-1, ZeRO-2)
    are FSDP that keeps parameters after the forward; ZeRO-3 is FSDP that does not.

    Raises:
        InputError: torchtitan cannot express the plan.
    """
    found = configuration(plan, "torchtitan")
    team = found.team
    if found.recompute not in ("none", "full"):
        raise _cannot(plan, "torchtitan", "recomputation of all layers or of none (its selective mode keeps attention"
                                          " and repeats the rest); plan with --recomputation none or full")
    shards = team.zero > 0 and team.copies > 1
    if not team.zero and found.context > 1:
        raise _cannot(plan, "torchtitan", "context members only with what FSDP divides over them; this plan has"
                                          " zero=0; plan with --degrees zero=1, 2 or 3")
    _check_experts(plan, found, found.context * (team.copies if shards else 1))
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": 1 if shards else team.copies,
        "data_parallel_shard_degree": team.copies if shards else 1,
        "fsdp_reshard_after_forward": "always" if team.zero == 3 else "never",
        "tensor_parallel_degree": found.tensor, "enable_sequence_parallel": found.sequence,
        "context_parallel_degree": found.context, "expert_parallel_degree": team.expert,
        "pipeline_parallel_degree": found.ranks}
    order = None
    if found.ranks > 1:
        try:
            order = torch_csv(plan)
        except PlanError as error:
            raise _cannot(plan, "torchtitan", f"orders of torch's schedule runtime: {error}") from None
        parallelism |= {
            "module_fqns_per_model_part": _module_names(found.layers),
            "pipeline_parallel_schedule": "ZBVZeroBubble" if found.turned else
            "Interleaved1F1B" if found.chunks > 1 else "1F1B",
            "pipeline_parallel_schedule_csv": csv_file, "pipeline_parallel_microbatch_size": found.microbatch}
    at_once = found.microbatches if found.ranks > 1 else 1  # without a pipeline the trainer accumulates over steps
    data = {"parallelism": parallelism, "activation_checkpoint": found.recompute,
            "training": {"local_batch_size": found.microbatch * at_once,
                         "global_batch_size": found.global_batch}}
    return json.dumps(data, indent=2) + "\n", order


def _check_experts(plan: Plan, found: Configuration, shards: int) -> None:
    """Raise `InputError` where torchtitan's meshes have no place for groups of whole experts: they are made of all
    tensor and context members and of devices that FSDP shards over (``shards`` with context); without groups tensor
    members divide every expert."""
    inner, expert = found.tensor * found.context, found.team.expert
    if found.experts and expert == 1 and found.tensor > 1:
        raise _cannot(plan, "torchtitan", f"experts divided as tensor={found.tensor} divides all else; this plan's are"
                                          f" whole; plan with --degrees expert={inner}")
    if expert > 1 and expert % inner:
        raise _cannot(plan, "torchtitan", f"groups of experts of all tensor x context = {inner} members; this plan has"
                                          f" expert={expert}")
    if expert > 1 and found.tensor * shards % expert:
        raise _cannot(plan, "torchtitan", f"groups of experts over copies that share optimizer state; this plan has"
                                          f" expert={expert}, zero={found.team.zero}; plan with --degrees zero=1")


def _module_names(layers: tuple[int, ...]) -> list[list[str]]:
    """The modules of every stage, by torchtitan's names."""
    found, first = [], 0
    for count in layers:
        found.append([f"layers.{number}" for number in range(first, first + count)])
        first += count
    found[0].insert(0, "tok_embeddings")
    found[-1] += ["norm", "lm_head"]
    return found
