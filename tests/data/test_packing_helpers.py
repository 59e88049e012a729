"""Helpers of the process that packs: the same folder and the same faults as without them, whatever they do."""

from __future__ import annotations

import errno
import gzip
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds import children
from embrag_ds.data.packing import helpers
from embrag_ds.data.packing.pack import pack
from embrag_ds.data.packing.reading import TARGET, Missing, Reading
from embrag_ds.errors import UserError
from embrag_ds.variants.container import bgzf, seams
from embrag_ds.variants.container.bgzf import BGZF_EOF, _bgzf_blocks
from embrag_ds.variants.container.text import Part, VariantText
from embrag_ds.variants.records import VariantReader
from tests.containers import contained, vcf_text

SAMPLES = tuple(f"s{number}" for number in range(5))
Serve = Callable[[helpers._Request], None]


class Ended:
    """A helper that has ended."""

    def poll(self) -> int:
        return 0

    wait = kill = poll


def in_blocks(text: bytes, size: int) -> bytes:
    """Bgzipped text in blocks of ``size`` bytes of it."""
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    return b"".join(block for part in parts for block in _bgzf_blocks(memoryview(part), 6)) + BGZF_EOF


def written(folder: Path, records: list[str], size: int = 100) -> Path:
    path = folder / "in.vcf.gz"
    path.write_bytes(in_blocks(vcf_text(*records, samples=SAMPLES), size))
    return path


def folder_of(path: Path, out: Path, reading: Reading, serve: Serve | None) -> dict[str, bytes] | str:
    """All files of the packed folder, or the fault: alone, or with a helper whose work ``serve`` does at once."""
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "_LEAST_BYTES", 0 if serve else 1 << 40)
        patch.setattr(helpers, "_PIECE_BYTES", 64)
        patch.setattr(helpers, "_cores", lambda: 2)

        def started(module: str, request: helpers._Request, **options: Any) -> Ended:
            assert serve is not None and module == helpers.__name__
            serve(request._replace(parent=os.getppid()))
            return Ended()

        patch.setattr(children, "started", started)
        try:
            pack(path, out, reading, False)
        except UserError as fault:
            return str(fault)
    assert not (out / "pieces").exists()
    return {each.name: each.read_bytes() for each in out.iterdir()}


def but_first(number: int) -> Serve:
    """A helper that comes late: the process that packs has already taken ``number`` pieces."""

    def serve(request: helpers._Request) -> None:
        for each in range(min(number, len(request.seams))):
            (request.pieces / str(each)).mkdir()
        helpers._help(request)
        for each in range(min(number, len(request.seams))):
            (request.pieces / str(each)).rmdir()

    return serve


genotype = st.sampled_from(["0|0"] * 8 + ["0|1", "1|1", "2|0", "0/1", "./.", ".", "1", "0"])
calls = st.lists(genotype, min_size=len(SAMPLES), max_size=len(SAMPLES))
alts = st.sampled_from(["C", "C,G", ".", "<*>,C", "CT"])
steps = st.sampled_from([0, 0, 1, 1, 1, 5, 30])
contigs = st.lists(st.sampled_from(["1", "2", "unlisted", "9"]), min_size=1, max_size=3, unique=True)


@st.composite
def sorted_records(draw: st.DrawFn) -> list[str]:
    """Records of some contigs, some not in the header: several at a position, duplicates, missing and haploid calls."""
    found = []
    for contig in draw(contigs):
        pos = 1
        for number in range(draw(st.integers(1, 25))):
            pos += draw(steps)
            row = " ".join(draw(calls)).replace("2|0", "1|0")
            found.append(f"{contig} {pos} r{number} A {draw(alts)} . . . GT {row}")
    return found


