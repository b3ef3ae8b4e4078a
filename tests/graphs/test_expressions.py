"""Patterns of people's files: bounded work wherever one is looked for, and one line where it is none."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mipipe.graphs import expressions
from mipipe.graphs.capture.annotate import load_patterns, tag
from mipipe.graphs.errors import InputError
from mipipe.graphs.expressions import check_expression, search, substitute
from mipipe.graphs.merging.checkpoints import lora
from mipipe.graphs.merging.values import Filters
from mipipe.graphs.models import sources
from mipipe.runtime.train.config import GroupConfig
from mipipe.runtime.train.optim import parameter_groups

ENDLESS = (r"(a+)+$", r"((a|a)*)*$", r"(\w*\w*)*#", r"(.*a){30}b", r"(a|aa)+$")
NAME = "a" * 400 + "!b"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.05)


@pytest.mark.parametrize("text", ENDLESS)
def test_a_pattern_that_tries_without_end_is_an_error(text: str) -> None:
    before, began = signal.getsignal(signal.SIGVTALRM), time.monotonic()
    for look in (lambda: search(text, NAME), lambda: substitute(text, "x", NAME)):
        with pytest.raises(InputError, match=r"takes more than 0.05 s to look for in 'aaaa") as caught:
            look()
        assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 20  # of a machine that others use
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_plain_patterns_are_found_as_python_does() -> None:
    for text in (r"\.mlp\.", r"(^|\.)h\.(\d+)", r"q_proj|k_proj", "x{2,3}"):
        for name in ("model.h.3.mlp.up", "h.12", "xxx", "", "k_proj"):
            ours, plain = search(text, name), re.search(text, name)
            assert (ours and ours.span()) == (plain and plain.span())
            assert substitute(text, "_", name) == re.sub(text, "_", name)


@pytest.mark.parametrize("text", ["(", "a{5000000000}", "(" * 5000 + ")" * 5000, "[z-a]", "*"])
def test_what_is_no_expression_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^here: .* is no regular expression: ") as caught:
        check_expression(text, "here")
    assert len(str(caught.value)) < 500


def tags_of(folder: Path) -> object:
    (folder / "tags.yaml").write_text(f"roles: {{'{ENDLESS[0]}': mlp}}\n")
    return tag(NAME, (load_patterns(folder / "tags.yaml"),))


def module() -> torch.nn.Module:
    made = torch.nn.Module()
    made.register_parameter(NAME.replace("!", "_"), torch.nn.Parameter(torch.zeros(1)))
    return made


@pytest.mark.parametrize("look", [
    tags_of, lambda folder: Filters().matches(f"re:{ENDLESS[0]}", NAME),
    lambda folder: lora.rename([(ENDLESS[0], "x")], NAME), lambda folder: lora.pattern_key({"(a+)+": 1}, NAME),
    lambda folder: sources._freeze(module(), [ENDLESS[0]]),
    lambda folder: parameter_groups(list(module().named_parameters()), [GroupConfig(ENDLESS[0], {})])])
def test_every_kind_of_pattern_is_bounded(look: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes more than"):
        look(tmp_path)


def test_a_pattern_that_freezes_nothing_is_an_error() -> None:
    made = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert [item.requires_grad for item in sources._freeze(made, [r"^0\."]).parameters()] == [False, False, True, True]
    with pytest.raises(InputError, match=r"freeze: '\^5' matches no parameter of the model, whose first is 0.weight"):
        sources._freeze(made, [r"^0\.", "^5"])
    with pytest.raises(InputError, match="freeze: '\\(' is no regular expression"):
        sources._freeze(made, ["("])
