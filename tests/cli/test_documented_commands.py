"""Every `mipipe` command that the README and the documentation show is one the command line accepts."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from command_line import COMMAND

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")),
         *sorted((ROOT / "docs" / "outputs").glob("*.txt")), ROOT / "docs" / "examples" / "job.sbatch"]


USAGE_ERROR = typer.BadParameter.__mro__[1]
"""Click's error for a command line that it refuses; newer typers bring a click of their own."""


def commands(text):
    """Command lines after a ``$``, or in a script after ``srun``; continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [match.group(1) for match in re.finditer(r"^(?:\$|srun) (mipipe .*?)(?: &)?$", joined, re.MULTILINE)]


def parse(line):
    """Hand a line's words to its verb's parser; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    if words[0].startswith("-"):
        verb, words = COMMAND, words
    else:
        assert words[0] in COMMAND.commands, f"no verb {words[0]}"
        verb, words = COMMAND.commands[words[0]], words[1:]
    try:
        verb.make_context("mipipe", words)
    except typer.Exit as end:  # --help
        assert end.exit_code == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_are_accepted(path):
    for line in commands(path.read_text()):
        try:
            parse(line)
        except USAGE_ERROR as error:
            raise AssertionError(f"{path.name}: {line}: {error.format_message()}") from None


def test_commands_are_found_and_wrong_ones_refused():
    found = [line for path in FILES for line in commands(path.read_text())]
    assert len(found) > 40 and len({line.split()[1] for line in found}) >= 13
    with pytest.raises(USAGE_ERROR):
        parse("mipipe plan graph.json --microbatchs 8")
