"""What the distribution says about itself: every folder is packaged, every data file travels, pins are honest."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

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