@settings(max_examples=30, deadline=None)
@given(sorted_records(), st.sampled_from(["keep", "drop", "major", "error"]), st.integers(40, 400), st.integers(0, 9))
def test_the_folder_and_the_fault_are_those_of_one_process(
    tmp_path_factory: pytest.TempPathFactory, records: list[str], rule: Missing, size: int, late: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    path = written(folder, records, size)
    reading = Reading(missing=rule, without_alt=rule == "keep", duplicates="error" if late == 9 else "first")
    alone = folder_of(path, folder / "alone", reading, None)
    assert folder_of(path, folder / "helped", reading, but_first(late)) == alone


MANY = [f"1 {pos} r{pos} A C . . . GT " + " ".join(["0|1", "1|1", "0|0", "0|0", "0|1"]) for pos in range(1, 200)]


LONG = [each.replace(f" r{number} ", f" r{number}{'x' * 700} ") for number, each in enumerate(MANY, start=1)]


def seams_of(path: Path) -> list[int]:
    return VariantText(path).seams(8)


def test_helpers_take_pieces_and_pieces_are_taken_over(tmp_path: Path) -> None:
    path = written(tmp_path, MANY)
    seams = seams_of(path)
    assert len(seams) == 7
    read: list[int] = []
    with VariantReader(path) as vcf:
        for site in vcf.sites(Part(seams=seams, goes_on=lambda number: not read.append(number))):  # type: ignore[func-returns-value]
            assert site.pos == vcf.records + 1
    assert read == list(range(7)) and vcf.records == len(MANY)
    with pytest.MonkeyPatch.context() as patch:
        handled: list[int] = []
        add = helpers.Packer.add
        patch.setattr(helpers.Packer, "add", lambda self, site: (handled.append(self), add(self, site))[1])
        found = folder_of(path, tmp_path / "out", Reading(), helpers._help)
    assert isinstance(found, dict)
    mine = handled.count(handled[-1])  # the process that packs comes last here
    assert len(handled) == len(MANY) and 0 < mine < len(MANY) / 8


@pytest.mark.parametrize("place", [0, 66, 99, 132, 198])
@pytest.mark.parametrize(
    "fault",
    [
        "1 {pos} x A C . . . GT 0|1 1|1 0|0 0|0 0|9",
        "1 {pos} x A C . . . GT 0|1 1|1 0|0 0|0",
        "1 {pos} x A C . . . GT 0|1 1|1 0|0 0|0 ./.",
        "1 1 x A C . . . GT 0|1 1|1 0|0 0|0 0|0",
        "2 1 x A C . . . GT 0|1 1|1 0|0 0|0 0|0",
        "#CHROM",
        "",
    ],
)
def test_a_fault_is_found_wherever_it_is(tmp_path: Path, place: int, fault: str) -> None:
    """Faults inside a piece and between two: the first of the file is told. An empty line is none."""
    records = [*MANY[:place], fault.format(pos=place + 1), *MANY[place + 1 :]]
    path = written(tmp_path, records)
    alone = folder_of(path, tmp_path / "alone", Reading(), None)
    assert isinstance(alone, dict) == (not fault) or place in (0, 198), alone
    assert folder_of(path, tmp_path / "helped", Reading(), helpers._help) == alone


def test_a_contig_that_comes_again_in_another_piece(tmp_path: Path) -> None:
    records = [*MANY, *(f"2{each[1:]}" for each in MANY), *(f"1{each[1:]}" for each in MANY)]
    path = written(tmp_path, records)
    found = folder_of(path, tmp_path / "out", Reading(), helpers._help)
    assert isinstance(found, str) and "contig 1 appears a second time" in found


@pytest.mark.parametrize("lost", [0, 3, 6])
def test_pieces_of_a_helper_that_is_killed_are_read_again(tmp_path: Path, lost: int) -> None:
    path = written(tmp_path, MANY)
    alone = folder_of(path, tmp_path / "alone", Reading(), None)

    def killed(request: helpers._Request) -> None:
        helpers._help(request)
        (request.pieces / str(lost) / "packed.pickle").unlink()

    assert folder_of(path, tmp_path / "helped", Reading(), killed) == alone


def test_a_full_disk_stops_a_helper_and_not_the_process_that_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, MANY)
    alone = folder_of(path, tmp_path / "alone", Reading(), None)
    write, written_bytes = Path.write_bytes, []

    def full(self: Path, content: bytes) -> int:
        written_bytes.append(content)
        if len(written_bytes) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert folder_of(path, tmp_path / "helped", Reading(), helpers._help) == alone
    assert len(written_bytes) == 4


@pytest.mark.parametrize("change", ["cut", "damage"])
def test_a_damaged_file_is_named_as_without_helpers(tmp_path: Path, change: str) -> None:
    """The text is read in several parts, of which one has the damage."""
    path = written(tmp_path, LONG)
    content = path.read_bytes()
    middle = 2 * len(content) // 3
    path.write_bytes(content[:middle] if change == "cut" else content[:middle] + bytes(90) + content[middle + 90 :])
    alone = folder_of(path, tmp_path / "alone", Reading(), None)
    assert isinstance(alone, str) and "damaged" in alone
    assert folder_of(path, tmp_path / "helped", Reading(), helpers._help) == alone


