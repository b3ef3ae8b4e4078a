"""Plans of teams as other engines' options, read back by their documented grammar."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
from team_machine import machine

from mipipe.graphs.errors import InputError
from mipipe.planner.execution.export import read_torch_csv
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.export import bridge_config, megatron_flags, pipeline_layout, torchtitan_config
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pricing import Pricer

GLOBAL = 32


@pytest.fixture(scope="module")
def planned(pieces):
    """A function: degrees, and more for `evaluate_teams` -> the plan."""
    pricer = Pricer(pieces, machine())
    return lambda degrees, **more: evaluate_teams(pricer, degrees, GLOBAL, **more).plan


def stages_of(layout):
    """What Megatron's documentation says of a layout string: groups and symbols are repeated, commas mean nothing,
    stages end at a bar."""
    text = layout.replace(",", "")
    while match := re.search(r"\(([^()]*)\)\*(\d+)|(\w)\*(\d+)", text):
        times = int(match[2] or match[4])
        text = text[:match.start()] + (match[1] or match[3]) * times + text[match.end():]
    return text.split("|")


@pytest.mark.parametrize("layers", [(6,), (3, 3), (1,) * 6, (4, 4, 4, 4, 3), (0, 3, 3, 0), (5, 0, 5), (9, 8, 8)])
def test_layout_strings_say_the_layers(layers):
    stages = stages_of(pipeline_layout(layers))
    assert [stage.count("t") for stage in stages] == list(layers)
    assert stages[0].startswith("E") and stages[-1].endswith("L")
    assert "".join(stages).count("E") == "".join(stages).count("L") == 1


def test_megatron(planned):
    """Every degree, the layout, batch sizes and recomputation; the sharded optimizer as ZeRO-1."""
    plan = planned(Degrees(ranks=2, tensor=2, sequence=True, context=2, copies=4, chunks=1, microbatch=2,
                           recompute="full"), layers=(2, 4))
    flags = dict(line.split(" ", 1) if " " in line else (line, "") for line in megatron_flags(plan).splitlines())
    assert stages_of(flags.pop("--pipeline-model-parallel-layout").strip('"')) == ["Ett", "ttttL"]
    assert flags == {
        "--tensor-model-parallel-size": "2", "--pipeline-model-parallel-size": "2", "--context-parallel-size": "2",
        "--sequence-parallel": "", "--num-layers": "6", "--micro-batch-size": "2", "--global-batch-size": "32",
        "--use-distributed-optimizer": "", "--recompute-granularity": "full", "--recompute-method": "uniform",
        "--recompute-num-layers": "1"}
    found = json.loads(bridge_config(plan))
    assert found["model"]["tensor_model_parallel_size"] == 2 and found["model"]["sequence_parallel"] is True
    assert found["train"] == {"micro_batch_size": 2, "global_batch_size": 32}
    assert found["ddp"] == {"use_distributed_optimizer": True}


def test_some_layers_run_again(planned):
    """As many in every stage are Megatron's ``block``; other numbers nobody can say."""
    modes = lambda *again: ["none", *("full" if layer in again else "none" for layer in range(6)), "none"]  # noqa: E731
    degrees = Degrees(ranks=2, copies=4, tensor=2)
    even = planned(degrees, layers=(3, 3), recompute=modes(0, 3))
    assert "--recompute-method block\n--recompute-num-layers 1\n" in megatron_flags(even)
    with pytest.raises(InputError, match=r"Megatron-LM takes as many layers .* here they are \[2, 0\]"):
        megatron_flags(planned(degrees, layers=(3, 3), recompute=modes(0, 1)))
    with pytest.raises(InputError, match="torchtitan takes recomputation of all layers or of none"):
        torchtitan_config(even, "order.csv")


def test_attention_runs_again_in_all_layers_or_is_refused(planned):
    degrees = Degrees(ranks=2, copies=4, tensor=2)
    every = planned(degrees, layers=(3, 3), recompute=["none", *["selective"] * 6, "none"])
    assert "--recompute-modules core_attn\n" in megatron_flags(every)
    with pytest.raises(InputError, match="torchtitan takes recomputation of all layers or of none"):
        torchtitan_config(every, "order.csv")
    some = planned(degrees, layers=(3, 3), recompute=["none", *["selective"] * 2, *["none"] * 4, "none"])
    for export in (megatron_flags, bridge_config):
        with pytest.raises(InputError, match=r"attention that run again in all layers or .* here they do in 2 of 6"):
            export(some)


