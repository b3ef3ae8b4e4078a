"""What is kept of a compiled kernel counts only while all that the kernel is made of is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mipipe.graphs.serialize import save
from mipipe.planner.jobs.paths import shift
from mipipe.planner.kernel import files_of
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.search import anneal_kernel, anneal_state

INNER = """
from mipipe.planner.kernel import kernel

@kernel
def inner(x):
    return x + {}
"""
OUTER = """
from typing import NamedTuple
from mipipe.planner.kernel import is_compiled, kernel
from inner import inner

class {name}(NamedTuple):
    x: int

@kernel
def outer(pair):
    return inner(pair.x)

print(is_compiled(outer), outer({name}(1)), outer.stats.cache_hits and sum(outer.stats.cache_hits.values()))
"""


def run(folder: Path, added: int, name: str = "Pair") -> str:
    (folder / "inner.py").write_text(INNER.format(added))
    (folder / "outer.py").write_text(OUTER.format(name=name))
    ended = subprocess.run([sys.executable, "-B", "-c", "import outer"], cwd=folder, capture_output=True, text=True,
                           timeout=100)
    assert not ended.returncode, ended.stderr
    return ended.stdout.strip()


@pytest.mark.slow
def test_a_kernel_is_as_new_as_what_it_calls(tmp_path: Path) -> None:
    """Numba alone would add 1 for ever: only the other module's text changes. A class that is gone ends no run."""
    assert run(tmp_path, 1) == "False 2 Counter()"
    assert run(tmp_path, 1) == "True 2 1"
    assert run(tmp_path, 5) == "False 6 Counter()"
    assert run(tmp_path, 5, "Couple") == "False 6 Counter()"
    assert run(tmp_path, 5, "Couple") == "True 6 1"
    for index in tmp_path.rglob("*.nbi"):
        index.write_bytes(index.read_bytes()[:40])
    assert run(tmp_path, 5, "Couple") == "False 6 Counter()"


CONSTANTS = """
from typing import NamedTuple
ADDED, TABLE, NESTED = {}
class Facts(NamedTuple):
    {}: int
    {}: int
"""
USER = """
import numpy
import constants
from constants import ADDED, TABLE, Facts
from mipipe.planner.kernel import is_compiled, kernel

@kernel
def user(facts):
    return ADDED + TABLE[0] + constants.NESTED[0] + 100 * facts.first - facts.second

print(is_compiled(user), user(Facts(first=1, second=2)), sum(user.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_constants_and_fields_of_modules_without_kernels_count(tmp_path: Path) -> None:
    """A constant is frozen wherever it was imported from, and the place of a field in a named tuple is, too."""
    def found(constants: str, *names: str) -> str:
        (tmp_path / "constants.py").write_text(CONSTANTS.format(constants, *names or ("first", "second")))
        (tmp_path / "user.py").write_text(USER)
        ended = subprocess.run([sys.executable, "-B", "-c", "import numpy, user"], cwd=tmp_path, capture_output=True,
                               text=True, timeout=100)
        assert not ended.returncode, ended.stderr
        return ended.stdout.strip()

    assert found("1, (0, 0), (0,)") == "False 99 0"
    assert found("1, (0, 0), (0,)") == "True 99 1"
    assert found("3, (0, 0), (0,)") == "False 101 0"
    assert found("3, (5, 0), (0,)") == "False 106 0"
    assert found("3, (5, 0), (7,)") == "False 113 0"
    assert found("3, (5, 0), (7,)", "second", "first").endswith("113 0")
    assert found("3, (5, 0), (7,)", "second", "first") == "True 113 1"


def test_constants_of_a_kernel_are_those_it_names(tmp_path: Path) -> None:
    """Every kernel's constant values are known by name; what else its module holds, addresses above all, is not."""
    assert "TURN=200;" in "".join(anneal_kernel.anneal.constants)
    assert not any(" at 0x" in text for text in anneal_kernel.anneal.constants)


def test_files_of_a_kernel_reach_through_modules() -> None:
    """The annealer calls its state, which walks along paths: all three modules count."""
    files = {Path(file).name for file in files_of(anneal_kernel.anneal)}
    assert {Path(anneal_kernel.__file__).name, Path(anneal_state.__file__).name, "paths.py"} <= files
    assert files_of(shift) == {shift.py_func.__code__.co_filename}


SIZES = (uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1),
         uniform_problem(ranks=8, microbatches=200, f=3, i=4, w=2),
         uniform_problem(ranks=4, microbatches=8, f=3, i=4, w=2, fb=6, copies=2),
         two_stream_problem(ranks=4, microbatches=400))
"""Of every kind of search, below and above where loops over actions are compiled."""
PLANNED = """
import sys
from numba.core import event

class Listener(event.Listener):
    def on_start(self, event):
        print("compiled", event.data["dispatcher"])
    def on_end(self, event):
        pass

event.register("numba:compile", Listener())
from mipipe.graphs.serialize import load
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.solve import plan

for file in sys.argv[1:]:
    for objective in ("makespan", "period"):
        assert plan(load(file, PlanningProblem), PlanOptions(time_limit_s=5, objective=objective)).plan is not None
"""


@pytest.mark.slow
def test_warming_leaves_nothing_to_compile(tmp_path: Path) -> None:
    """`longest` was left to the first plan of more than `COMPILED` actions, whatever its limit."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-m", "mipipe.planner.warm"], check=True, env=environment, timeout=280)
    for number, problem in enumerate(SIZES):
        save(problem, tmp_path / f"{number}.json")
    files = [tmp_path / f"{number}.json" for number in range(len(SIZES))]
    ended = subprocess.run([sys.executable, "-c", PLANNED, *files], check=True, env=environment,
                           timeout=200, capture_output=True, text=True)
    assert not ended.stdout
