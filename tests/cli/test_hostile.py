"""A file is data: hostile files of every kind, through the verbs that read them, and nothing of theirs runs."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mipipe.graphs.capture.model import capture
from mipipe.graphs.capture.program_files import load_program
from mipipe.graphs.errors import GraphError, InputError, MipipeError
from mipipe.graphs.models.configuration import read_model_config, without_code
from mipipe.graphs.named_code import import_named
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.serialize import from_data, to_data
from mipipe.graphs.tracing.operator_kinds import allow_namespace, resolve_operator
from mipipe.graphs.tracing.trace import build_phase
from mipipe.runtime.train.config import DataConfig, TrainConfig
from mipipe.runtime.train.data import check_source
from mipipe.runtime.train.models import source_of
from mipipe.runtime.train.optim import optimizer_class

TOUCH = "__import__('os').system('touch RAN')"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    """The data of a small graph, captured from a factory."""
    sys.path.insert(0, str(HERE))
    return to_data(capture("cli_models:small", granularity="module"))


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that leaves a mark when it is imported lies in the working directory; no mark may be there after."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('RAN', 'w').close()\n\ndef factory(**options):\n    open('RAN', 'w')\n")
    yield
    sys.modules.pop("evil", None)
    assert not (tmp_path / "RAN").exists()


KINDS = ["import_module", "load_library", "import_module.a.b", "load_library.load.default", "aten.__class__.default",
         "aten.add.__init__", "aten.add", "aten", "aten.add.Tensor.__call__", "aten.from_file.default",
         "aten.from_file.out", "aten.save.default", "aten._print.default", "builtins.exec.default", "os.system.default",
         "profiler._record_function_enter.default", "aten.add.Tensor;import os", "aten.add.\n", "", ".", "..", "a.b.c",
         "__class__.__base__.__subclasses__", "_ops.ops.load_library", "mipipe.nothing.default", "aten.add.default.x"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_registered_operators_are_resolved(kind: str) -> None:
    with pytest.raises(GraphError):
        resolve_operator(kind)


def test_operators_of_the_allowed_namespaces_are_resolved() -> None:
    for kind in ("aten.add.Tensor", "aten.mm.default", "mipipe.attention.default",
                 "prims.convert_element_type.default"):
        assert isinstance(resolve_operator(kind), torch._ops.OpOverload)


def test_a_namespace_is_allowed_by_code_alone() -> None:
    torch.library.define("mine_for_test::twice", "(Tensor x) -> Tensor")
    torch.library.impl("mine_for_test::twice", "CompositeImplicitAutograd", lambda x: x * 2)
    with pytest.raises(GraphError, match="allow_namespace"):
        resolve_operator("mine_for_test.twice.default")
    allow_namespace("mine_for_test")
    assert resolve_operator("mine_for_test.twice.default")(torch.ones(1)).item() == 2


def paths(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all texts, keys of mappings included."""
    if isinstance(data, str):
        return [prefix]
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, item in pairs for place in paths(item, (*prefix, key))]


TEXTS = ["x); " + TOUCH + "#", f"a = {TOUCH}", f"x\n    {TOUCH}\n", "_give", "del", "__builtins__",
         "_call_aten_mm_default", "x y", "phase", "ä", "1a", "", "evil:factory"]


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_of_a_graph_becomes_code(graph: dict[str, Any], text: str) -> None:
    """Each text of a trace in turn (names, kinds, arguments, dtypes) replaced, then all phases built and F run."""
    tried = 0
    for place in paths(graph["traces"]):
        made = copy.deepcopy(graph)
        item: Any = made["traces"]
        for key in place[:-1]:
            item = item[key]
        item[place[-1]] = text
        tried += 1
        try:
            found = from_data(made, OperatorGraph, "hostile.json")
            for trace in found.traces:
                for phase in Phase:
                    build_phase(trace, phase)
        except MipipeError as error:
            assert str(error).startswith(("hostile.json", "operator", "trace"))
    assert tried > 50


@pytest.mark.parametrize("change", [{"name": f"x = {TOUCH}; y"}, {"name": "__builtins__"}, {"kind": f"{TOUCH}.a.b"},
                                    {"kind": "aten.add.__class__"}, {"args": [{"ref": TOUCH}]},
                                    {"kwargs": {f"x={TOUCH}": 1}}], ids=str)
def test_a_trace_that_was_read_by_nobody_is_checked_as_well(graph: dict[str, Any], change: dict[str, Any]) -> None:
    """What becomes text is checked where it does, wherever the trace is from."""
    trace = from_data(graph, OperatorGraph, "graph.json").traces[0]
    first, *rest = trace.operators
    with pytest.raises(GraphError):
        build_phase(replace(trace, digest="another", operators=(replace(first, **change), *rest)), first.phase)


