"""Texts of different kinds that a machine with Python has anyway, each cut into training, validation and test parts.

code: Python's own modules without their docstrings and comments; prose: these docstrings; german and russian: messages
of translated programs (gettext catalogues); logs: the package manager's; numbers: scikit-learn's tables. What a machine
lacks is left out, and said.
"""

from __future__ import annotations

import ast
import gettext
import gzip
import io
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

MOST, BLOCK = 1_000_000, 2_000
"""Bytes of a kind, and of the blocks that are dealt out: of ten, one to validation and one to test."""


def _modules() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="ignore")


def code() -> Iterator[bytes]:
    """Source without docstrings and comments."""
    for text in _modules():
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
            lines, skip = text.splitlines(), set[int]()
        except (tokenize.TokenError, SyntaxError):
            continue
        for token in tokens:
            docstring = token.type == tokenize.STRING and token.string[-3:] in ("'''", '"""')
            if docstring or token.type == tokenize.COMMENT:
                skip |= set(range(token.start[0], token.end[0] + 1))
        yield "\n".join(line for number, line in enumerate(lines, 1) if number not in skip and line.strip()).encode()


def prose() -> Iterator[bytes]:
    """Docstrings."""
    for text in _modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (found := ast.get_docstring(node)):
                yield found.encode() + b"\n\n"


def _catalogue(language: str) -> Callable[[], Iterator[bytes]]:
    def messages() -> Iterator[bytes]:
        for file in sorted(Path(f"/usr/share/locale/{language}/LC_MESSAGES").glob("*.mo")):
            if file.name.startswith("iso_"):  # lists of names
                continue
            try:
                with file.open("rb") as stream:
                    catalogue = gettext.GNUTranslations(stream)
            except (OSError, UnicodeDecodeError, ValueError):
                continue
            for message in catalogue._catalog.values():  # type: ignore[attr-defined]
                if isinstance(message, str) and len(message) > 40:
                    yield message.strip().encode() + b"\n"
    return messages


def logs() -> Iterator[bytes]:
    """The package manager's log."""
    for file in sorted(Path("/var/log").glob("dpkg.log")):
        yield file.read_bytes()


def numbers() -> Iterator[bytes]:
    """Tables of measurements."""
    import sklearn
    for file in sorted((Path(sklearn.__file__).parent / "datasets" / "data").glob("*.csv*")):
        yield gzip.decompress(file.read_bytes())[:120_000] if file.suffix == ".gz" else file.read_bytes()


KINDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "prose": prose, "code": code, "german": _catalogue("de"), "russian": _catalogue("ru"), "logs": logs,
    "numbers": numbers}


def split(name: str) -> dict[str, bytes]:
    """The parts of a kind: of every ten blocks the ninth is for validation and the tenth for test."""
    data, size = io.BytesIO(), 0
    for piece in KINDS[name]():
        data.write(piece)
        size += len(piece)
        if size >= MOST:
            break
    text = data.getvalue()[:MOST]
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for number, start in enumerate(range(0, len(text) - BLOCK + 1, BLOCK)):
        part = {8: "validation", 9: "test"}.get(number % 10, "train")
        block = text[start:start + BLOCK].decode(errors="ignore")  # without letters that the cut goes through
        parts[part].append(block.encode())
    return {part: b"".join(blocks) for part, blocks in parts.items()}
