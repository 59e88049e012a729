"""A result is there whole or not at all, whatever happens while it is written and whoever else writes it."""

from __future__ import annotations

import ast
import errno
import gzip
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds import files
from embrag_ds.errors import UserError
from embrag_ds.files import (
    folder_written,
    make_folder,
    read_lines,
    remove_leftovers,
    require_writable,
    split_fields,
    write_json,
    write_text,
    written,
    written_together,
)
from tests.folders import unwritable

FAULTS = (KeyboardInterrupt, SystemExit, ValueError, OSError, MemoryError)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@given(
    attempts=st.lists(st.tuples(st.binary(max_size=99), st.sampled_from([None, *FAULTS]), st.booleans()), max_size=6)
)
def test_a_file_holds_what_was_last_written_without_a_fault(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[bytes, type[BaseException] | None, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("written")
    path = folder / "result.tar.gz"
    expected = None
    for content, fault, late in attempts:
        with suppress(*FAULTS), written(path) as temporary:
            assert temporary.parent == folder and temporary.name.endswith("-result.tar.gz")
            assert temporary.read_bytes() == b""
            assert (path.read_bytes() if path.exists() else None) == expected
            temporary.write_bytes(content if fault is None or late else content[: len(content) // 2])
            if fault is not None:
                raise fault
        if fault is None:
            expected = content
        assert names(folder) == (set() if expected is None else {"result.tar.gz"})
        assert expected is None or path.read_bytes() == expected


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, mask: int) -> None:
    private = tmp_path / "private"
    private.write_text("made by a library")
    private.chmod(0o600)
    with umask(mask):
        write_text(tmp_path / "text", "new")
        write_text(tmp_path / "text", "and again")
        with written(tmp_path / "replaced") as temporary:
            private.rename(temporary)
        with folder_written(tmp_path / "folder") as building:
            (building / "file").touch()
        (tmp_path / "usual").touch()
        (tmp_path / "usual folder").mkdir()
    usual = permissions(tmp_path / "usual")
    assert usual == 0o666 & ~mask
    assert [permissions(tmp_path / name) for name in ("text", "replaced", "folder/file")] == [usual] * 3
    assert permissions(tmp_path / "folder") == permissions(tmp_path / "usual folder") == 0o777 & ~mask


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "a\u00e4\n")
    write_json(tmp_path / "json", {"a": [1.5, None]})
    assert (tmp_path / "text").read_bytes() == b"a\xc3\xa4\n"
    assert (tmp_path / "json").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ]\n}\n'


LINES = ["sample pop", "", "z\u00fcrich \u2028 \x85 \x0b \x0c \x1c a"]


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_lines_are_the_same_however_a_program_writes_text(
    tmp_path: Path, encoding: str, end: str, compressed: bool
) -> None:
    mark = "\ufeff" if encoding.startswith(("utf-16", "utf-32")) else ""
    for last in ("", end):
        content = (mark + end.join(LINES) + last).encode(encoding)
        (tmp_path / "text").write_bytes(gzip.compress(content, mtime=0) if compressed else content)
        assert read_lines(tmp_path / "text", "table") == LINES