def test_text_without_an_end_of_line_is_not_read_for_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, LONG, 5000)
    assert seams_of(path)
    monkeypatch.setattr(seams, "_READ_BYTES", 100)
    monkeypatch.setattr(seams, "_MOST_TEXT", 900)
    assert seams_of(path) == []


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "no room"), EOFError(), ValueError()])
def test_a_fault_between_the_processes_is_not_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    path = written(tmp_path, MANY)
    alone = folder_of(path, tmp_path / "alone", Reading(), None)

    def raising(self: helpers.Helpers, number: int) -> None:
        raise fault

    monkeypatch.setattr(helpers.Helpers, "_rest", raising)
    assert folder_of(path, tmp_path / "helped", Reading(), helpers._help) == alone


def test_pieces_before_a_lost_one_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they leave the disk: a piece that does not count must not take the room of the file itself."""
    path = written(tmp_path, MANY)
    alone = folder_of(path, tmp_path / "alone", Reading(), None)
    looked: list[str] = []
    left: list[int] = []
    packed, save = helpers.Helpers._packed, helpers.Packer.save

    def counted(self: helpers.Helpers, folder: Path) -> helpers.Packed | None:
        looked.append(folder.name)
        return packed(self, folder)

    def last_lost(request: helpers._Request) -> None:
        helpers._help(request)
        (request.pieces / str(len(request.seams) - 1) / "packed.pickle").unlink()

    def saved(self: helpers.Packer) -> None:
        left.append(len(list((tmp_path / "helped" / "pieces").glob("*/*"))))
        save(self)

    monkeypatch.setattr(helpers.Helpers, "_packed", counted)
    monkeypatch.setattr(helpers.Packer, "save", saved)
    assert folder_of(path, tmp_path / "helped", Reading(), last_lost) == alone
    assert len(looked) == len(set(looked)) > 10 and left == [0]


def test_helpers_end_even_if_they_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, MANY)
    monkeypatch.setattr(children, "_COMMAND", "import time; time.sleep(600)")
    monkeypatch.setattr(helpers, "_LEAST_BYTES", 0)
    monkeypatch.setattr(helpers, "_PIECE_BYTES", 64)
    monkeypatch.setattr(helpers, "_cores", lambda: 3)
    with VariantReader(path) as vcf, helpers.Helpers(vcf, tmp_path, Reading()) as found:
        processes = found._processes
        os.kill(processes[0].pid, signal.SIGSTOP)
    assert [each.returncode for each in processes] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("moved", [lambda seam: seam + 1, lambda seam: seam | 0xFFFF], ids=["in a line", "behind"])
def test_a_seam_that_the_file_no_longer_has_is_passed_over(tmp_path: Path, moved: Callable[[int], int]) -> None:
    path = written(tmp_path, MANY)
    seams = seams_of(path)
    asked: list[int] = []
    with VariantReader(path) as vcf:
        part = Part(seams=[seams[0], moved(seams[1]), seams[2]], goes_on=lambda number: not asked.append(number))  # type: ignore[func-returns-value]
        assert [site.pos for site in vcf.sites(part)] == list(range(1, 200))
    assert asked == [0, 2]
    with VariantReader(path) as vcf:
        request = helpers._Request(path, TARGET, [seams[0], moved(seams[1])], tmp_path, os.getppid())
        assert helpers._packed_piece(vcf, tmp_path, request, 0) is None


@pytest.mark.parametrize("position", [5, 198])
def test_records_of_one_position_stay_together(tmp_path: Path, position: int) -> None:
    """Many records at a position are in one piece, or in the last."""
    records = [f"1 {min(number, position)} r{number} A C . . . GT 0|1 1|1 0|0 0|0 0|1" for number in range(1, 200)]
    path = written(tmp_path, records)
    with VariantReader(path) as vcf:
        for start in seams_of(path):
            assert next(vcf.sites(Part(start))).pos < position or int(next(vcf.sites(Part(start))).id[1:]) == position
    alone = folder_of(path, tmp_path / "alone", Reading(), None)
    assert folder_of(path, tmp_path / "helped", Reading(), helpers._help) == alone


@pytest.mark.parametrize("kind", ["CRLF", "files put together", "whole blocks", "gzip between", "a mark"])
def test_text_of_every_kind_is_divided(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of lines of two bytes; empty blocks, as `cat` leaves them; and blocks as long as they can be."""
    path = tmp_path / "in.vcf.gz"
    text = vcf_text(*LONG, samples=SAMPLES, end=b"\r\n" if kind == "CRLF" else b"\n")
    if kind == "files put together":
        parts = [text[start : start + 500] for start in range(0, len(text), 500)]
        path.write_bytes(b"".join(in_blocks(part, 120) for part in parts))
    elif kind == "gzip between":
        third = len(text) // 3
        parts = [text[:third], text[third : 2 * third], text[2 * third :]]
        path.write_bytes(in_blocks(parts[0], 100) + gzip.compress(parts[1]) + in_blocks(parts[2], 100))
    elif kind == "a mark":
        path.write_bytes(in_blocks(b"\xef\xbb\xbf" + text, 100))
    elif kind == "whole blocks":
        monkeypatch.setattr(bgzf, "BGZF_TEXT", 1 << 16)
        path.write_bytes(in_blocks(text, 1 << 16))
    else:
        path.write_bytes(in_blocks(text, 100))
    assert seams_of(path)
    alone = folder_of(path, tmp_path / "alone", Reading(), None)
    assert isinstance(alone, dict), alone
    assert folder_of(path, tmp_path / "helped", Reading(), helpers._help) == alone


