"""A panel is packed by a process of its own while the other imports torch."""

from __future__ import annotations

import gzip
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from embrag_ds import children
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.packing.reading import Reading, packed_folder
from embrag_ds.data.panel import open_panel
from embrag_ds.data.simulate import DefaultData
from embrag_ds.errors import UserError
from embrag_ds.imputation import ahead


@pytest.fixture
def panel(simulated: DefaultData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A panel that is not packed yet, and is large enough."""
    monkeypatch.setattr(ahead, "_LEAST_BYTES", 0)
    return Path(shutil.copy(simulated.panel, tmp_path / "panel.vcf.gz"))


def packed_meanwhile(files: PanelFiles, cache: Path) -> bool:
    """Whether the panel is packed within a context, which opens no panel."""
    assert files.panel is not None
    folder = packed_folder(files.panel, cache, files.reading)
    with ahead.packing_ahead(files, cache):
        pass
    return folder is not None and folder.exists()


@pytest.mark.parametrize("reading", [Reading(), Reading(duplicates="error", missing="major")])
def test_a_panel_is_packed_as_by_whoever_opens_it(panel: Path, tmp_path: Path, reading: Reading) -> None:
    files = PanelFiles(panel, reading=reading)
    assert packed_meanwhile(files, tmp_path / "cache")
    there = packed_folder(panel, tmp_path / "cache", reading)
    assert there is not None
    found, alone = (open_panel(panel, tmp_path / each, False, reading) for each in ("cache", "other"))
    assert Path(str(found.packed.filename)) == there / "alleles.bits"
    np.testing.assert_array_equal(found.packed, alone.packed)
    assert found.samples == alone.samples and found.recorded_sha256 == alone.recorded_sha256


def test_nothing_begins_where_it_would_not_save_time(
    panel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(children, "started", refused)
    cache = tmp_path / "cache"
    with pytest.raises(AssertionError, match="was started"):
        packed_meanwhile(PanelFiles(panel), cache)
    with monkeypatch.context() as rank:
        rank.setenv("LOCAL_RANK", "1")
        assert not packed_meanwhile(PanelFiles(panel), cache)
    for bound, size in (("_LEAST_BYTES", panel.stat().st_size + 1), ("_MOST_BYTES", panel.stat().st_size - 1)):
        with monkeypatch.context() as other:
            other.setattr(ahead, bound, size)
            assert not packed_meanwhile(PanelFiles(panel), cache)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "absent.vcf.gz", None):
        with ahead.packing_ahead(PanelFiles(path), cache):
            pass
    open_panel(panel, cache, False)
    assert packed_meanwhile(PanelFiles(panel), cache)


def test_a_faulty_panel_is_left_to_whoever_opens_it(
    panel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = gzip.decompress(panel.read_bytes())
    panel.write_bytes(gzip.compress(text[: len(text) // 2].rsplit(b"\t", 1)[0] + b"\n"))
    cache = tmp_path / "cache"
    assert not packed_meanwhile(PanelFiles(panel), cache)
    assert capfd.readouterr() == ("", "")
    assert not [each for each in cache.iterdir() if each.is_dir()]
    with pytest.raises(UserError, match=r"panel\.vcf\.gz"):
        open_panel(panel, cache, False)


def test_an_error_ends_the_process(panel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_COMMAND", "import time; time.sleep(600)")
    began = time.monotonic()
    with pytest.raises(UserError), ahead.packing_ahead(PanelFiles(panel), tmp_path / "cache"):
        raise UserError("a fault of another file")
    assert time.monotonic() - began < 60
