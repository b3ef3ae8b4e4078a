"""The direction of imports and the homes of torch and the solver, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("graphs", "planner", "runtime", "cli")
"""Each may import itself and what stands before it."""
TORCH_IN_GRAPHS = ("capture", "models", "operators", "profiling", "recipes", "sharding", "tracing")
"""Folders of graphs/ that work on tensors and modules; everything else starts without torch."""
LIGHT_VERBS = ("plan", "place", "experts", "calibrate", "check", "simulate", "show", "compare", "export",
               "main", "requests.files", "requests.inputs", "requests.modes", "requests.settings", "requests.solving",
               "printing.modes", "printing.output", "printing.planned", "printing.explained", "printing.terminal",
               "printing.html", "printing.frontier", "printing.panels", "printing.report", "printing.tables")
"""Modules of cli/ that must work without torch."""


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    """A file, parsed once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def _nodes(path: Path) -> tuple[ast.stmt, ...]:
    """The imports of a file, wherever in it they stand."""
    return tuple(node for node in ast.walk(_tree(path)) if isinstance(node, ast.Import | ast.ImportFrom))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module name a file imports, with its line."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write mipipe.<folder>.<module>"
            module = node.module or ""
            yield module, node.lineno
            if module == "mipipe":
                yield from ((f"mipipe.{alias.name}", node.lineno) for alias in node.names)


def _under(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def test_only_the_command_line_knows_the_face() -> None:
    """The face imports all folders; whoever imports it back makes a circle. (`mipipe --version` reads the version.)"""
    face = {path.stem for path in _files("mipipe")}
    wrong = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in _files(*LAYERS) for name, line in _imports(path)
             if name == "mipipe" or name.removeprefix("mipipe.") in face]
    assert {item.partition(":")[0] for item in wrong} == {"cli/main.py"}, "\n".join(wrong)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_imports_only_the_layers_before_it(layer: str) -> None:
    """graphs <- planner <- runtime <- cli; what flows back flows through files."""
    later = [f"mipipe.{other}" for other in LAYERS[LAYERS.index(layer) + 1:]]
    files = _files(layer)
    assert files
    wrong = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in files for name, line in _imports(path)
             if _under(name, *later)]
    assert not wrong, "imports against the one direction:\n" + "\n".join(wrong)


def test_nothing_imports_the_folders_by_their_bare_names() -> None:
    """`import planner` from the repository root would make a second copy whose classes are not equal."""
    wrong = [f"{path.relative_to(ROOT)}:{line}: {name}"
             for path in _files(*LAYERS, "examples", "tests", "benchmarks") for name, line in _imports(path)
             if _under(name, *LAYERS)]
    assert not wrong, "write mipipe.<folder>:\n" + "\n".join(wrong)


def test_torch_lives_in_the_runtime_and_in_some_folders_of_graphs() -> None:
    """The planner starts without torch."""
    wrong = [f"{path.relative_to(ROOT)}:{line}: {name}"
             for path in _files("graphs", "planner") for name, line in _imports(path)
             if _under(name, "torch", "transformers", "safetensors", "torchdata")
             and not path.is_relative_to(ROOT / "planner")
             and path.parent.name not in TORCH_IN_GRAPHS]
    assert not wrong, "torch outside its homes:\n" + "\n".join(wrong)


def test_the_solver_lives_in_planner_milp() -> None:
    """A worker starts without a solver."""
    wrong = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in _files(*LAYERS, "examples")
             for name, line in _imports(path)
             if _under(name, "pyomo", "highspy", "ortools") and "milp" not in path.parts]
    assert not wrong, "the solver outside planner/milp:\n" + "\n".join(wrong)


def test_pyomo_is_imported_where_a_model_is_built() -> None:
    """It takes longer to import than many a plan takes to find: no module does so as it is imported itself."""
    wrong = []
    for path in _files("planner"):
        for node in _tree(path).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for name in names if _under(name, "pyomo")]
    assert not wrong, "write `from mipipe.planner.milp import pyo`:\n" + "\n".join(wrong)


def test_light_verbs_do_not_name_torch_or_the_runtime() -> None:
    paths = [ROOT / "cli" / (stem.replace(".", "/") + ".py") for stem in LIGHT_VERBS]
    wrong = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in paths for name, line in _imports(path)
             if _under(name, "torch", "mipipe.runtime", *(f"mipipe.graphs.{folder}" for folder in TORCH_IN_GRAPHS))]
    assert not wrong, "verbs that must start without torch:\n" + "\n".join(wrong)


def test_a_class_has_one_meaning() -> None:
    """No two modules define public classes of one name: whoever reads a name knows which is meant."""
    places: dict[str, list[str]] = {}
    for path in _files(*LAYERS, "mipipe"):
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert len(places) > 300 and not twice, twice


