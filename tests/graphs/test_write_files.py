"""Outputs replace nothing but the file that was meant: links, pipes, modes and descriptors stay what they are."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mipipe.graphs import write_files
from mipipe.graphs.errors import InputError
from mipipe.graphs.write_files import check_apart, check_output, open_lines, write_text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    for mask, expected in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_text(tmp_path / f"new{mask}", "x")
        finally:
            os.umask(before)
        assert mode(tmp_path / f"new{mask}") == expected


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o666, 0o755])
def test_a_mode_stays(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "file"
    path.write_text("old, and longer than the new")
    path.chmod(bits)
    inode = path.stat().st_ino
    write_text(path, "new")
    assert path.read_text() == "new" and mode(path) == bits
    assert path.stat().st_ino != inode  # by a rename: a reader sees the old file or the new one
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, target in (("absolute", tmp_path / "there" / "a"), ("relative", Path("there/b")),
                         ("twice", Path("relative"))):
        (tmp_path / name).symlink_to(target)
        write_text(tmp_path / name, name)
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == name
    assert (tmp_path / "there" / "b").read_text() == "twice"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "loop", "x")


def test_a_pipe_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(path.read_text()))
    reader.start()
    write_text(path, "x" * 300_000)
    reader.join(20)
    assert found == ["x" * 300_000] and stat.S_ISFIFO(path.stat().st_mode)


def test_a_pipe_that_nobody_reads_is_an_error_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_files, "PATIENCE_S", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="nothing read the pipe"):
        write_text(tmp_path / "pipe", "x")
    handle = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # a reader that takes nothing
    with pytest.raises(InputError, match="the reader took nothing"):
        write_text(tmp_path / "pipe", "x" * 300_000)
    os.close(handle)


def test_devices(tmp_path: Path) -> None:
    write_text("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(InputError, match="/dev/full: cannot be written: No space left"):
        write_text("/dev/full", "x" * 10)
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path, "x")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write_text(tmp_path / "no" / "file", "x")
    assert not list(tmp_path.iterdir())


WRITER = ("import sys; from mipipe.graphs.write_files import write_text; print('before');"
          " write_text(sys.argv[1], 'DATA\\n'); print('after')")


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1", "link"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_standard_output_is_written_where_it_is(tmp_path: Path, name: str, to: str) -> None:
    """Redirected to a file, the bytes land after what was printed, and the file is the same one."""
    if name == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        name = str(tmp_path / "link")
    command = [sys.executable, "-c", WRITER, name]
    if to == "pipe":
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    else:
        with (tmp_path / "out").open("w") as stream:
            subprocess.run(command, stdout=stream, check=True, timeout=60)
            assert os.fstat(stream.fileno()).st_ino == (tmp_path / "out").stat().st_ino
        text = (tmp_path / "out").read_text()
    assert text == "before\nDATA\nafter\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everything")
def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(InputError, match="read-only"):
        write_text(path, "new")
    with pytest.raises(InputError, match="read-only"):
        check_output(path, "-o")
    assert path.read_text() == "old"


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "the folder .* does not exist")):
        with pytest.raises(InputError, match=words):
            check_output(path, "-o")
    check_output(tmp_path / "new", "-o")
    (tmp_path / "dangling").symlink_to(tmp_path / "no" / "file")
    with pytest.raises(InputError, match="does not exist"):
        check_output(tmp_path / "dangling", "-o")


def test_lines_go_on_after_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old\n")
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    with open_lines(tmp_path / "link", "kept\n") as stream:
        stream.write("new\n")
    assert path.read_text() == "kept\nnew\n" and mode(path) == 0o600 and (tmp_path / "link").is_symlink()
    with open_lines("/dev/null", "") as stream:
        stream.write("x")


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    """By what their names lead to; a device keeps nothing and may be named twice."""
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for first, second in (("a", "a"), ("a", "./x/../a"), ("link", "a")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"-o and --html both write .*a: give each a file of its own"):
            check_apart({"-o": tmp_path / first, "--trace": None, "--html": f"{tmp_path}/{second}"})
    check_apart({"-o": tmp_path / "a", "--html": tmp_path / "b", "--trace": "/dev/null", "--csv": "/dev/null"})


def test_another_name_of_a_file_keeps_what_was_there(tmp_path: Path) -> None:
    """Backups by hard links would change otherwise; and a reader of either name never sees half a file."""
    path = tmp_path / "file"
    path.write_text("old")
    os.link(path, tmp_path / "backup")
    write_text(path, "new")
    assert path.read_text() == "new" and (tmp_path / "backup").read_text() == "old"
