"""A recipe from train.yaml to weights on disk: capture --config, plan, train, and what PEFT and merges make of it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from recipe_runs import cluster, mipipe, write
from typer.testing import CliRunner

from mipipe.cli.main import app


def run(config, ranks=2, copies=1, batch=2):
    name = Path(config).stem
    mipipe("capture", "base", "--seq", 8, "--batch", batch, "--config", config, "-o", f"{name}.json")
    mipipe("plan", f"{name}.json", "--cluster", cluster(ranks), "--microbatches", 2,
           "--time-limit", 2, "-o", f"{name}-plan.json")
    mipipe("train", "--plan", f"{name}-plan.json", "--graph", f"{name}.json", "--config", config, "--device", "cpu",
           "--copies", copies)
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.distributed
def test_adapters_are_loaded_by_peft_and_merged(place):
    """What training saves is what PEFT makes of the base, and what `mipipe merge` merges."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    for method in ("lora", "dora", "beamlora"):
        config = write(method, adapters={"method": method, "rank": 4, "targets": "re:(q|v|down)_proj$"}, loss="rift",
                       save={"folder": f"{method}-out"})
        records = run(config)
        assert len(records) == 3
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), f"{method}-out")
        ids = torch.arange(8)[None]
        plain = AutoModelForCausalLM.from_pretrained("base")(input_ids=ids).logits
        adapted = loaded(input_ids=ids).logits
        assert not torch.allclose(adapted, plain, atol=1e-4)
        Path("merge.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "dtype": "float32",
                                                      "models": [{"model": f"base+{method}-out"}]}))
        mipipe("merge", "merge.yaml", "-o", f"{method}-merged")
        merged = AutoModelForCausalLM.from_pretrained(f"{method}-merged")(input_ids=ids).logits
        assert torch.allclose(merged, adapted, atol=1e-5), method