def test_a_number_of_the_planner_has_its_words() -> None:
    """What it counts, in what unit, and why so many, beneath every number that a module of planner/ names, and beneath
    every row of a table of numbers. There are not to be more of them: what follows from another is derived."""
    def is_number(node: ast.expr) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple) else [node]
        return all(isinstance(item, ast.Constant | ast.BinOp | ast.UnaryOp) and not any(
            isinstance(name, ast.Name) for name in ast.walk(item)) and any(
            isinstance(value, ast.Constant) and type(value.value) in (int, float) for value in ast.walk(item))
            for item in parts) and bool(parts)

    def is_said(node: ast.stmt) -> bool:
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

    def named(body: list[ast.stmt]) -> Iterator[tuple[int, bool]]:
        """The line of every number that a body names, and whether words follow."""
        waiting: list[int] = []
        for node in [*body, ast.Pass()]:
            if isinstance(node, ast.Assign) and is_number(node.value):
                waiting.append(node.lineno)
            else:
                yield from ((line, is_said(node)) for line in waiting)
                waiting = []

    def tables(body: list[ast.stmt]) -> Iterator[ast.ClassDef]:
        """Classes of which a module names the one with all defaults."""
        made = {node.value.func.id for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Name) and not node.value.args and not node.value.keywords}
        yield from (node for node in body if isinstance(node, ast.ClassDef) and node.name in made)

    bodies = [(path, _tree(path).body) for path in _files("planner")]
    numbers = [(path, line, said) for path, body in bodies for line, said in named(body)]
    rows = [(path, row.lineno, is_said(after)) for path, body in bodies for table in tables(body)
            for row, after in pairwise([*table.body, ast.Pass()]) if isinstance(row, ast.AnnAssign)]
    wrong = [f"{path.relative_to(ROOT)}:{line}" for path, line, said in (*numbers, *rows) if not said]
    assert not wrong, "numbers without words:\n" + "\n".join(wrong)
    assert 100 < len(numbers) <= 153 and len(rows) > 30


def test_no_module_imports_itself_through_others() -> None:
    """Circles hide where a change may matter; imports inside functions and for types count too."""
    files = {".".join(("mipipe", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
             for path in _files(*LAYERS)}
    arrows = {module: {target for name, _ in _names(path) for target in (_longest(name, files),) if target} - {module}
              for module, path in files.items()}
    reached = {module: _reachable(module, arrows) for module in arrows}
    circles = sorted({tuple(sorted({other for other in reached[module] if module in reached[other]}))
                      for module in arrows if module in reached[module]})
    assert not circles, "modules that import each other in a circle:\n" + "\n".join(map(", ".join, circles))


CIRCLES = {("runtime.checkpoints", "runtime.recipes", "runtime.train")}
"""Folders that import each other in a circle; what comes apart goes from here, and nothing comes in."""


def test_no_folder_imports_itself_through_others() -> None:
    """Modules directly in graphs/, planner/, runtime/ and cli/ stand for themselves: data below, verbs above."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in _files(*LAYERS)}
    room = {module: module if path.parent.parent == ROOT else ".".join(path.relative_to(ROOT).parts[:-1])
            for module, path in files.items()}
    arrows: dict[str, set[str]] = {name: set() for name in room.values()}
    for module, path in files.items():
        found = {_longest(name.removeprefix("mipipe."), files) for name, _ in _names(path)} - {None}
        arrows[room[module]] |= {room[target] for target in found if target} - {room[module]}
    reached = {name: _reachable(name, arrows) for name in arrows}
    circles = {tuple(sorted(other for other in reached[name] if name in reached[other]))
               for name in arrows if name in reached[name]}
    assert circles == CIRCLES


def _names(path: Path) -> Iterator[tuple[str, int]]:
    """As `_imports`, with the imported name appended: `from a import b` may name the module a.b."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _longest(name: str, modules: Collection[str]) -> str | None:
    """The module that a dotted name stands for: itself, or the module that has it as an attribute."""
    return name if name in modules else name.rpartition(".")[0] if name.rpartition(".")[0] in modules else None


def _reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    found, pending = set[str](), [start]
    while pending:
        for target in arrows[pending.pop()] - found:
            found.add(target)
            pending.append(target)
    return found


def test_modules_go_by_their_own_names() -> None:
    """A module of the planner is imported under its own name: one thing, one name."""
    named = {(file.relative_to(ROOT).as_posix(), node.module, alias.name, alias.asname)
             for file in _files("planner") for node in _nodes(file) if isinstance(node, ast.ImportFrom)
             and (node.module or "").startswith("mipipe") for alias in node.names
             if alias.asname not in (None, alias.name)
             and (ROOT / (node.module or "").removeprefix("mipipe.").replace(".", "/") / f"{alias.name}.py").is_file()}
    assert not named
