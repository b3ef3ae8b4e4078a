"""What the README shows as a library runs as it stands there."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mipipe

ROOT = Path(__file__).resolve().parent.parent


def snippet() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"## Use it as a library\n\n```python\n(.*?)```", text, re.S)
    assert found is not None
    return found[1]


def test_the_library_in_fifteen_lines() -> None:
    lines = [line for line in snippet().splitlines() if line.strip()]
    assert len(lines) <= 15
    assert "import mipipe\n" in snippet() and "from mipipe." not in snippet()
    calls = [node for node in ast.walk(ast.parse(snippet())) if isinstance(node, ast.Call)]
    named = [(node.func.attr, node) for node in calls if isinstance(node.func, ast.Attribute)
             and isinstance(node.func.value, ast.Name) and node.func.value.id == "mipipe"]
    assert {"capture", "plan", "show", "train"} <= {name for name, _ in named}
    for name, node in named:
        signature = inspect.signature(getattr(mipipe, name))
        signature.bind(*node.args, **{str(item.arg): item.value for item in node.keywords})


@pytest.mark.slow
@pytest.mark.distributed
def test_the_library_code_of_the_readme_runs(tmp_path: Path) -> None:
    """With four small layers, one for every stage of ZB-V: captured, profiled, planned, drawn, compared, trained."""
    examples = tmp_path / "examples"
    (examples / "qwen3_moe_tiny").mkdir(parents=True)
    config = json.loads((ROOT / "examples/qwen3_moe_tiny/config.json").read_text(encoding="utf-8"))
    small = config | {"num_hidden_layers": 4, "hidden_size": 32}
    (examples / "qwen3_moe_tiny" / "config.json").write_text(json.dumps(small))
    (examples / "cluster_2cpu.yaml").write_text((ROOT / "examples/cluster_2cpu.yaml").read_text(encoding="utf-8"))
    (tmp_path / "readme.py").write_text(snippet())
    run = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    assert "of the bound" in run.stdout and "tokens/s per device" in run.stdout and "ZB-V (split)" in run.stdout
    losses = json.loads(run.stdout.strip().splitlines()[-1].replace("(", "[").replace(")", "]"))
    assert len(losses) == 4 and losses[-1] < losses[0] * 1.05
    assert (tmp_path / "plan.json").exists() and "<canvas" not in (tmp_path / "timeline.html").read_text()