@pytest.mark.slow
@pytest.mark.distributed
def test_a_frozen_teacher_trains_nothing_and_is_not_saved(place):
    """DPO against the starting weights and distillation from a folder, on two ranks and two copies."""
    from safetensors.torch import load_file
    first = run(write("dpo", loss="dpo", reference={"model": "self"},
                      data={"source": "recipe_loader:responses", "options": {"same": True}}), copies=2)
    assert first[0]["loss_metrics/global_avg_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first[-1]["loss_metrics/global_avg_loss"] < first[0]["loss_metrics/global_avg_loss"]
    same = run(write("same", loss={"name": "distill", "chunk": 10}, reference={"model": "base"},
                     save={"folder": "saved"}))
    assert same[0]["loss_metrics/global_avg_loss"] == pytest.approx(0.0, abs=1e-6)
    names = set(load_file("saved/model.safetensors"))
    assert names == set(load_file("base/model.safetensors"))


@pytest.mark.slow
def test_a_file_that_wants_another_recipe_than_the_graph_has_is_refused(place):
    config = write("one", loss="rift")
    mipipe("capture", "base", "--seq", 8, "--batch", 2, "--config", config, "-o", "one.json")
    mipipe("plan", "one.json", "--cluster", cluster(1), "--microbatches", 2, "--time-limit", 1, "-o", "plan.json")

    def refused(text, **settings):
        other = write("other", **settings)
        result = CliRunner().invoke(app, ["train", "--plan", "plan.json", "--graph", "one.json", "--config", other,
                                          "--device", "cpu"])
        assert result.exit_code and text in result.output.replace("\n", " "), result.output

    refused("loss: found spo , but the graph was captured with rift", loss="spo")
    refused("adapters: found", loss="rift", adapters={"targets": ["q_proj"]})
    plain = write("plain")
    result = CliRunner().invoke(app, ["capture", "base", "--config", plain, "-o", "x.json"])
    assert "names no loss, reference, adapters, router or expand" in result.output


def rollouts(folder, count=8, each=3):
    """A folder of rollouts: groups of responses of several lengths, with what every loss over groups asks for."""
    draw, lines = torch.Generator().manual_seed(5), []
    for group in range(count):
        prompt = torch.randint(0, 32, (2,), generator=draw).tolist()
        for number in range(each):
            response = torch.randint(0, 32, (2 + number,), generator=draw).tolist()
            lines.append(json.dumps({"prompt": prompt, "response": response, "reward": float(number == group % each),
                                     "group": group, "version": 0, "old_log_probs": [-3.4] * len(response)}))
    Path(folder).mkdir()
    (Path(folder) / "first.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("loss", ["spo", "asympo", "grpo"])
def test_group_losses_under_torchrun_from_a_folder_of_rollouts(place, loss):
    """Two ranks whose batches are loaded ahead do the steps of one whose batches are not."""
    rollouts("rollouts")
    records = []
    for ranks, prefetch in ((1, False), (2, True)):
        config = write(f"{loss}{ranks}", loss=loss, steps=4, optimizer={"name": "adamw", "lr": 1e-2},
                       save={"folder": f"out{ranks}"}, data={"source": "rollouts", "prefetch": prefetch,
                                                             "options": {"folder": "rollouts"}})
        records.append(run(config, ranks, batch=3))
    alone, two = records
    for key, tolerance in (("loss_metrics/global_avg_loss", 1e-6), ("grad_norm", 1e-4)):
        own = [record[key] for record in alone]
        assert [record[key] for record in two] == pytest.approx(own, rel=1e-4, abs=tolerance)
    assert all(record["grad_norm"] > 1e-3 for record in alone)
    from safetensors.torch import load_file
    first, second = (load_file(f"out{ranks}/model.safetensors") for ranks in (1, 2))
    assert all(torch.allclose(item, second[name], rtol=1e-3, atol=1e-5) for name, item in first.items())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stage_of_apex_is_a_run_that_saves_a_plain_model(place):
    """Votes, two ranks as one; without a step's length the saved model is the one before, with it a better one."""
    from safetensors.torch import load_file

    from mipipe.runtime import count_votes
    Path("texts.jsonl").write_text("".join(json.dumps({"tokens": torch.randint(0, 32, (8,)).tolist()}) + "\n"
                                           for _ in range(8)))
    count_votes("base", "texts.jsonl", "votes.json", length=8)
    base, found = load_file("base/model.safetensors"), {}
    for name, ranks, lr in (("still", 2, 0.0), ("one", 1, 1e-2), ("two", 2, 1e-2)):
        config = write(name, optimizer={"name": "adamw", "lr": lr, "options": {"weight_decay": 0.0}}, steps=5,
                       expand={"votes": "votes.json"}, save={"folder": f"{name}-out"},
                       data={"source": "recipe_loader:responses", "options": {"same": True}})
        records = run(config, ranks)
        found[name] = load_file(f"{name}-out/model.safetensors")
        assert set(found[name]) == set(base)
    assert all(torch.allclose(item, base[name], atol=1e-7) for name, item in found["still"].items())
    assert records[-1]["loss_metrics/global_avg_loss"] < records[0]["loss_metrics/global_avg_loss"]
    moved = {name.rpartition(".")[0].rpartition(".")[2] for name, item in found["two"].items()
             if not torch.equal(item, base[name])}
    assert moved == {"gate_proj", "up_proj", "down_proj"}
    assert all(torch.allclose(item, found["one"][name], rtol=1e-3, atol=1e-5) for name, item in found["two"].items())
    from transformers import AutoModelForCausalLM
    batch = next(iter(load_rows()))
    trained = AutoModelForCausalLM.from_pretrained("two-out")(**batch).loss
    assert float(trained) < records[-1]["loss_metrics/global_avg_loss"] * 1.01


def load_rows():
    """The batches of the runs above."""
    import recipe_loader

    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.serialize import load
    for batch in recipe_loader.responses(load("two.json", OperatorGraph), 4, 0, same=True):
        yield {name: batch[name] for name in ("input_ids", "labels")}


@pytest.mark.slow
@pytest.mark.distributed
def test_fused_distributions_are_trained_on_by_copies_as_by_one_process(place):
    """FuseChat's stage: rows of two models, a run of two ranks and two copies, and the pivot's loss falls."""
    from safetensors.torch import save_file
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 32, (12, 8), generator=draw)
    labels = ids.clone()
    labels[:, :3] = -100
    Path("fused").mkdir()
    save_file({"input_ids": ids, "labels": labels, "fused_ids": torch.randint(0, 32, (12, 8, 2), generator=draw),
               "fused_probs": torch.tensor([0.7, 0.3]).expand(12, 8, 2).contiguous()}, "fused/fused.safetensors")
    losses = []
    for ranks, copies in ((1, 1), (2, 2)):
        config = write(f"fuse{ranks}", loss={"name": "fuse", "options": {"labels": 0.5, "top": 2}}, steps=6,
                       data={"source": "fused", "options": {"folder": "fused"}})
        losses.append([record["loss_metrics/global_avg_loss"] for record in
                       run(config, ranks, copies, batch=4 // copies)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("code, status, text", [(0, 4, "code of the model's or the loader's ended them"),
                                                (3, 4, "ended with exit code 3 and without a word"),
                                                ("no more data", 1, "ends the process (sys.exit(code)")])
def test_a_loader_that_ends_the_process_is_told(place, code, status, text):
    """Its status 0 is no success; `sys.exit` ends the run with its reason."""
    config = write("leaving", loss="rift", steps=5, data={"source": "recipe_loader:leaving", "options": {"code": code}})
    mipipe("capture", "base", "--seq", 8, "--batch", 2, "--config", config, "-o", "graph.json")
    mipipe("plan", "graph.json", "--cluster", cluster(2), "--microbatches", 2, "--time-limit", 1, "-o", "plan.json")
    said = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", config, "--device", "cpu",
                  code=status)
    assert text in said.replace("\n", " "), said


@pytest.mark.slow
@pytest.mark.distributed
def test_light_peft_prunes_and_plans_in_the_middle_of_a_run(place):
    """Two ranks or one, ZeRO or not: the same decisions, the same losses after, and a saved model that computes them;
    a run that ended after its first stage goes on."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    found = {}
    for name, ranks, copies, shard in (("one", 1, 1, False), ("two", 2, 1, False), ("zero", 1, 2, "parameters")):
        light = {"steps": 4, "folder": f"{name}-light", "units": 0.25, "heads": 0.5, "modules": 0.5, "ranks": 0.25}
        config = write(name, steps=8, optimizer={"name": "adamw", "lr": 1e-2, "shard": shard}, loss="rift",
                       adapters={"method": "light-peft", "rank": 4, "targets": "re:_proj$", "light": light},
                       checkpoint={"folder": f"{name}-kept", "every": 1}, save={"folder": f"{name}-out"},
                       data={"source": "recipe_loader:shared"})
        records = run(config, ranks, copies, batch=4 // copies)
        first = [json.loads(line) for line in Path(f"{name}.first.jsonl").read_text().splitlines()]
        assert len(first) == 4 and len(records) == 4
        found[name] = ([record["loss_metrics/global_avg_loss"] for record in (*first, *records)],
                       json.loads(Path(f"{name}-light/kept.json").read_text()),
                       load_file(f"{name}-out/model.safetensors"))
        assert (Path(f"{name}-light") / "plan.json").exists()
    losses, kept, weights = found["one"]
    assert sum(map(len, kept["units"].values())) == 48 and kept["heads"]  # of 64, and of 14 adapters with 4 ranks each
    assert sum(map(len, kept["ranks"].values())) == 21 and sum(map(bool, kept["ranks"].values())) <= 7
    for name in ("two", "zero"):
        assert found[name][1] == kept
        assert found[name][0] == pytest.approx(losses, rel=2e-4)
        assert all(torch.allclose(item, weights[key], rtol=1e-3, atol=1e-5) for key, item in found[name][2].items())
    base = load_file("base/model.safetensors")
    assert {key: item.shape for key, item in base.items()} == {key: item.shape for key, item in weights.items()}
    for layer, units in kept["units"].items():
        stays = weights[f"{layer}.down_proj.weight"].any(0).nonzero()[:, 0].tolist()
        assert stays == units and weights[f"{layer}.gate_proj.weight"].any(1).nonzero()[:, 0].tolist() == units
    assert AutoModelForCausalLM.from_pretrained("one-out")(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    said = mipipe("train", "--plan", "one-plan.json", "--graph", "one.json", "--config", "one.yaml", "--device", "cpu",
                  code=1).replace("\n", " ")
    assert "save.folder one-out exists already" in said
    for path in Path("one-out").iterdir():
        path.unlink()
    Path("one-out").rmdir()
    for path in sorted(Path("one-kept").glob("step*"))[-2:]:
        path.rename(path.with_name("gone-" + path.name))
    mipipe("train", "--plan", "one-plan.json", "--graph", "one.json", "--config", "one.yaml", "--device", "cpu",
           "--resume")
    again = load_file("one-out/model.safetensors")
    assert all(torch.allclose(item, weights[key], rtol=1e-5, atol=1e-7) for key, item in again.items())