def test_keys_of_a_graph_do_not_become_code(graph: dict[str, Any]) -> None:
    for key in ("x=1, **{}", f"x={TOUCH}", "del", "_give"):
        made = copy.deepcopy(graph)
        made["traces"][0]["operators"][0]["kwargs"] = {key: 1}
        with pytest.raises(GraphError, match="expected an identifier"):
            from_data(made, OperatorGraph, "hostile.json")


ARGUMENTS = [{"ref": TOUCH}, {"dtype": "ops.load_library"}, {"dtype": "hub"}, {"layout": "save"},
             {"memory_format": "load"}, {"device": "cuda:0"}, {"float": TOUCH}, {"complex": [TOUCH, 1]},
             {"slice": [TOUCH, None, None]}, {"ref": "in_0", "dtype": "float32"}, {}, {"eval": TOUCH},
             [[{"ref": "no"}]]]


@pytest.mark.parametrize("argument", ARGUMENTS, ids=str)
def test_arguments_are_of_the_known_forms(graph: dict[str, Any], argument: Any) -> None:
    made = copy.deepcopy(graph)
    made["traces"][0]["operators"][0]["args"][0] = argument
    with pytest.raises(GraphError, match="found the argument"):
        from_data(made, OperatorGraph, "hostile.json")


SOURCES = ["os:system", "evil:factory", "subprocess:run", "builtins:exec", "torch.hub:load", "evil:factory\n", "a:b:c",
           ":", "os.system:__call__"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_graphs_source_is_not_called(graph: dict[str, Any], source: str) -> None:
    made = {**graph, "source": {"source": source, "overrides": {"command": "touch RAN"}}}
    read = from_data(made, OperatorGraph, "hostile.json")
    with pytest.raises(InputError, match=r"--model"):
        source_of(read, TrainConfig(1))


def test_what_a_person_names_is_called(graph: dict[str, Any]) -> None:
    read = from_data(graph, OperatorGraph, "graph.json")
    assert source_of(read, TrainConfig(1, model="cli_models:small")) == "cli_models:small"


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "builtins:exec", "os.path:join", "shutil:rmtree",
                                  "pty:spawn", "runpy:run_path", "evil", "evil:", ":x", "evil:a.b", "a b:c",
                                  "evil:factory()"])
def test_pythons_own_library_is_no_source(name: str) -> None:
    for use in (import_named, optimizer_class, lambda name: check_source(DataConfig(name))):
        with pytest.raises(InputError):
            use(name)


def test_loaders_and_optimizers_must_look_like_some() -> None:
    """A callable that swallows anything (torch.hub.load would fetch and run code) is no loader."""
    for name in ("torch:load", "torch.hub:load", "numpy:load"):
        with pytest.raises(InputError, match="takes no 'graph'"):
            check_source(DataConfig(name))
        with pytest.raises(InputError, match="derived from"):
            optimizer_class(name)


def test_a_configuration_brings_no_code(tmp_path: Path) -> None:
    data = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
            "attn_implementation": "someone/kernel", "_attn_implementation_internal": "someone/kernel",
            "experts_implementation": "someone/kernel", "hidden_size": 64, "num_hidden_layers": 1,
            "architectures": ["pipeline"], "custom_pipelines": {"x": {"impl": "evil.f"}},
            "vision_config": {"auto_map": {"AutoModel": "evil.f"}, "use_timm_backbone": True}}
    assert "evil" not in json.dumps(without_code(data)) and "someone" not in json.dumps(without_code(data))
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = read_model_config(tmp_path, {})
    assert not hasattr(config, "auto_map")
    for key in ("__class__.__init__", "_attn_implementation", "a b", "auto_map"):
        with pytest.raises(InputError, match="no entry"):
            read_model_config(tmp_path, {key: "evil"})
    for name in ("pipeline", "utils", "Trainer", "__builtins__", "os", "AutoModel.from_pretrained"):
        with pytest.raises(InputError, match="no file, and not a model class"):
            read_model_config(name, {})


YAML_CODE = ["!!python/object/apply:os.system ['touch RAN']", "!!python/name:os.system", "!!python/module:evil",
             "!!python/object/new:evil.factory {}"]


