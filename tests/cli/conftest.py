"""A command line to call in-process, and a small planned problem on disk."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from command_line import COMMAND

from mipipe.graphs.serialize import save
from mipipe.planner.options import PlanOptions
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import plan


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def data(self) -> dict[str, Any]:
        """The one JSON object of ``--json``."""
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """The error's line, without the program's name. Fails if there is a traceback or more than one line."""
        assert self.stdout == ""
        assert self.stderr.startswith("mipipe: error: ") and self.stderr.endswith("\n"), self.stderr
        assert "Traceback" not in self.stderr
        return self.stderr.removeprefix("mipipe: error: ").rstrip("\n")


Run = Callable[..., Ended]


def call(*arguments: object) -> Ended:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            COMMAND([str(argument) for argument in arguments], "mipipe")
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def mipipe() -> Run:
    """``mipipe("plan", file, "--json")`` -> how it ended."""
    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """problem.json (4 equal ranks, 8 microbatches) and plan.json, a chain plan of it."""
    path = tmp_path_factory.mktemp("cli")
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, copies=1)
    save(problem, path / "problem.json")
    found = plan(problem, PlanOptions(time_limit_s=3, placement="chain")).plan
    assert found is not None
    save(found, path / "plan.json")
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small model and its weights, that loaders are found from."""
    import torch
    from recipe_runs import HERE, MODEL
    from transformers import AutoConfig, AutoModelForCausalLM
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", HERE)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(MODEL))
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("config")).save_pretrained("base")
    return tmp_path
