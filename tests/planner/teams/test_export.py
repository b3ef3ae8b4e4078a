"""Plans of teams as other engines' options, read back by their documented grammar."""

from __future__ import annotations

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
    assert json.loads(torchtitan_config(every, "order.csv")[0])["activation_checkpoint"] == "selective"
    some = planned(degrees, layers=(3, 3), recompute=["none", *["selective"] * 2, *["none"] * 4, "none"])
    for export in (megatron_flags, bridge_config, lambda plan: torchtitan_config(plan, "order.csv")):
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
    alone = json.loads(torchtitan_config(planned(Degrees(copies=8, zero=3)), "none.csv")[0])["parallelism"]
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
