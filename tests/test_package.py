"""What the distribution says about itself: every folder is packaged, every data file travels, pins are honest."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("graphs", "planner", "runtime", "cli")
FACE = "mipipe"
"""The folder with the package's own face; the others are mapped into the package."""


def test_the_list_of_packages_equals_the_folders() -> None:
    """A package missing from the list works when installed editable and is absent from the wheel."""
    found = {"mipipe." + ".".join(path.parent.relative_to(ROOT).parts)
             for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")} | {FACE}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_code_is_a_package() -> None:
    missing = {str(path.parent.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
               if not (path.parent / "__init__.py").exists()}
    assert not missing


def test_data_files_are_packaged() -> None:
    """Whatever lies beside the code and is no Python must match a pattern of package-data."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for folder in (*FOLDERS, FACE):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                package = ".".join(("mipipe", *path.parent.relative_to(ROOT).parts)).replace("mipipe.mipipe", "mipipe")
                assert any(path.match(pattern) for pattern in patterns.get(package, [])), f"{path} is not packaged"


def test_the_console_script_exists() -> None:
    module, _, function = PROJECT["project"]["scripts"]["mipipe"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_torch_is_pinned_for_make_and_only_bounded_for_users() -> None:
    """A plain `torch` would pull gigabytes in CI; a pin in pyproject would bind every user to it."""
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    extras = PROJECT["project"]["optional-dependencies"]
    assert any(line.startswith("torch>=") for line in extras["runtime"])
    assert not any("==" in line for lines in (PROJECT["project"]["dependencies"], *extras.values()) for line in lines)


def test_the_link_for_type_checkers_is_there() -> None:
    """mypy does not follow the editable install's import hook (see [tool.mypy])."""
    links = ROOT / ".typing" / "mipipe"
    assert all((links / folder / "__init__.py").samefile(ROOT / folder / "__init__.py") for folder in FOLDERS)
    for path in (ROOT / FACE).iterdir():
        assert path.is_dir() or (links / path.name).samefile(path), f"{path} has no link under .typing/mipipe"


@pytest.mark.slow
def test_the_wheel_works_alone(tmp_path: Path) -> None:
    """Built and installed elsewhere: the command line, the face, a worker's module and the types are all there.

    (Dependencies are this environment's. Needs setuptools >= 77, as pyproject.toml says.)
    """
    def python(*arguments: str, cwd: Path = tmp_path, **environment: str) -> str:
        found = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=250,
                               env={**os.environ, **environment})
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()

    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "demo"))
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    wheel = next(tmp_path.glob("*.whl"))
    python("-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    shutil.rmtree(source)
    site = {"PYTHONPATH": str(tmp_path / "site")}
    show = "import mipipe, mipipe.graphs.errors as e; print(mipipe.__file__, e.__file__, mipipe.Plan, mipipe.plan)"
    told = python("-c", show, **site)
    assert told.count(str(tmp_path / "site")) == 2 and str(ROOT) not in told
    assert python("-m", "mipipe.cli.main", "--version", **site).startswith("mipipe ")
    assert "--plan" in python("-m", "mipipe.runtime.worker", "--help", **site)
    assert (tmp_path / "site" / "mipipe" / "py.typed").exists()
    in_clone = python("-c", show, cwd=ROOT, **site)  # the current folder comes first, and is complete
    assert in_clone.count(str(ROOT)) == 2 and str(tmp_path) not in in_clone