def test_torchtitan(planned):
    """The names of its ParallelismConfig, modules of every stage, and the order as its schedule runtime reads it."""
    plan = planned(Degrees(ranks=2, tensor=2, copies=4, chunks=2, zero=1), layers=(1, 2, 2, 1), schedule="interleaved")
    text, order = torchtitan_config(plan, "order.csv")
    data = json.loads(text)
    parallelism = data["parallelism"]
    assert parallelism.pop("module_fqns_per_model_part") == [
        ["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["layers.3", "layers.4"],
        ["layers.5", "norm", "lm_head"]]
    assert parallelism == {
        "data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 4, "fsdp_reshard_after_forward": "never",
        "tensor_parallel_degree": 2, "enable_sequence_parallel": False, "context_parallel_degree": 1,
        "expert_parallel_degree": 1, "pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B",
        "pipeline_parallel_schedule_csv": "order.csv", "pipeline_parallel_microbatch_size": 1}
    assert data["training"] == {"local_batch_size": 8, "global_batch_size": 32}
    assert read_torch_csv(order) == tuple(rank.compute for rank in plan.schedule.ranks)
    whole = json.loads(torchtitan_config(planned(Degrees(copies=8, zero=3)), "none.csv")[0])
    alone, batch = whole["parallelism"], whole["training"]  # its trainer accumulates over microbatches by itself
    assert (batch["local_batch_size"], batch["global_batch_size"]) == (1, 32)
    assert alone["fsdp_reshard_after_forward"] == "always" and "pipeline_parallel_schedule_csv" not in alone


def test_what_engines_cannot_say(planned):
    """One line each, with what would do."""
    split = planned(Degrees(ranks=2, copies=4), schedule="zb-h1")
    with pytest.raises(InputError, match="1F1B and interleaved 1F1B; this plan's schedule is ZB-H1"):
        megatron_flags(split)
    assert "order.csv" in torchtitan_config(split, "order.csv")[0]
    with pytest.raises(InputError, match="ZeRO-1 with a pipeline; this plan has ZeRO-3"):
        megatron_flags(planned(Degrees(ranks=2, copies=4, zero=3)))
    plain = planned(Degrees(ranks=2, copies=4))
    with pytest.raises(InputError, match="has no degrees to export to torchtitan"):
        torchtitan_config(replace(plain, team=None), "order.csv")
    two = plain.provenance["team"] | {"branches": ["text", "vision"]}
    with pytest.raises(InputError, match="this model has the branches text, vision"):
        megatron_flags(replace(plain, provenance={**plain.provenance, "team": two}))


def with_experts(plan, expert):
    """The plan as that of a model whose banks are divided over groups of so many devices."""
    facts = plan.provenance["team"] | {"experts": True}
    return replace(plan, team=replace(plan.team, expert=expert), provenance={**plan.provenance, "team": facts})


@pytest.fixture(scope="module")
def meshes(planned):
    """Plans of all small combinations of degrees and ways to share state, of a model without experts and with."""
    found = []
    for ranks, tensor, sequence, context, copies, zero in itertools.product(
            (1, 2), (1, 2), (False, True), (1, 2), (1, 2), range(4)):
        if not (sequence and tensor == 1):
            plan = planned(Degrees(ranks, tensor, sequence, context, 1, copies, zero=zero))
            found += [plan, *(with_experts(plan, expert) for expert in (1, 2, 4, 8)
                              if tensor * context * copies % expert == 0)]
    return found


def degrees_in(plan):
    team, experts = plan.team, plan.provenance["team"]["experts"]
    return (plan.problem.num_ranks, team.axes.get("tensor", 1), team.axes.get("context", 1), team.copies, team.expert,
            any(item.mode == "sequence" for item in team.modes), team.zero, experts)


def test_megatron_runs_every_combination_as_planned_or_it_is_refused(meshes):
    """Megatron's own rules (validate_args, parallel_state) give the plan's groups and shares of state back."""
    said = 0
    for plan in meshes:
        ranks, tensor, context, copies, expert, sequence, zero, experts = degrees_in(plan)
        shares = copies * context > 1
        whole_experts = experts and tensor * context * copies > expert
        says = not (experts and tensor > 1 and not sequence) and not (zero > 1 and shares and ranks > 1) \
            and not (zero > 1 and whole_experts)
        if not says:
            with pytest.raises(InputError, match="Megatron-LM takes"):
                megatron_flags(plan)
            continue
        flags = dict(line.split(" ", 1) if " " in line else (line, "") for line in megatron_flags(plan).splitlines())
        said += 1
        own_tensor = int(flags["--tensor-model-parallel-size"])
        assert (own_tensor, int(flags["--context-parallel-size"]), int(flags["--pipeline-model-parallel-size"])) \
            == (tensor, context, ranks)
        assert ("--sequence-parallel" in flags) == sequence
        own_expert = int(flags.get("--expert-model-parallel-size", 1))
        divides = int(flags.get("--expert-tensor-parallel-size", own_tensor))
        assert not experts or (own_expert, divides) == (expert, 1)
        assert experts or "--expert-model-parallel-size" not in flags
        assert ("--use-distributed-optimizer" in flags) == (zero > 0 and shares)
        strategy = flags.get("--data-parallel-sharding-strategy") if "--use-megatron-fsdp" in flags else None
        assert strategy == (None if zero < 2 or not shares else ("optim_grads", "optim_grads_params")[zero - 2])
        assert strategy is None or flags["--ckpt-format"] == "fsdp_dtensor"
        bridge = json.loads(bridge_config(plan))
        fsdp = [bridge.get(section, {}).get("use_megatron_fsdp", False) for section in ("ddp", "dist")]
        assert fsdp == [strategy is not None] * 2
        assert bridge["model"].get("gradient_accumulation_fusion", True) == (strategy is None)
    assert said > 60


def test_torchtitan_runs_every_combination_as_planned_or_it_is_refused(meshes):
    """The rules of torchtitan's ParallelDims: experts' groups are of whole tensor x context groups within the shards,
    and FSDP shards over context."""
    said = 0
    for plan in meshes:
        ranks, tensor, context, copies, expert, sequence, zero, experts = degrees_in(plan)
        shard = copies if zero else 1
        says = not (experts and expert == 1 and tensor > 1) and not (zero == 0 and context > 1) \
            and (expert == 1 or (expert % (tensor * context) == 0 and shard * tensor * context % expert == 0)) \
            and not (experts and zero > 1 and tensor * context * copies > expert)
        if not says:
            with pytest.raises(InputError, match="torchtitan takes"):
                torchtitan_config(plan, "order.csv")
            continue
        said += 1
        own = json.loads(torchtitan_config(plan, "order.csv")[0])["parallelism"]
        assert (own["pipeline_parallel_degree"], own["tensor_parallel_degree"], own["context_parallel_degree"],
                own["expert_parallel_degree"]) == (ranks, tensor, context, expert)
        assert (own["data_parallel_replicate_degree"], own["data_parallel_shard_degree"]) == (copies // shard, shard)
        assert own["enable_sequence_parallel"] == sequence
        assert (own["fsdp_reshard_after_forward"] == "always") == (zero == 3)
    assert said > 60


def test_odd_parts_of_a_sequence_and_old_plans(planned):
    plan = planned(Degrees(context=4, copies=2))
    facts = plan.provenance["team"]
    odd = replace(plan, provenance={**plan.provenance, "team": facts | {"tokens": 508}})
    with pytest.raises(InputError, match="in multiples of 2 x context = 8 tokens; this plan's have 508"):
        megatron_flags(odd)
    old = replace(plan, provenance={**plan.provenance, "team": {name: value for name, value in facts.items()
                                                                if name != "experts"}})
    with pytest.raises(InputError, match="does not say whether its model has experts, and its tokens; plan again"):
        megatron_flags(old)
