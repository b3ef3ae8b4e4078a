"""The package's face: what a stub promises exists, costs nothing until it is used, and is all that examples need."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mipipe
from mipipe.graphs.lazy import read_stub

ROOT = Path(__file__).resolve().parent.parent
FACES = {"mipipe": ROOT / "mipipe", **{f"mipipe.{name}": ROOT / name for name in ("graphs", "planner", "runtime")}}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("package", FACES)
def test_every_name_of_a_face_exists(package: str) -> None:
    face = importlib.import_module(package)
    names = read_stub(str(FACES[package] / "__init__.pyi"))
    assert names
    for name, (module, original) in names.items():
        found = getattr(face, name)
        expected = importlib.import_module(f"{module}.{name}") if module == package else getattr(
            importlib.import_module(module), original)
        assert found is expected, name
    assert set(names) <= set(dir(face))


@pytest.mark.parametrize("package", [name for name in FACES if name != "mipipe"])
def test_no_name_of_a_face_is_that_of_a_module_beside_it(package: str) -> None:
    """Which of the two `from mipipe.planner import plan` gave would depend on what was imported before."""
    modules = {path.stem for path in FACES[package].iterdir()}
    assert not modules & set(read_stub(str(FACES[package] / "__init__.pyi")))


@pytest.mark.parametrize("package", FACES)
def test_an_unknown_name_is_an_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'magic'"):
        _ = importlib.import_module(package).magic
    with pytest.raises(ImportError):
        exec(f"from {package} import magic", {})


def test_importing_costs_nothing_and_planning_needs_no_torch() -> None:
    """In a fresh process: what is loaded after each step."""
    script = """
import json, sys
def heavy(): return sorted({"torch", "numpy", "pyomo", "pydantic", "yaml", "numba"} & set(sys.modules))
import mipipe, mipipe.graphs, mipipe.planner, mipipe.runtime
seen = [heavy()]
mipipe.Topology, mipipe.PlanningProblem, mipipe.Plan, mipipe.plan, mipipe.simulate, mipipe.check
seen.append(heavy())
mipipe.SolveResult, mipipe.compare, mipipe.uniform_problem
seen.append("torch" in sys.modules)
print(json.dumps(seen))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    alone, data, solver_needs_torch = json.loads(found.stdout)
    assert alone == [] and not {"torch", "pyomo", "numba"} & set(data) and not solver_needs_torch


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mipipe.__version__"}
    assert mipipe.__version__.count(".") == 2


def test_a_clone_works_where_another_version_is_installed(tmp_path: Path) -> None:
    """`python -m` in the clone puts its folder mipipe/ first: the face must find graphs/ beside it, not elsewhere."""
    run = subprocess.run([sys.executable, "-S", "-c", "import mipipe.graphs.errors as found; print(found.__file__)"],
                         capture_output=True, text=True, check=True, timeout=60, cwd=ROOT, env={"PYTHONPATH": "."})
    assert Path(run.stdout.strip()).resolve() == ROOT / "graphs" / "errors.py"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_import_from_the_faces_only(path: Path) -> None:
    wrong = [f"{node.lineno}: {name}" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                          else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
             if name.split(".")[0] == "mipipe" and name not in FACES]
    assert not wrong


def test_what_is_public_is_documented() -> None:
    missing = [name for name in read_stub(str(ROOT / "mipipe" / "__init__.pyi")) if not getattr(mipipe, name).__doc__]
    assert not missing


def test_a_folder_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(mipipe.InputError, match=r"is a folder, expected a graph or its file: mipipe\.capture\('"):
        mipipe.plan(tmp_path, "examples/cluster_2cpu.yaml", microbatches=2)
