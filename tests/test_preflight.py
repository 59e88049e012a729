"""Faults of a command's files are said before its work, and no output is an input."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from embrag_ds.errors import UserError
from embrag_ds.preflight import require_distinct, require_folder, require_readable, require_space
from tests.folders import unwritable

WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "the same name": lambda folder, path: path,
    "a relative name": lambda folder, path: Path(os.path.relpath(path)),
    "a name with dots": lambda folder, path: path.parent / ".." / path.parent.name / path.name,
    "a symbolic link": lambda folder, path: _linked(folder / "link", path, os.symlink),
    "a hard link": lambda folder, path: _linked(folder / "hard", path, os.link),
    "a link to its folder": lambda folder, path: _linked(folder / "f", path.parent, os.symlink) / path.name,
}


def _linked(link: Path, path: Path, make: Callable[[Path, Path], None]) -> Path:
    make(path, link)
    return link


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("suffix", ["", ".tbi", ".csi"])
def test_an_output_that_is_an_input_is_refused_by_whatever_name(tmp_path: Path, way: str, suffix: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    target = tmp_path / "data" / "t.vcf.gz"
    for each in ("", ".tbi", ".csi"):
        Path(f"{target}{each}").write_text(f"mine{each}")
    out = WAYS[way](tmp_path / "other", Path(f"{target}{suffix}"))
    of = f"the index of --target {target}" if suffix else f"--target {target}"
    complaint = f"{out}: --out is the same file as {of}, which would be lost; choose another name"
    with pytest.raises(UserError) as raised:
        require_distinct({"--json": None, "--out": out}, {"--map": None, "--panel": [], "--target": target})
    assert str(raised.value) == complaint
    with pytest.raises(UserError):
        require_distinct({"--plots": [tmp_path / "new", out]}, {"--imputed": [tmp_path / "else", target]})
    require_distinct({"--out": tmp_path / "data" / "o.vcf.gz"}, {"--target": target})
    assert target.read_text() == "mine"


def test_the_index_of_an_output_counts(tmp_path: Path) -> None:
    (tmp_path / "o.vcf.gz.csi").write_text("a map, strangely")
    with pytest.raises(UserError) as raised:
        require_distinct({"--out": tmp_path / "o.vcf.gz"}, {"--map": tmp_path / "o.vcf.gz.csi"})
    index = tmp_path / "o.vcf.gz.csi"
    assert str(raised.value) == (
        f"{index}: the index of --out {tmp_path / 'o.vcf.gz'} is the same file as --map {index}, which would be lost; "
        "choose another name"
    )


@pytest.mark.parametrize("way", ["the same name", "a relative name", "a name with dots", "a link to its folder"])
def test_two_outputs_may_not_be_one_file_even_before_it_is_there(tmp_path: Path, way: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    path = tmp_path / "data" / "out.json"
    other = WAYS[way](tmp_path / "other", path)
    with pytest.raises(UserError, match=r"--markdown is the same file as --json .*out\.json; choose another name"):
        require_distinct({"--json": path, "--markdown": other}, {})
    (tmp_path / "later").symlink_to(path)
    with pytest.raises(UserError, match="--markdown is the same file as --json"):
        require_distinct({"--json": path, "--markdown": tmp_path / "later"}, {})
    require_distinct(
        {"--json": path, "--markdown": tmp_path / "other" / "out.json"}, {"--truth": tmp_path / "out.json"}
    )
    missing = tmp_path / "no" / "folder"
    with pytest.raises(UserError, match="same file"):
        require_distinct({"--json": missing / "x", "--markdown": missing / "." / "x"}, {})


def test_devices_and_pipes_are_no_files_to_lose(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for special in (Path("/dev/null"), tmp_path / "pipe"):
        require_distinct({"--json": special, "--markdown": special}, {"--target": special})


def test_inputs_that_cannot_be_read_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    require_readable({"--panel": tmp_path / "there", "--target": tmp_path / "pipe", "--map": None})
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "there" / "below", "Not a directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (Path("a\0b"), "embedded null byte"),
    ):
        with pytest.raises(UserError) as raised:
            require_readable({"--panel": tmp_path / "there", "--imputed": [tmp_path / "there", path]})
        shown = str(path).replace("\0", r"\x00")
        assert str(raised.value) == f"{shown}: cannot read it ({reason}); check what --imputed names"

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=r"there: cannot read it \(Permission denied\); check what --panel names"):
        require_readable({"--panel": tmp_path / "there"})


def test_a_folder_for_results_is_tried_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    require_folder(tmp_path / "new" / "below")
    require_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    require_folder(Path("new"))
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link", unwritable(tmp_path) / "below"):
        with pytest.raises(UserError) as raised:
            require_folder(path)
        said = str(raised.value)
        assert said.startswith(f"{path}: cannot write in this folder (") and said.endswith("); choose another")
    assert {path.name for path in tmp_path.iterdir()} - {"unwritable"} == {"file", "link"}


def test_free_space_is_compared_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(9, 9, 2_000_000))
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "out")
    path = tmp_path / "link"
    require_space(path, 2_000_000, 2_000_000)
    assert caplog.messages == []
    require_space(path, 2_000_000, 3_000_000_000)
    assert caplog.messages == [f"{path}: likely to need 3.0 GB, and {tmp_path / 'far'} has 2.0 MB free"]
    with pytest.raises(UserError) as raised:
        require_space(path, 2_100_000, 3_000_000)
    assert str(raised.value) == (
        f"{path}: it needs at least 2.1 MB, and {tmp_path / 'far'} has 2.0 MB free; free some space there, or choose "
        "another folder"
    )
    assert set(asked) == {tmp_path / "far"}
    require_space(Path("/dev/null"), 10**18, 10**18)
