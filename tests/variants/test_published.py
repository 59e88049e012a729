"""Compressed files and their indices, as bcftools and tabix see them, and what threads of the writer meet."""

from __future__ import annotations

import errno
import gzip
import os
import threading
import time
from itertools import pairwise

import numpy as np
import pysam
import pysam.bcftools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants.container.bgzf import BGZF_EOF, BGZF_TEXT, BgzfWriter, bgzf_written
from embrag_ds.variants.output import ImputedVcfWriter
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable
from tests.variants.imputed_files import random_imputed, varied_sites


@pytest.mark.parametrize("size", [0, 1, BGZF_TEXT - 1, BGZF_TEXT, BGZF_TEXT + 1, 100 * BGZF_TEXT, 7_654_321])
def test_a_file_has_the_same_bytes_for_any_number_of_threads(tmp_path, monkeypatch, size):
    rng = np.random.default_rng(size)
    text = rng.integers(65, 70, size, dtype=np.uint8).tobytes()
    cuts = [0, *np.sort(rng.integers(0, size + 1, 9)).tolist(), size]
    for threads in (1, 2, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, threads=threads: set(range(threads)))
        with bgzf_written(tmp_path / f"{threads}.gz", 3) as out:
            for start, stop in pairwise(cuts):
                out.write(text[start:stop])
        assert out.text_bytes == size
    whole = (tmp_path / "1.gz").read_bytes()
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {whole}
    assert gzip.decompress(whole) == text and whole.endswith(BGZF_EOF)
    with pysam.BGZFile(str(tmp_path / "1.gz"), "rb", None) as read:
        for place in [0, size // 2, size, *cuts]:
            read.seek(int(out.virtual(np.array([place]))[0]))
            assert read.read(9) == text[place : place + 9]


def random_sites(rng: np.random.Generator, count: int, contigs: int) -> SiteTable:
    """Sites near the edges of windows and bins, of which some reach far beyond them."""
    edges = 1 << rng.integers(14, 29, count)
    pos = np.clip(edges * rng.integers(1, 4, count) + rng.integers(-2, 3, count), 1, 2**29 - 1000)
    contig = np.sort(rng.integers(contigs, size=count)).astype(np.int32)
    order = np.lexsort([pos, contig])
    pos = pos[order]
    ref = ["A" * length for length in rng.choice([1, 1, 1, 3, 500], count).tolist()]
    ends = np.minimum(pos + rng.integers(1, 10**6, count), 2**29 - 1).tolist()
    extent = {row: f"END={ends[row]}" for row in range(0, count, 7)} | {row: "SVLEN=-50" for row in range(3, count, 11)}
    alt = ["<DEL>" if row in extent else "C" for row in range(count)]
    names = tuple(f"c{number}" for number in range(contigs))
    return SiteTable(names, (0,) * contigs, contig, pos, ref, alt, list(map(str, range(count))), extent)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**20), st.sampled_from([1, 2, 30, 400]), st.integers(1, 4))
def test_the_index_finds_what_that_of_htslib_finds(tmp_path, seed, count, contigs):
    rng = np.random.default_rng(seed)
    sites = random_sites(rng, count, contigs)
    path, other = tmp_path / "ours.vcf.gz", tmp_path / "theirs.vcf.gz"
    samples = [f"s{number}" for number in range(100)]
    write_phased(path, sites, samples, rng.integers(2, size=(count, 200), dtype=np.uint8))
    other.write_bytes(path.read_bytes())
    pysam.tabix_index(str(other), preset="vcf", force=True)
    with pysam.TabixFile(str(path)) as ours, pysam.TabixFile(str(other)) as theirs:
        assert ours.contigs == theirs.contigs
        for contig in ours.contigs:
            assert list(ours.fetch(contig)) == list(theirs.fetch(contig))
            for row in rng.integers(count, size=20).tolist():
                start = max(0, int(sites.pos[row]) + int(rng.integers(-3, 3)))
                stop = start + int(rng.choice([1, 2, 1 << 14, 1 << 20]))
                assert list(ours.fetch(contig, start, stop)) == list(theirs.fetch(contig, start, stop))
    assert pysam.bcftools.index("-s", str(path)) == pysam.bcftools.index("-s", str(other))
    assert pysam.bcftools.index("-n", str(path)).strip() == str(count)


@pytest.mark.parametrize("where", ["header", "blocks", "end"])
def test_a_full_disk_ends_the_writer_and_leaves_nothing(tmp_path, monkeypatch, where):
    """Whether the caller writes, or a thread of the writer while blocks are still to come, or the file ends."""
    put = BgzfWriter._put

    def full(self: BgzfWriter, content: bytes) -> None:
        of_thread = threading.current_thread() is not threading.main_thread()
        if where == "header" or (where == "blocks" and of_thread) or content == BGZF_EOF:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, content)

    monkeypatch.setattr(BgzfWriter, "_put", full)
    monkeypatch.setattr("embrag_ds.variants.container.bgzf._JOB_BYTES", 100)
    imputed = random_imputed()
    begun: list[int] = []
    with (
        pytest.raises(UserError, match=r"out.vcf.gz: cannot write it \(No space left on device\); free some space in"),
        ImputedVcfWriter(tmp_path / "out.vcf.gz", varied_sites(), imputed.samples, "test") as out,
    ):
        for row in range(10):
            one = slice(row, row + 1)
            begun.append(row)
            out.write(row, imputed.dosage[:, one], imputed.typed[one], imputed.alleles[:, one])
            time.sleep(0.01)
    assert {"header": begun == [], "blocks": 1 < len(begun) < 10, "end": len(begun) == 10}[where]
    assert list(tmp_path.iterdir()) == []


def test_the_writer_waits_where_the_disk_is_slow(tmp_path, monkeypatch):
    """Blocks that are not written yet are few, whatever the file's size."""
    monkeypatch.setattr("embrag_ds.variants.output._MOST_WAITING", 2)
    monkeypatch.setattr("embrag_ds.variants.output._BLOCK_VALUES", 1)
    imputed = random_imputed()
    path = tmp_path / "out.vcf.gz"
    with ImputedVcfWriter(path, varied_sites(), imputed.samples, "test") as out:
        write_block = out._write_block

        def slowly(block: object) -> None:
            time.sleep(0.01)
            write_block(block)

        monkeypatch.setattr(out, "_write_block", slowly)
        waiting = []
        add = out._begin_writing
        monkeypatch.setattr(out, "_begin_writing", lambda block: (add(block), waiting.append(len(out._writing))))
        out.write(0, imputed.dosage, imputed.typed, imputed.alleles)
    assert max(waiting) == 3
    assert len(pysam.bcftools.view("-H", str(path)).splitlines()) == 10