@pytest.mark.parametrize("container", ["plain", "gzip", "bcf"])
def test_only_bgzipped_text_is_divided(tmp_path: Path, container: str) -> None:
    with contained(vcf_text(*MANY, samples=SAMPLES), container, tmp_path) as path, VariantReader(path) as vcf:
        assert vcf.seams(8) == []


def test_processes_help_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real helpers, whose pieces are waited for: all but the first are theirs."""
    path = written(tmp_path, MANY, 1000)
    alone = folder_of(path, tmp_path / "alone", Reading(), None)
    monkeypatch.setattr(helpers, "_LEAST_BYTES", 0)
    monkeypatch.setattr(helpers, "_PIECE_BYTES", 64)
    monkeypatch.setattr(helpers, "_cores", lambda: 3)
    processes: list[subprocess.Popen[bytes]] = []
    leave, taken = helpers.Helpers.leave, []

    def late(self: helpers.Helpers, number: int) -> bool:
        processes.extend(self._processes)
        while not (self._pieces / str(number)).exists():
            assert any(each.poll() is None for each in self._processes)
            time.sleep(0.01)
        goes_on = leave(self, number)
        taken.append(len(self._taken))
        return goes_on

    monkeypatch.setattr(helpers.Helpers, "leave", late)
    out = tmp_path / "out"
    out.mkdir()
    pack(path, out, Reading(), False)
    assert {each.name: each.read_bytes() for each in out.iterdir()} == alone
    assert len(taken) == 1 and taken[0] > 1
    assert len(processes) == 2 and all(each.returncode is not None for each in processes)


def test_a_helper_ends_with_the_process_that_packs(tmp_path: Path) -> None:
    path = written(tmp_path, MANY)
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    request = helpers._Request(path, Reading(), seams_of(path), pieces, parent=1 << 30)
    assert children.started(helpers.__name__, request).wait(60) == 0
    assert list(pieces.iterdir()) == []
    request = request._replace(parent=os.getpid())
    assert children.started(helpers.__name__, request).wait(60) == 0
    assert {each.name for each in pieces.iterdir()} == {str(number) for number in range(len(request.seams))}


def test_an_orphan_ends_within_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, MANY)
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    asked: list[int] = []
    monkeypatch.setattr(os, "getppid", lambda: asked.append(1) or (7 if len(asked) < 10 else 1))  # type: ignore[func-returns-value]
    helpers._help(helpers._Request(path, Reading(), seams_of(path)[:1], pieces, parent=7))
    assert len(asked) < 12 and not (pieces / "0" / "packed.pickle").exists()


def test_as_many_processes_as_cores_and_threads_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers.os, "sched_getaffinity", lambda process: set(range(6)))
    for told, cores in (("", 6), ("1", 1), ("4,2", 4), ("90", 6), ("0", 6), ("x", 6)):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert helpers._cores() == cores
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert helpers._cores() == 6


def test_ploidy_is_carried_from_piece_to_piece(tmp_path: Path) -> None:
    """A male's haploid stretch ends in the last piece; missing calls at the start of a piece are as those before."""
    rows = [("1", "0|1")] * 80 + [(".", ".|.")] * 20 + [("1", "0|0")] * 60 + [("1|1", "0|0")] * 30
    records = [f"1 {pos} . A C . . . GT {a} {b} 0|0 0|0 0|0" for pos, (a, b) in enumerate(rows, start=1)]
    path = written(tmp_path, records)
    alone = folder_of(path, tmp_path / "alone", TARGET, None)
    helped = folder_of(path, tmp_path / "helped", TARGET, helpers._help)
    assert isinstance(alone, dict) and isinstance(helped, dict)
    with np.load(tmp_path / "helped" / "ploidy.npz") as found:
        assert found["start"].tolist() == [0, 160]
    assert helped == alone