@given(content=st.binary(max_size=40).filter(lambda content: b"\0" not in content))
def test_bytes_of_no_encoding_come_out_as_they_came_in(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "text"
    path.write_bytes(b"x" + content)
    write_text(path, "".join(f"{line}\n" for line in read_lines(path, "table")))
    unix = (b"x" + content).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert path.read_bytes() == unix + (b"" if unix.endswith(b"\n") else b"\n")


def test_an_empty_file_has_no_lines_and_several_members_of_gzip_are_one_text(tmp_path: Path) -> None:
    for content, lines in (
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (gzip.compress(b"", mtime=0), []),
        (gzip.compress(b"a\nb", mtime=0) + gzip.compress(b"c\n", mtime=0) + gzip.compress(b"", mtime=0), ["a", "bc"]),
        (b"\n\n", ["", ""]),
    ):
        (tmp_path / "text").write_bytes(content)
        assert read_lines(tmp_path / "text", "table") == lines


@pytest.mark.parametrize("content", [b"a b\n", gzip.compress(b"a b\n", mtime=0), b""], ids=["plain", "gzip", "empty"])
def test_a_pipe_is_read(tmp_path: Path, content: bytes) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content), daemon=True)
    writer.start()
    assert read_lines(tmp_path / "pipe", "table") == ["a b"][: len(content)]
    writer.join(timeout=30)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04\0\0", "not plain or gzipped text"),
        ("a b\n".encode("utf-16-le"), "not plain or gzipped text"),
        (b"\xff\xfea", "not plain or gzipped text"),
        (b"\xff\xfe\x00\xd8", "not plain or gzipped text"),
        (gzip.compress(b"a b\n", mtime=0)[:-6], "not plain or gzipped text"),
        (gzip.compress(b"a b\n", mtime=0) + b"garbage", "not plain or gzipped text"),
        (b"x" * 65, "it has more than 64 bytes of text"),
        (gzip.compress(b"\n" * 10_000, mtime=0), "it has more than 64 bytes of text"),
        (None, "Is a directory"),
    ],
    ids=["zip", "no mark", "odd", "surrogate", "truncated", "garbage", "long", "bomb", "folder"],
)
def test_what_is_no_text_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, reason: str
) -> None:
    monkeypatch.setattr(files, "_MOST_TEXT_BYTES", 64)
    path = tmp_path if content is None else tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_lines(path, "table")
    assert str(raised.value) == f"{path}: cannot read the table ({reason}); check the path or write it again"


def test_fields_have_no_blanks_around_them() -> None:
    assert split_fields("NA 1 \t EUR \t\tx\u00a0\t ") == ["NA 1", "EUR", "", "x"]
    assert split_fields("  a   b ") == ["a", "b"]
    assert split_fields("\tb") == ["", "b"]
    assert split_fields("") == split_fields(" \t ") == []


Asks = Callable[[Path], None]


@pytest.mark.parametrize("ask", [lambda path: write_text(path, "new"), require_writable], ids=["write", "ask"])
def test_where_no_file_can_be_made_is_said_with_a_remedy(tmp_path: Path, ask: Asks) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "file")
    closed = unwritable(tmp_path)
    before = names(tmp_path)
    for path, complaint in {
        tmp_path / "none" / "out": f"the folder {tmp_path / 'none'} does not exist; create it",
        tmp_path / "file" / "out": f"the folder {tmp_path / 'file'} does not exist; create it",
        tmp_path / "link": f"the folder {tmp_path / 'gone'} does not exist; create it",
        tmp_path: "it is a folder; give the name of a file",
        closed / "out": f"the folder {closed} cannot be written to; check its permissions, or choose another",
    }.items():
        with pytest.raises(UserError) as raised:
            ask(path)
        assert str(raised.value) == f"{path}: {complaint}"
    assert names(tmp_path) == before and (tmp_path / "file").read_text() == "mine"


