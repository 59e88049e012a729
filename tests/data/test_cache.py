"""The cache folder: entries are intact when they are used, and what the system refuses is said in one line."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import embrag_ds.data.panel as panel_module
from embrag_ds.data import cache
from embrag_ds.data.cache import SEAL, building, default_cache_dir, require_cache, scratch_folder
from embrag_ds.data.packing.reading import PANEL, Reading, packed_folder
from embrag_ds.data.panel import Panel, open_panel
from embrag_ds.errors import UserError
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable
from tests.data.test_panel import site_table
from tests.folders import unwritable


def write_panel(path: Path, seed: int = 1, sites: int = 40) -> np.ndarray:
    """Write a panel of 3 samples, and return its alleles uint8 [S, 6]."""
    alleles = np.random.default_rng(seed).integers(0, 2, size=(sites, 6), dtype=np.uint8)
    write_phased(path, site_table(sites), ["a", "b", "c"], alleles)
    return alleles


def entry_of(folder: Path) -> Path:
    (entry,) = folder.glob("panel-*")
    return entry


def opened(folder: Path) -> Panel:
    return open_panel(folder / "p.vcf.gz", folder / "cache", progress=False)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "alleles cut": ("alleles.bits", cut),
    "alleles longer": ("alleles.bits", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "sites changed": ("sites.npz", changed),
    "sites cut": ("sites.npz", cut),
    "sites empty": ("sites.npz", lambda path: path.write_bytes(b"")),
    "sites gone": ("sites.npz", Path.unlink),
    "description changed": ("meta.json", changed),
    "description gone": ("meta.json", Path.unlink),
    "seal gone": (SEAL, Path.unlink),
    "seal cut": (SEAL, cut),
    "seal of another kind": (SEAL, lambda path: path.write_text("[]")),
    "seal not text": (SEAL, lambda path: path.write_bytes(b"\xff")),
    "one file more": ("more", Path.touch),
    "a folder for a file": ("meta.json", lambda path: (path.unlink(), path.mkdir())[0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    alleles = write_panel(tmp_path / "p.vcf.gz")
    opened(tmp_path)
    entry = entry_of(tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in entry.iterdir()}
    name, spoil = DAMAGES[damage]
    spoil(entry / name)
    panel = opened(tmp_path)
    assert np.array_equal(panel.alleles(0, len(alleles)), alleles.T) and panel.samples == ("a", "b", "c")
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == before
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith(f"{entry}: damaged (") and "\n" not in warning
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {entry.name, f".{entry.name}.lock"}


def test_an_intact_entry_is_used_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_panel(tmp_path / "p.vcf.gz")
    opened(tmp_path)
    made = entry_of(tmp_path / "cache").stat()
    opened(tmp_path)
    assert entry_of(tmp_path / "cache").stat().st_ino == made.st_ino and not caplog.records


def test_an_entry_that_cannot_be_read_again_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_panel(tmp_path / "p.vcf.gz")
    save = SiteTable.save

    def with_a_line_end_in_an_id(table: SiteTable, path: Path) -> None:
        save(replace(table, id=["r\ns", *table.id[1:]]), path)

    with monkeypatch.context() as patch:
        patch.setattr(SiteTable, "save", with_a_line_end_in_an_id)
        with pytest.raises(Exception):  # noqa: B017 - any, because a reader that lets it through is at fault
            opened(tmp_path)
    assert list((tmp_path / "cache").glob("[!.]*")) == list((tmp_path / "cache").glob(".tmp-*")) == []
    opened(tmp_path)


def test_a_panel_replaced_under_its_name_is_noticed_whatever_its_time_stamp(tmp_path: Path) -> None:
    """``cp -p`` and ``rsync -t`` keep the time of the source; the change lies where the digest does not look."""
    path = tmp_path / "panel"
    content = bytearray(np.random.default_rng(1).bytes(3 << 20))
    path.write_bytes(content)
    stamp, before = path.stat(), packed_folder(path, tmp_path, PANEL)
    assert packed_folder(path, tmp_path, PANEL) == before
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_mtime_ns == stamp.st_mtime_ns and path.stat().st_size == stamp.st_size
    assert packed_folder(path, tmp_path, PANEL) != before


def test_a_panel_that_grows_while_it_is_packed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.vcf.gz"
    write_panel(path)
    pack = panel_module.pack

    def disturbed(*given: object) -> None:
        pack(*given)  # type: ignore[arg-type]
        write_panel(path, seed=2)

    with monkeypatch.context() as patch:
        patch.setattr(panel_module, "pack", disturbed)
        with pytest.raises(UserError, match=r"p\.vcf\.gz: it changed while it was read"):
            opened(tmp_path)
    assert list((tmp_path / "cache").glob("panel-*")) == []
    opened(tmp_path)


def scratch(folder: Path) -> None:
    with scratch_folder(folder, "test-"):
        pass


def build(folder: Path) -> None:
    with building(folder / "entry"):
        pass


@pytest.mark.parametrize("ask", [require_cache, scratch, build])
def test_a_cache_that_cannot_be_written_to_is_one_line_with_a_way_out(
    tmp_path: Path, ask: Callable[[Path], None]
) -> None:
    (tmp_path / "file").touch()
    closed = unwritable(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", closed, closed / "below", Path("a\0b")):
        with pytest.raises(UserError) as raised:
            ask(folder)
        said = str(raised.value)
        shown = str(folder).replace("\0", r"\x00")
        assert said.startswith(f"{shown}: cannot write to the cache folder (") and "\n" not in said
        assert said.endswith("; name another folder with --cache-dir, or with XDG_CACHE_HOME")
    ask(tmp_path / "new" / "cache")


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot write to the cache folder \(No locks available\); name another"):
        build(tmp_path)


# In a process of its own, whose files may be no longer than 4 KB.
FULL = """
import resource, sys
from pathlib import Path
from embrag_ds.cli.command import run_command
from embrag_ds.data.panel import open_panel

