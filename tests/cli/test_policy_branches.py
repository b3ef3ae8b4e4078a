"""Branches that train side by side and teach each other (CoPD): planned, run, averaged, and the same as by hand."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import recipe_loader
import torch
import torch.distributed as dist
import yaml
from recipe_runs import cluster, mipipe, write

from mipipe.graphs.capture.model import capture
from mipipe.graphs.cluster import shipped_kinds
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.graphs.topology import Topology
from mipipe.planner.policy_branches import (
    BranchPlan,
    branch_problems,
    exchange_bytes,
    exchange_ns,
    plan_branches,
    shares,
)
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.policy_branches import BranchPeer, BranchRollouts, Together
from mipipe.runtime.train.config import TrainConfig, read_train_config
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.models import initial_weights
from mipipe.runtime.train.policy_branches import BranchesConfig, TaskConfig, apart
from mipipe.runtime.train.training import Trainer

TASKS = {"even": TaskConfig("recipe_loader:answers"), "odd": TaskConfig("recipe_loader:answers", {"even": False})}
LOSS = {"name": "grpo", "options": {"old_from": "current", "deviation": True, "distill": 0.5}}
BRANCHES = {"tasks": {name: {"source": task.source, "options": task.options} for name, task in TASKS.items()},
            "rewarded": 2, "taught": 2}


def test_who_teaches_whom():
    """Two branches teach each other; of more the first is the hub, taught by the others in turn; one has no teacher."""
    two = BranchesConfig(TASKS, 2, 1)
    assert [two.teachers(step) for step in range(4)] == [{}, {}, {0: 1, 1: 0}, {}]
    three = BranchesConfig({**TASKS, "third": TASKS["odd"]}, 1, 3)
    assert [three.teachers(step) for step in (0, 1, 2, 3, 5)] == [{}, {0: 1, 1: 0, 2: 0}, {0: 2, 1: 0, 2: 0},
                                                                 {0: 1, 1: 0, 2: 0}, {0: 2, 1: 0, 2: 0}]
    assert BranchesConfig({"even": TASKS["even"]}, 0, 1).teachers(0) == {}
    assert apart("out/metrics.jsonl", "even") == "out/metrics.even.jsonl"


def test_shares_of_a_cluster():
    """Equal blocks of devices; shares that are alike are solved once; the first device of each has less memory."""
    assert shares(6, 3) == ((0, 1), (2, 3), (4, 5))
    with pytest.raises(InputError, match="5 devices cannot be divided into so many equal shares"):
        shares(5, 2)
    problem = uniform_problem(ranks=4, microbatches=2, f=2, i=2, w=1, copies=1)
    memory = problem.topology.devices[0].memory_bytes
    own, other = branch_problems(problem, 2, 10)
    assert [device.memory_bytes for device in own.topology.devices] == [memory - 10, memory]
    assert [device.name for device in other.topology.devices] == [item.name for item in problem.topology.devices[2:]]
    with pytest.raises(InfeasibleError, match="the branch's copy of the policy takes"):
        branch_problems(problem, 2, memory + 1)
    solved = []

    def solve(part):
        solved.append(part)
        return BASELINES[0].plan(part)

    found = plan_branches(problem, 2, 10, solve)
    assert len(solved) == 1 and found.devices == ((0, 1), (2, 3))
    assert found.plans[1].problem == other and found.plans[0].placement == found.plans[1].placement
    with pytest.raises(InputError, match="expected as many in each branch"):
        BranchPlan(found.plans, ((0, 1), (2,)), 10)
    link = Topology.uniform(4, latency_ns=7, bytes_per_s=10**9, kind="cpu")
    assert exchange_bytes(64) == 32 * 24 and exchange_ns(link, ((0, 1), (2, 3)), 64) == 2 * 7 + 32 * 24


@pytest.mark.parametrize("make, text", [
    (lambda: BranchesConfig({}), "found none; expected tasks by name"),
    (lambda: BranchesConfig({"a/b": TASKS["odd"]}), "found the name 'a/b'; expected tasks by name"),
    (lambda: BranchesConfig(TASKS, 0, 0), "at least one step in a cycle"),
    (lambda: TaskConfig("answers"), "expected a function as package.module:name"),
    (lambda: TrainConfig(2, branches=BranchesConfig(TASKS)), "grpo with distill above 0"),
    (lambda: TrainConfig(2, loss="grpo", branches=BranchesConfig(TASKS)), "grpo with distill above 0"),
])
def test_what_cannot_be_branches_is_one_line(make, text):
    with pytest.raises(InputError, match=text) as error:
        make()
    assert "\n" not in str(error.value)


def trained(name, ranks, steps, start="", copies=1, **more):
    """A run of two branches of ``ranks`` devices: the records of each, by branch."""
    config = write(name, loss=LOSS, branches=BRANCHES, steps=steps, save={"folder": f"{name}-out"}, seed=5, data={},
                   optimizer={"name": "adamw", "lr": 1e-2}, **more)
    mipipe("capture", "base", "--seq", 8, "--batch", 4 // copies, "--config", config, "-o", f"{name}.json")
    said = mipipe("plan", f"{name}.json", "--cluster", cluster(2 * ranks), "--microbatches", 2, "--branches", 2,
                  "--time-limit", 2, "-o", f"{name}-plan.json")
    assert "each branch's first device keeps a copy of the policy" in said and "a taught step" in said
    mipipe("train", "--plan", f"{name}-plan.json", "--graph", f"{name}.json", "--config", config, "--device", "cpu",
           "--copies", copies, *([start] if start else []))
    return {task: [json.loads(line) for line in Path(f"{name}.{task}.jsonl").read_text().splitlines()]
            for task in TASKS}


def by_hand(steps):
    """The same in a plain loop over two models in this process: losses of each, and the weights in the end."""
    from transformers import AutoModelForCausalLM

    from mipipe.runtime.recipes.policy_branches import log_probs
    config = BranchesConfig(TASKS, BRANCHES["rewarded"], BRANCHES["taught"])
    policies = [AutoModelForCausalLM.from_pretrained("base").eval() for _ in TASKS]
    optimizers = [torch.optim.AdamW(policy.parameters(), lr=1e-2) for policy in policies]
    losses = [[] for _ in TASKS]
    for step in range(steps):
        teachers, batches = config.teachers(step), []
        for number, policy in enumerate(policies):
            parts = []
            for task, rows in ((number, 4), (teachers[number], 4)) if teachers else ((number, 8),):
                draw = torch.Generator().manual_seed((5 * 1_000_003 + step) * 64 + number * 8 + task)
                with torch.no_grad():
                    parts.append(recipe_loader.answers(policy, rows, draw, even=task == 0))
            parts[0]["teacher"] = None
            if teachers:
                parts[1]["teacher"] = log_probs(policies[teachers[number]], {
                    key: parts[1][key] for key in ("input_ids", "labels")})
            batches.append(parts)
        for number, (policy, parts) in enumerate(zip(policies, batches, strict=True)):
            terms, groups = [], sum(len(part["rewards"]) // 2 for part in parts)
            for part in parts:
                logs = policy(input_ids=part["input_ids"], use_cache=False).logits.log_softmax(-1)[:, :-1]
                own = logs.gather(-1, part["input_ids"][:, 1:, None])[..., 0][:, 1:]
                rewards = part["rewards"].double() if part["teacher"] is None else torch.zeros(len(own)).double()
                pairs = rewards.view(-1, 2)
                a = (pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, unbiased=False, keepdim=True) + 1e-6)
                a = a.view(-1, 1).expand(own.shape)
                if part["teacher"] is not None:
                    a = a + 0.5 * (part["teacher"][:, 2:] - own.detach()).clamp(-5, 5)
                terms.append(-((own - own.detach()).exp() * a).mean(1).sum() / 2 / groups)
            loss = sum(terms)
            optimizers[number].zero_grad()
            loss.backward()
            optimizers[number].step()
            losses[number].append(loss.item())
    return losses, [policy.state_dict() for policy in policies]


def test_two_branches_in_threads_are_a_loop_by_hand(place):
    """Both engines, samplers and teachers in this process, with a store between them: losses of five steps."""
    config = read_train_config(write("threads", loss=LOSS, branches=BRANCHES, steps=5, seed=5, data={},
                                     optimizer={"name": "adamw", "lr": 1e-2}))
    graph = capture("base", seq=8, batch=4, recipe=config.recipe, verify=False)
    problem = uniform_pair(graph)
    store, found = dist.HashStore(), {}

    def branch(number):
        own = BranchPeer(number, config.branches, store, 60.0)
        settings = config.of_branch(own.name)
        engine = Engine(BASELINES[0].plan(problem), graph, initial_weights(graph, settings))
        trainer = Trainer(engine, settings, Batches(BranchRollouts(engine, settings, own, 8), 8),
                          stop=Together(own, lambda: False, lambda: engine.steps_done))
        found[number] = trainer.run()

    threads = [threading.Thread(target=branch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, losses in enumerate(by_hand(5)[0]):
        assert found[number] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert abs(found[0][2]) > 1e-3


def uniform_pair(graph):
    """The problem of two microbatches on one device."""
    coarse = coarsen(graph, num_groups=2)
    costs = roofline(coarse, graph, {"cpu": dataclasses.replace(shipped_kinds()["h100"], name="cpu")})
    return build_problem(coarse, costs, Topology.uniform(1, kind="cpu"), num_microbatches=2)


@pytest.mark.slow
@pytest.mark.distributed
def test_branches_of_one_and_of_two_devices_are_a_loop_by_hand(place):
    """Losses, the weights of each branch, and their mean; two devices each, and two copies of one."""
    from safetensors.torch import load_file
    losses, states = by_hand(6)
    for name, ranks, copies in (("one", 1, 1), ("two", 2, 1), ("copies", 1, 2)):
        records = trained(name, ranks, 6, copies=copies)
        for number, task in enumerate(TASKS):
            own = [record["loss_metrics/global_avg_loss"] for record in records[task]]
            assert own == pytest.approx(losses[number], rel=1e-3, abs=2e-5), (name, task)
            for key, item in load_file(f"{name}-out.{task}/model.safetensors").items():
                assert torch.allclose(item, states[number][key], rtol=1e-2, atol=1e-4), (name, task, key)
        for key, item in load_file(f"{name}-out/model.safetensors").items():
            parts = [load_file(f"{name}-out.{task}/model.safetensors")[key] for task in TASKS]
            assert torch.allclose(item, (parts[0] + parts[1]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_supervisor_has_one_plan(place):
    """Several branches, and the two stages of Light-PEFT, which --elastic would train as one, are refused by it."""
    light = {"steps": 2, "folder": "light"}
    adapters = {"method": "light-peft", "rank": 4, "targets": "re:_proj$", "light": light}
    for name, options, devices, text in (
            ("several", {"loss": LOSS, "branches": BRANCHES, "data": {}}, 2, "every branch has a plan"),
            ("staged", {"adapters": adapters}, 1, "both stages of light-peft have a plan")):
        config = write(name, steps=4, **options)
        mipipe("capture", "base", "--seq", 8, "--batch", 4, "--config", config, "-o", f"{name}.json")
        mipipe("plan", f"{name}.json", "--cluster", cluster(devices), "--microbatches", 2, "--time-limit", 2, "-o",
               f"{name}-plan.json", *(["--branches", 2] if devices > 1 else []))
        said = mipipe("train", "--plan", f"{name}-plan.json", "--graph", f"{name}.json", "--config", config, "--device",
                      "cpu", "--elastic", code=1)
        assert f"--elastic makes one plan again, but {text}; use --max-restarts" in said.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.distributed
def test_branches_resume_and_refuse(place):
    """Checkpoints of all branches after one step; what was one run is one; bad tasks are one line."""
    whole = trained("whole", 1, 5)
    trained("parts", 1, 3, checkpoint={"folder": "kept", "every": 1})
    later = trained("parts", 1, 5, "--resume", checkpoint={"folder": "kept", "every": 1})
    for task in TASKS:
        first, second = ([record["loss_metrics/global_avg_loss"] for record in found[task]] for found in (whole, later))
        assert second == pytest.approx(first, rel=1e-6, abs=1e-9)
    odd = yaml.safe_load(Path("whole.yaml").read_text())
    odd["branches"]["tasks"]["odd"] = {"source": "recipe_loader:shapeless"}
    odd["save"]["folder"] = "odd"
    Path("odd.yaml").write_text(yaml.safe_dump(odd))
    run = ("train", "--plan", "whole-plan.json", "--graph", "whole.json", "--device", "cpu", "--config")
    said = mipipe(*run, "odd.yaml", code=1).replace("\n", " ")
    assert "recipe_loader:shapeless: input_ids is [7, 8], expected a tensor of [8, 8]" in said
    del odd["branches"]["tasks"]["odd"]
    Path("odd.yaml").write_text(yaml.safe_dump(odd))
    said = mipipe(*run, "odd.yaml", code=1).replace("\n", " ")
    assert "is a plan of 2 branches, but the configuration has 1" in said