def test_whether_a_file_can_be_made_is_found_out_without_making_one(tmp_path: Path) -> None:
    require_writable(tmp_path / "out")
    assert names(tmp_path) == set()
    write_text(tmp_path / "out", "old")
    require_writable(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old"


def test_folders_for_results(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot make this folder \(File exists\); choose another"):
        make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot make this folder"):
        make_folder(unwritable(tmp_path) / "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("where", ["block", "file in the block", "fsync"])
def test_a_full_disk_is_said_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    write_text(tmp_path / "out", "old")
    with folder_written(tmp_path / "folder") as building:
        (building / "file").write_text("old")

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def fill(temporary: Path) -> None:
        if where == "block":
            full()
        if where == "file in the block":
            raise OSError(code, os.strerror(code), str(temporary))

    complaint = rf"{tmp_path}/(out|folder): cannot write it \({os.strerror(code)}\); free some space in {tmp_path}, or"
    if where == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=complaint), written(tmp_path / "out") as temporary:
        temporary.write_text("new")
        fill(temporary)
    with pytest.raises(UserError, match=complaint), folder_written(tmp_path / "folder") as building:
        (building / "file").write_text("new")
        fill(building / "file")
    assert names(tmp_path) == {"out", "folder"}
    assert (tmp_path / "out").read_text() == (tmp_path / "folder" / "file").read_text() == "old"


def test_a_file_system_that_cannot_flush_a_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files.os, "fsync", unable)
    write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "new"


@pytest.mark.parametrize("writer", [written, folder_written])
def test_what_fails_for_another_reason_is_raised_as_it_is(tmp_path: Path, writer: Callable) -> None:
    for fault in (
        FileNotFoundError(errno.ENOENT, "no such panel", str(tmp_path / "panel")),
        OSError(errno.ENOSPC, "full", "/elsewhere/scratch"),
        OSError("a library's"),
    ):
        with pytest.raises(OSError) as raised, writer(tmp_path / "out"):
            raise fault
        assert raised.value is fault
    assert names(tmp_path) == set()


# In a process of its own, which no test but this one kills, and whose files may be no longer than 4 KB.
SCRIPT = """
import resource, sys, time
import numpy as np
from pathlib import Path
from embrag_ds.cli.command import run_command
from embrag_ds.variants.sites import SiteTable
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.files import folder_written, written

path = Path(sys.argv[2])

def killed():
    with written(path) as temporary, folder_written(path.parent / "folder") as building:
        temporary.write_text("half")
        (building / "file").write_text("half")
        print("ready", flush=True)
        for _ in range(600):  # a signal just before a sleep does not shorten it
            time.sleep(0.1)

def short():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

def text():
    short()
    with written(path) as temporary:
        temporary.write_text("x" * 5000)

def vcf():
    rng = np.random.default_rng(1)
    count = 3000
    pos = np.sort(rng.choice(10**6, count, replace=False)) + 1
    sites = SiteTable(("1",), (0,), np.zeros(count, np.int32), pos, ["A"] * count, ["C"] * count, ["."] * count)
    short()
    write_phased(path, sites, ["a", "b"], rng.integers(0, 2, (count, 4), dtype=np.uint8))

def export():
    import torch
    from embrag_ds.config import EmbragConfig
    from embrag_ds.export import ExportedModel, write_export
    short()
    write_export(path, ExportedModel.of(EmbragConfig(), {"weight": torch.zeros(3000)}, None))

run_command({"killed": killed, "text": text, "vcf": vcf, "export": export}[sys.argv[1]])
"""


def script(root: Path, what: str, path: Path) -> list[str]:
    return [sys.executable, "-c", SCRIPT, what, str(path)]


def test_a_terminated_process_leaves_what_was_there(root: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "out", "old")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(script(root, "killed", tmp_path / "out"), stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert len(names(tmp_path)) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert names(tmp_path) == {"out"} and (tmp_path / "out").read_text() == "old"


@pytest.mark.parametrize(("what", "name"), [("text", "o.txt"), ("vcf", "o.vcf.gz"), ("export", "o.safetensors")])
def test_a_file_that_grows_too_long_is_a_users_error_whoever_writes_it(
    root: Path, tmp_path: Path, what: str, name: str
) -> None:
    write_text(tmp_path / name, "old")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        script(root, what, tmp_path / name), capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {tmp_path / name}: cannot write ") and "free some space in" in error
    assert names(tmp_path) == {name} and (tmp_path / name).read_text() == "old"


def test_two_writers_at_once_leave_one_of_their_files(tmp_path: Path) -> None:
    path, folder = tmp_path / "out", tmp_path / "folder"
    contents = ["a" * 100_000, "b" * 50_000]
    write_text(path, contents[0])
    seen: set[str] = set()
    failures: list[BaseException] = []
    done = threading.Event()

    def write(text: str) -> None:
        try:
            for _ in range(25):
                write_text(path, text)
        except BaseException as fault:
            failures.append(fault)

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    writers = [threading.Thread(target=write, args=(text,)) for text in contents]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == [] and seen <= set(contents) and path.read_text() in contents
    # Interleaved on purpose: each has a temporary file of its own, and the last to end wins.
    with written(path) as one, written(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and names(tmp_path) == {"out"}
    with folder_written(folder) as one, folder_written(folder) as other:
        (one / "one").touch()
        (other / "other").touch()
    assert names(folder) == {"one"} and names(tmp_path) == {"out", "folder"}


def test_links_are_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(real / name)
    for content in ("one", "two"):
        write_text(tmp_path / "file", content)
        with folder_written(tmp_path / "folder") as building:
            (building / content).touch()
        assert (real / "file").read_text() == content and names(real / "folder") == {content}
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert names(real) == {"file", "folder"} and names(tmp_path) == {"real", "file", "folder"}


def test_a_pipe_is_written_directly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write_text(tmp_path / "pipe", "through")
    reader.join(timeout=30)
    assert received == ["through"] and names(tmp_path) == {"pipe"} and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("letter", ["n", "\u00e9", "\U0001d51e"])
def test_a_name_may_be_as_long_as_names_may_be(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * (251 // len(letter.encode())) + ".txt")
    write_text(path, "text")
    assert path.read_text() == "text"
    folder = path.with_suffix(".dir")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *given, **options: None)  # as if killed
        with pytest.raises(KeyboardInterrupt), folder_written(folder):
            raise KeyboardInterrupt
    assert len(names(tmp_path)) == 2
    remove_leftovers(folder)
    assert names(tmp_path) == {path.name}


@pytest.mark.parametrize("interrupted", [None, 1, 2])
def test_a_file_never_has_another_ones_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int | None
) -> None:
    path, index, other = (tmp_path / name for name in ("data", "data.tbi", "data.csi"))
    for each in (path, index, other):
        each.write_text("old")
    replace, count = os.replace, 0

    def counted(*given: Path) -> None:
        nonlocal count
        count += 1
        if count == interrupted:
            raise KeyboardInterrupt
        replace(*given)

    monkeypatch.setattr(files.os, "replace", counted)
    with suppress(KeyboardInterrupt), written_together(path, index, obsolete=[other]) as temporaries:
        for each in temporaries:
            each.write_text("new")
        assert {each.read_text() for each in (path, index, other)} == {"old"}
    found = {each.name: each.read_text() for each in tmp_path.iterdir()}
    assert found == {None: {"data": "new", "data.tbi": "new"}, 1: {"data": "old"}, 2: {"data": "new"}}[interrupted]


def test_a_fault_before_the_end_touches_no_index(tmp_path: Path) -> None:
    path, index = tmp_path / "data", tmp_path / "data.tbi"
    for each in (path, index):
        each.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_together(path, index) as temporaries:
        temporaries[0].write_text("new")
        raise KeyboardInterrupt
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"data": "old", "data.tbi": "old"}


@given(
    attempts=st.lists(
        st.tuples(st.sets(st.sampled_from("abcd")), st.sampled_from([None, *FAULTS]), st.booleans()), max_size=6
    )
)
def test_a_folder_holds_what_was_last_written_without_a_fault(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[set[str], type[BaseException] | None, bool]]
) -> None:
    above = tmp_path_factory.mktemp("written")
    path = above / "folder"
    expected = None
    for content, fault, late in attempts:
        with suppress(*FAULTS), folder_written(path) as building:
            assert names(building) == set() and building.parent == above
            for name in sorted(content)[: None if fault is None or late else 1]:
                (building / name).mkdir()
            if fault is not None:
                raise fault
        if fault is None:
            expected = content
        assert names(above) == (set() if expected is None else {"folder"})
        assert expected is None or names(path) == expected


@pytest.mark.parametrize("fails", ["old", "new", "after"])
def test_a_folder_that_could_not_be_replaced_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if fails != "after" and (self == path) == (fails == "old"):
            monkeypatch.undo()  # putting it back is not interrupted
            raise KeyboardInterrupt
        found = rename(self, target)
        if fails == "after" and target == path:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), folder_written(path) as building:
        (building / "new").touch()
    assert names(tmp_path) == {"folder"} and names(path) == {"new" if fails == "after" else "old"}


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out: it is a file; choose another folder"), folder_written(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match="none does not exist; create it"), folder_written(tmp_path / "none" / "out"):
        pass
    assert names(tmp_path) == {"out"} and (tmp_path / "out").read_text() == "mine"