@pytest.mark.parametrize("tag", YAML_CODE)
def test_yaml_makes_no_objects(mipipe, tmp_path: Path, tag: str) -> None:
    """Cluster, recipe, sizes, training configuration: all go through the same reader."""
    (tmp_path / "file.yaml").write_text(f"steps: {tag}\nhosts: {tag}\nmerge_method: {tag}\n")
    for verb in (["merge", "file.yaml", "-o", "out"], ["experts", "--loads", "file.yaml", "--cluster", "file.yaml"],
                 ["train", "--plan", "file.yaml", "--graph", "file.yaml", "--config", "file.yaml"],
                 ["place", "file.yaml"], ["show", "file.yaml"], ["check", "file.yaml"]):
        ended = mipipe(*verb)
        assert ended.code == 1 and "\n" not in ended.error, verb


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    from mipipe.graphs.merging.checkpoints.files import read_checkpoint
    from mipipe.runtime.weights.stored_weights import stored_places

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{\"model_type\": \"llama\"}")
    for file in ("../evil.py", "/etc/passwd", "a/b.safetensors", "", 3, None, ["x"], "evil.py"):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
        for read in (read_checkpoint, stored_places):
            with pytest.raises(InputError, match=r"expected the name of a \.safetensors file"):
                read(tmp_path / "model")


class Evil:
    """A pickle that runs a program when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


def test_an_exported_program_is_data(tmp_path: Path, graph: dict[str, Any]) -> None:
    """A .pt2 archive: pickles in place of tensors, operators that are none, sizes that are code."""
    import cli_models

    module, inputs = cli_models.small()
    torch.export.save(torch.export.export(module, (), inputs, strict=False), tmp_path / "good.pt2")
    load_program(tmp_path / "good.pt2")
    pickled = io.BytesIO()
    torch.save({"x": Evil()}, pickled)
    operators = ["torch.ops.import_module", "torch.ops.load_library", "torch.hub.load", "torch.ops.aten.__class__",
                 "_operator.attrgetter", "_operator.methodcaller", "math.__loader__", "os.system", "torch.load"]
    changes = [lambda name, raw: pickled.getvalue() if name.endswith((".pt", "weight_0")) else raw,
               lambda name, raw: raw.replace(b'{"as_int": 8}', json.dumps(
                   {"as_expr": {"expr_str": TOUCH, "hint": None}}).encode(), 1)]
    changes += [lambda name, raw, text=text: raw.replace(b"torch.ops.aten.relu.default", text.encode())
                for text in operators]
    for number, change in enumerate(changes):
        with zipfile.ZipFile(tmp_path / "good.pt2") as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
            found = {name: (old.read(name), change(name, old.read(name))) for name in old.namelist()}
            assert any(before != after for before, after in found.values()), number
            for name, (_, after) in found.items():
                new.writestr(name, after)
        with pytest.raises(InputError, match=r"evil\.pt2"):
            load_program(tmp_path / "evil.pt2")


def test_training_names_the_model_or_ends(mipipe, graph: dict[str, Any], tmp_path: Path) -> None:
    """The whole verb: a graph that says os:system ends with one line, before any process starts."""
    from mipipe.graphs.coarse.coarsen import coarsen
    from mipipe.graphs.costs.table import CostTable, GroupCost
    from mipipe.graphs.serialize import digest, save
    from mipipe.graphs.topology import Topology
    from mipipe.planner.problems.from_graph import build_problem
    from mipipe.planner.schedules import BASELINES

    read = from_data({**graph, "source": {"source": "os:system", "overrides": {"command": "touch RAN"}}}, OperatorGraph,
                     "graph.json")
    save(read, tmp_path / "graph.json")
    coarse = coarsen(read, granularity="operator")
    table = CostTable(digest(read), tuple(GroupCost(group.name, "cpu", dict.fromkeys(group.flops, 5), "given")
                                          for group in coarse.groups))
    problem = build_problem(coarse, table, Topology.uniform(1, kind="cpu"), num_microbatches=2)
    save(next(item for item in BASELINES if item.name == "GPipe").plan(problem), tmp_path / "plan.json")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"steps": 1}))
    ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "train.yaml", "--timeout", 60)
    assert ended.code == 1 and "name it: mipipe train --model os:system" in ended.error
    ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "train.yaml", "--timeout", 60,
                   "--model", "os:system")
    assert ended.code != 0 and "Python's own library" in ended.error
    for output in ({"timeline": "plan.json"}, {"metrics": "./graph.json"}, {"profile": "train.yaml"},
                   {"experts": {"loads": "plan.json"}}):  # nothing that is read is replaced
        before = (tmp_path / "plan.json").read_bytes()
        (tmp_path / "train.yaml").write_text(yaml.safe_dump({"steps": 1, **output}))
        ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "train.yaml")
        assert ended.code == 1 and "is also read: give what is written" in ended.error
        assert (tmp_path / "plan.json").read_bytes() == before
