"""One good file of every kind, and the verbs that read it."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mipipe.graphs.serialize import save
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap
from mipipe.planner.options import PlanOptions
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import plan

Verb = Callable[[Path], list[Any]]
"""The command line that reads a mutant."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: its good data, how it is written, and the verbs (name -> command line) that read it.

    ``place`` is where a mutant lies, relative to the case's folder, where its name or neighbours matter. ``weight``:
    how many of the mutants it gets, against the others.
    """

    name: str
    data: Any
    ending: str
    verbs: dict[str, Verb]
    place: str = ""
    weight: float = 1.0
    setup: dict[str, bytes] = field(default_factory=dict)


CLUSTER = {"format": "mipipe.cluster", "version": 1,
           "device_kinds": {"mine": {"memory": "8GB", "flops": {"float32": "1TFLOPS"}, "bandwidth": "100GB/s",
                                     "launch_overhead": "1us"}},
           "hosts": [{"name": "a", "devices": 2, "kind": "cpu", "memory": "2GB"}],
           "links": {"within_host": {"latency": "400us", "bandwidth": "1GB/s"}}}
TRAIN = {"steps": 4, "seed": 0, "optimizer": {"name": "adamw", "lr": 0.01, "options": {"weight_decay": 0.1},
                                              "groups": [{"match": "embed", "options": {"lr": 0.1}}]},
         "schedule": {"name": "cosine", "warmup": 1, "decay": 2, "minimum": 0.1},
         "data": {"source": "stdlib", "options": {"max_bytes": 1000}}, "clip": 1.0, "metrics": "metrics.jsonl",
         "checkpoint": {"folder": "checkpoints", "every": 2}, "save": {"folder": "saved", "shard": "1MB"},
         "experts": {"loads": "loads.json", "window": 10, "moves": {500: "later.json"}}, "timeout_s": 60}
WORKLOAD = {"maxFPGAs": 2, "maxCPUs": 1, "maxSizePerFPGA": 10,
            "nodes": [{"id": n, "fpgaLatency": 1 + n, "cpuLatency": 5, "size": 2, "supportedOnFpga": True,
                       "isBackwardNode": False} for n in range(4)],
            "edges": [{"sourceId": n, "destId": n + 1, "cost": 1.0} for n in range(3)]}
RECIPE = {"merge_method": "ties", "base_model": "models/base", "dtype": "float32", "out_dtype": "bfloat16",
          "models": [{"model": "models/a", "parameters": {
              "weight": [0.2, 0.8], "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.3}]}},
                     {"model": "models/b", "parameters": {"weight": 0.5}}], "parameters": {"normalize": True}}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 1, "vocab_size": 11,
          "tie_word_embeddings": False, "dtype": "float32", "max_position_embeddings": 64}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []},
             "added_tokens": [{"id": 3, "content": "<s>"}]}


def safetensors(header: Any, size: int) -> bytes:
    """A file with this header and so many bytes of zeros."""
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


def lines(data: Any) -> bytes:
    """JSON lines: one for each item of a list."""
    items = data if isinstance(data, list) else [data]
    return "".join(json.dumps(item) + "\n" for item in items).encode("utf-8", "surrogatepass")


def numpy_file(data: Any) -> bytes:
    """A ``.npy`` file: its header as the data say it, and as many bytes of small numbers."""
    parts = data if isinstance(data, dict) else {}
    header, size = parts.get("header", data), parts.get("size", 0)
    if isinstance(header, dict) and isinstance(header.get("shape"), list):
        header = {**header, "shape": tuple(header["shape"])}
    text = (repr(header) + "\n").encode("utf-8", "surrogatepass")
    body = bytes([n % 4 * (n % 2 == 0) for n in range(min(size, 10_000) if type(size) is int else 0)])
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + body


def model_header(layers: int = 1) -> tuple[dict[str, Any], int]:
    """The header of the small Llama of `CONFIG`, and its size."""
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.q_proj.weight": (8, 8), f"{at}.self_attn.k_proj.weight": (4, 8),
                   f"{at}.self_attn.v_proj.weight": (4, 8), f"{at}.self_attn.o_proj.weight": (8, 8),
                   f"{at}.input_layernorm.weight": (8,), f"{at}.post_attention_layernorm.weight": (8,),
                   f"{at}.mlp.gate_proj.weight": (16, 8), f"{at}.mlp.up_proj.weight": (16, 8),
                   f"{at}.mlp.down_proj.weight": (8, 16)}
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    return header, place


def write_models(folder: Path) -> None:
    """Three small checkpoints: base, a and b; b in a shard with an index."""
    header, size = model_header()
    for name in ("base", "a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        (folder / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        file = "model-00001-of-00001.safetensors" if name == "b" else "model.safetensors"
        (folder / name / file).write_bytes(safetensors(header, size))
    index = {"metadata": {}, "weight_map": dict.fromkeys(header, "model-00001-of-00001.safetensors")}
    (folder / "b" / "model.safetensors.index.json").write_text(json.dumps(index))


def plan_kinds(folder: Path) -> list[Kind]:
    """Problems, plans, programs, timelines: no torch needed."""
    problem = uniform_problem(ranks=2, microbatches=4, f=2, i=2, w=1, fb=4, comm=1, copies=2)
    found = plan(problem, PlanOptions(time_limit_s=1, placement="chain")).plan
    assert found is not None
    for name, item in (("problem", problem), ("plan", found), ("program", lower(found)),
                       ("timeline", simulate(found, lower(found)))):
        save(item, folder / f"{name}.json")
    good, out, limit = folder / "plan.json", folder / "out", ["--time-limit", "0.2"]

    def data(name: str) -> Any:
        return json.loads((folder / f"{name}.json").read_text())

    return [
        Kind("plan", data("plan"), "json", {
            "check": lambda file: ["check", file], "simulate": lambda file: ["simulate", file, "--json"],
            "show": lambda file: ["show", file, "--html", f"{out}.html"],
            "export": lambda file: ["export", file, "--csv", f"{out}.csv", "--trace", f"{out}.json"],
            "compare": lambda file: ["compare", "--problem", file, "--schedules", "1f1b,zb-h1,dualpipe"]}, weight=4),
        Kind("problem", data("problem"), "json", {
            "plan": lambda file: ["plan", file, *limit, "-o", f"{out}.json", "--html", f"{out}.html"],
            "explain": lambda file: ["plan", file, *limit, "--explain", "--recompute", "--json"],
            "memory": lambda file: ["plan", file, *limit, "--objective", "memory"],
            "place": lambda file: ["place", file, *limit],
            "compare": lambda file: ["compare", "--problem", file, "--schedules", "gpipe,1f1b,zb-v,chimera"]},
             weight=2.5),
        Kind("program", data("program"), "json", {"check": lambda file: ["check", good, "--program", file]},
             weight=1.5),
        Kind("timeline", data("timeline"), "json", {
            "show": lambda file: ["show", file, "--html", f"{out}.html", "--trace", f"{out}.json"],
            "both": lambda file: ["show", good, file],
            "export": lambda file: ["export", file, "--html", f"{out}.html"]},
             weight=1.5)]


def expert_kinds(folder: Path) -> list[Kind]:
    """Loads, maps, clusters, placement workloads."""
    loads = ExpertLoads(((5.0, 1.0, 2.0, 4.0), (1.0, 1.0, 7.0, 3.0)), "m", {"cpu": 3.0}, 64, 1000)
    placed = ExpertMap(4, 2, ((0, 1, 2, 3), (2, 0, 1, 3)))
    save(loads, folder / "loads.json")
    save(placed, folder / "map.json")
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    good, cluster, out, limit = folder / "loads.json", folder / "cluster.yaml", folder / "out", ["--time-limit", "0.2"]
    current = {"map": lambda file: ["experts", "--loads", good, "--cluster", cluster, "--current", file,
                                    "--horizon", "5", *limit, "--eplb", f"{out}.json"]}
    routed = {"experts": lambda file: ["experts", "--loads", file, "--cluster", cluster, "--num-experts", "4", *limit]}
    return [
        Kind("loads", json.loads(good.read_text()), "json", {
            "experts": lambda file: ["experts", "--loads", file, "--cluster", cluster, "--replicas", "2", *limit],
            "memory": lambda file: ["experts", "--loads", file, "--cluster", cluster, "--memory", "6kB", *limit]}),
        Kind("weight", [[5.0, 1.0, 2.0, 4.0]], "json", {
            "experts": lambda file: ["experts", "--loads", file, "--cluster", cluster, *limit]}, weight=0.5),
        Kind("trace", [{"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0,
                        "num_tokens": 2, "topk": 2, "top_indices": [[0, 1], [layer, 3]]}
                       for step in range(2) for layer in range(2)], "jsonl", routed),
        Kind("routes", {"header": {"descr": "<i2", "fortran_order": False, "shape": [5, 2, 2]}, "size": 40}, "npy",
             routed),
        Kind("history", {"load_history": [{"logical_expert_load": [[1, 3, 2, 2], [0, 8, 1, 1]]},
                                          {"logical_expert_load": [[3, 5, 1, 1], [2, 0, 4, 4]]}]}, "json", routed,
             weight=0.5),
        Kind("map", json.loads((folder / "map.json").read_text()), "json", current),
        Kind("eplb", {"physical_to_logical": [[0, 1, 2, 3], [2, 0, 1, 3]]}, "json", current, weight=0.5),
        Kind("cluster", CLUSTER, "yaml", {
            "experts": lambda file: ["experts", "--loads", good, "--cluster", file, *limit]}),
        Kind("workload", WORKLOAD, "json", {
            "throughput": lambda file: ["place", file, *limit],
            "contiguous": lambda file: ["place", file, *limit, "--contiguous"]})]


def merge_kinds(folder: Path) -> list[Kind]:
    """Recipes and the parts of checkpoints; their case folder holds three models."""
    write_models(folder / "models")
    header, _ = model_header()
    recipes = folder / "models" / "recipe.yaml"
    recipes.write_text(yaml.safe_dump(RECIPE))
    union = {"merge_method": "linear", "models": [{"model": "models/a", "parameters": {"weight": 1}},
                                                  {"model": "models/b", "parameters": {"weight": 1}}],
             "tokenizer_source": "union"}
    (folder / "models" / "union.yaml").write_text(yaml.safe_dump(union))
    moe = {"base_model": "models/base", "gate_mode": "random", "dtype": "float32", "experts_per_token": 1,
           "experts": [{"source_model": "models/a"}, {"source_model": "models/b"}]}
    dry: Verb = lambda file: ["merge", file, "-o", folder / "merged", "--dry-run", "--ranks", "2"]  # noqa: E731
    fixed: Verb = lambda _: ["merge", recipes, "-o", folder / "merged", "--dry-run"]  # noqa: E731
    joined: Verb = lambda _: ["merge", folder / "models" / "union.yaml", "-o", folder / "merged", "--dry-run"]  # noqa: E731
    index = json.loads((folder / "models/b/model.safetensors.index.json").read_text())
    return [Kind("recipe", RECIPE, "yaml", {"merge": dry}, place="models/mutant.yaml", weight=2),
            Kind("moe", moe, "yaml", {"merge": dry}, place="models/mutant.yaml"),
            Kind("header", header, "safetensors", {"merge": fixed}, place="models/a/model.safetensors", weight=1.5),
            Kind("index", index, "json", {"merge": fixed}, place="models/b/model.safetensors.index.json", weight=0.7),
            Kind("config", CONFIG, "json", {"merge": fixed, "union": joined}, place="models/a/config.json", weight=0.7),
            Kind("tokenizer", TOKENIZER, "json", {"merge": joined}, place="models/a/tokenizer.json")]


def graph_kinds(folder: Path) -> list[Kind]:
    """Operator graphs, cost tables, coarse graphs, training configurations: need torch."""
    import torch
    from torch import nn

    from mipipe.graphs.capture.model import capture_module
    from mipipe.graphs.cluster import load_cluster
    from mipipe.graphs.coarse.coarsen import coarsen
    from mipipe.graphs.costs.roofline import roofline
    from mipipe.planner.problems.from_graph import build_problem

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.last = nn.Embedding(300, 8), nn.Linear(8, 8), nn.Linear(8, 300)

        def forward(self, input_ids: Any, labels: Any) -> Any:
            hidden = torch.relu(self.first(self.embed(input_ids)))
            return {"loss": nn.functional.cross_entropy(self.last(hidden).flatten(0, 1), labels.flatten())}

    ids = torch.zeros(2, 4, dtype=torch.int64)
    graph = capture_module(Model(), {"input_ids": ids, "labels": ids.clone()}, granularity="module",
                           source={"source": "llama", "seq": 4, "batch": 2, "dtype": "float32", "overrides": {}})
    coarse = coarsen(graph, num_groups=3)
    cluster = {**CLUSTER, "hosts": [{"name": "a", "devices": 2, "kind": "mine", "memory": "2GB"}]}
    (folder / "peaks.yaml").write_text(yaml.safe_dump(cluster))
    described = load_cluster(folder / "peaks.yaml")
    table = roofline(coarse, graph, described.kinds)
    problem = build_problem(coarse, table, described.topology, num_microbatches=4)
    found = plan(problem, PlanOptions(time_limit_s=1, placement="chain")).plan
    assert found is not None
    for name, item in (("graph", graph), ("coarse", coarse), ("costs", table), ("fitting", found),
                       ("measured", dataclasses.replace(simulate(found, lower(found)), origin="measured"))):
        save(item, folder / f"{name}.json")
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    (folder / "tags.yaml").write_text(yaml.safe_dump(TAGS))
    paths = {name: folder / f"{name}.json" for name in ("graph", "coarse", "costs", "fitting", "measured")}
    peaks, out, limit = folder / "peaks.yaml", folder / "out", ["--time-limit", "0.2"]
    common = ["--cluster", peaks, "--microbatches", "4", *limit]

    def data(name: str) -> Any:
        return json.loads(paths[name].read_text())

    return [
        Kind("graph", data("graph"), "json", {
            "show": lambda file: ["show", file, "--html", f"{out}.html"],
            "plan": lambda file: ["plan", file, *common, "--groups", "3"],
            "check": lambda file: ["check", paths["fitting"], "--graph", file],
            "place": lambda file: ["place", file, "--cluster", peaks, *limit],
            "train": lambda file: ["JOB", paths["fitting"], file, folder / "train.yaml"]}, weight=3),
        Kind("coarse", data("coarse"), "json", {
            "show": lambda file: ["show", file],
            "plan": lambda file: ["plan", file, *common, "--costs", paths["costs"]]}),
        Kind("costs", data("costs"), "json", {
            "show": lambda file: ["show", paths["coarse"], file],
            "plan": lambda file: ["plan", paths["coarse"], *common, "--costs", file],
            "calibrate": lambda file: ["calibrate", paths["measured"], "--plan", paths["fitting"], "--costs", file,
                                       "-o", f"{out}.json"]}),
        Kind("measured", data("measured"), "json", {
            "calibrate": lambda file: ["calibrate", file, "--plan", paths["fitting"], "--costs", paths["costs"]]}),
        Kind("fitting", data("fitting"), "json", {
            "calibrate": lambda file: ["calibrate", paths["measured"], "--plan", file, "--costs", paths["costs"]],
            "check": lambda file: ["check", file, "--graph", paths["graph"]],
            "train": lambda file: ["JOB", file, paths["graph"], folder / "train.yaml"]}, weight=1.5),
        Kind("train", TRAIN, "yaml", {"train": lambda file: ["JOB", paths["fitting"], paths["graph"], file]},
             weight=1.5),
        Kind("peaks", cluster, "yaml", {
            "plan": lambda file: ["plan", paths["graph"], "--cluster", file, "--microbatches", "4", *limit]},
             weight=1.5),
        Kind("sizes", {coarse.groups[1].name: [1, 2.5, 0, 1]}, "yaml", {
            "plan": lambda file: ["plan", paths["coarse"], *common, "--costs", paths["costs"], "--sizes", file]},
             weight=0.5),
        Kind("tags", TAGS, "yaml", {"capture": lambda file: ["TAGS", file]}, weight=0.5),
        Kind("model", CONFIG, "json", {"config": lambda file: ["CONFIG", file]}, place="hf/config.json", weight=0.5)]


TAGS = {"roles": {"first": "mlp", "last$": "head"}, "branches": {"embed": "text"}, "layers": [r"layers\.(\d+)"]}