def pack():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    open_panel(Path(sys.argv[1]), Path(sys.argv[2]), progress=False)

run_command(pack)
"""


def test_a_full_disk_while_packing_is_one_line_and_leaves_no_entry(root: Path, tmp_path: Path) -> None:
    write_panel(tmp_path / "p.vcf.gz", sites=6000)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "p.vcf.gz"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (error,) = done.stderr.splitlines()
    assert "cannot write it (File too large); free some space in" in error and str(tmp_path / "cache") in error
    assert [path.name[-5:] for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache._warn_of_relative.cache_clear()
    monkeypatch.setenv("HOME", "/home/me")
    for named, expected in (
        (None, "/home/me/.cache"),
        ("", "/home/me/.cache"),
        ("some/where", "/home/me/.cache"),
        ("/some/where", "/some/where"),
    ):
        if named is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert [default_cache_dir(), default_cache_dir()] == [Path(expected) / "embrag_ds"] * 2
    assert caplog.messages == ["XDG_CACHE_HOME is ignored: some/where is no absolute path"]

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match=r"no home folder for the cache .*--cache-dir, or with XDG_CACHE_HOME$"):
        default_cache_dir()


def test_a_pipes_entry_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "p.vcf.gz")
    exits: list[Callable[[], None]] = []
    monkeypatch.setattr(panel_module.atexit, "register", lambda *given: exits.append(functools.partial(*given)))

    def pack(path: Path, folder: Path, reading: Reading, progress: bool) -> None:
        name = path.read_text()
        SiteTable(("1",), (0,), np.zeros(1, np.int32), np.ones(1, np.int64), ["A"], ["C"], ["."]).save(
            folder / "sites.npz"
        )
        (folder / "alleles.bits").write_bytes(b"\1")
        meta = {"samples": [name], "skipped": {}, "records": 1, "filled": 0, "alleles_sha256": ""}
        (folder / "meta.json").write_text(json.dumps(meta))

    monkeypatch.setattr(panel_module, "pack", pack)
    for name in ("a", "b"):
        writer = threading.Thread(target=(tmp_path / "p.vcf.gz").write_text, args=(name,), daemon=True)
        writer.start()
        assert opened(tmp_path).samples == (name,)
        writer.join(timeout=30)
    assert len(list((tmp_path / "cache").glob("panel-*"))) == 2
    for end in exits:
        end()
    assert list((tmp_path / "cache").iterdir()) == []