def test_leftovers_are_those_of_one_folder(tmp_path: Path) -> None:
    kept = {"data", ".tmp-01234567-other-data", ".tmp-0123-data", ".data.lock", ".tmp-01234567-data2"}
    for name in (*kept, ".tmp-01234567-data", ".tmp-89abcdef-data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_leftovers(tmp_path / "data")
    assert names(tmp_path) == kept


ALLOWED = {
    "embrag_ds/files.py": {"open", "replace", "rename", "write_text"},
    "embrag_ds/cli/command.py": {"open"},  # /dev/null
    "embrag_ds/data/cache.py": {"open", "write_text"},  # its lock, and inside a folder_written
    "embrag_ds/data/left_out.py": {"open"},  # inside a written
    "embrag_ds/data/packing/helpers.py": {"rename", "write_bytes"},  # inside a folder_written
    "embrag_ds/data/packing/packer.py": {"open", "write_text"},  # inside a folder_written
    "embrag_ds/data/programs.py": {"open"},  # output of a program, to look at while it runs
    "embrag_ds/data/simulate.py": {"open", "write_text"},  # inside a folder_written
    "embrag_ds/variants/container/bgzf.py": {"open"},  # inside a written
    "embrag_ds/variants/published.py": {"open"},  # scratch: a part of an output, in a folder of the ranks
    "embrag_ds/variants/sites.py": {"open"},  # inside a folder_written
    "embrag_ds/imputation/genome.py": {"open"},  # scratch
    "embrag_ds/imputation/parts.py": {"open"},  # inside a written
    "embrag_ds/imputation/ranks.py": {"open"},  # scratch
    "embrag_ds/engine/saving.py": {"open", "rename"},  # checkpoints, by several ranks
    "embrag_ds/ops/threads.py": {"open"},  # a lock
    "embrag_ds/runs/alive.py": {"open"},  # signs of life, written over in place
    "embrag_ds/runs/checkpoints.py": {"rename"},  # damaged ones out of the way
    "embrag_ds/runs/folder.py": {"open"},  # a lock
    "embrag_ds/runs/record.py": {"open"},  # metrics, a line at a time
    "examples/1000genomes/make_array.py": {"write_bytes"},  # inside a written
    "profiling/bench_impute.py": {"open"},
    "profiling/chr_x.py": {"write_text"},  # scratch
    "profiling/conversions.py": {"open"},  # what ranks say
    "profiling/faults.py": {"open", "rename", "write_bytes"},  # damage, and what ranks say
    "profiling/sass.py": {"write_bytes"},  # a temporary file, for the disassembler
    "profiling/stepper.py": {"write_text"},  # /proc
    "profiling/two_nodes.py": {"open", "write_text"},  # scratch, and what ranks say
}
"""Calls that write or rename files elsewhere than through embrag_ds.files, and why."""


def test_there_is_one_way_to_write_a_result(root: Path) -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(each for room in ("embrag_ds", "profiling", "examples") for each in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            name = function.rpartition(".")[2]
            modes = [each.value for each in node.args if isinstance(each, ast.Constant)]
            writes = function.endswith((".write_text", ".write_bytes", ".rename")) or function in (
                "os.open",
                "os.replace",
            )
            writes |= name == "open" and any(re.fullmatch("[rwaxbt+]*[wax+][rwaxbt+]*", str(mode)) for mode in modes)
            others = name in ("savefig", "save_file") or function.endswith("memory._dump_snapshot")
            writes |= others and "temporary" not in ast.unparse(node)
            if writes:
                found.setdefault(path.relative_to(root).as_posix(), set()).add(name)
    assert found == ALLOWED
