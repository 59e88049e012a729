"""The panel's cache, and reference sets with their allele frequencies."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embrag_ds.data.panel as panel_module
from embrag_ds.data.packing import pack as packing
from embrag_ds.data.panel import Panel, PanelSubset, Populations, open_panel, read_populations
from embrag_ds.errors import UserError
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.records import VariantReader
from embrag_ds.variants.sites import SiteTable


def site_table(count: int) -> SiteTable:
    return SiteTable(
        contigs=("1",),
        contig_lengths=(10_000,),
        contig=np.zeros(count, dtype=np.int32),
        pos=np.arange(1, count + 1, dtype=np.int64) * 10,
        ref=["A"] * count,
        alt=["G"] * count,
        id=["."] * count,
    )


def write_panel(path: Path, alleles: np.ndarray) -> Path:
    """Write ``alleles`` [S, 2N] as a phased, indexed VCF of samples p0, p1, ..."""
    samples = [f"p{i}" for i in range(alleles.shape[1] // 2)]
    write_phased(path, site_table(len(alleles)), samples, alleles)
    return path


def memory_panel(alleles: np.ndarray) -> Panel:
    samples = tuple(f"p{i}" for i in range(alleles.shape[1] // 2))
    packed = np.packbits(alleles, axis=1, bitorder="little")
    return Panel(Path("panel.vcf.gz"), site_table(len(alleles)), samples, packed, {})


def random_alleles(seed: int, sites: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, size=(sites, 2 * samples), dtype=np.uint8)


def entries(cache: Path) -> list[Path]:
    """Finished cache entries."""
    return sorted(cache.glob("panel-*"))


def unfinished(cache: Path) -> list[Path]:
    return sorted(cache.glob(".tmp-*"))


@pytest.fixture
def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the VCF was read again")

    monkeypatch.setattr(panel_module, "pack", refuse)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), sites=st.integers(1, 12), samples=st.integers(1, 9), data=st.data())
def test_the_cached_panel_holds_exactly_the_alleles_of_the_vcf(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sites: int, samples: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("panel")
    alleles = random_alleles(seed, sites, samples)
    panel = open_panel(write_panel(folder / "p.vcf.gz", alleles), folder / "cache", progress=False)
    assert panel.samples == tuple(f"p{i}" for i in range(samples))
    assert list(panel.sites.identities()) == list(site_table(sites).identities())
    assert np.array_equal(panel.alleles(0, sites), alleles.T)
    start = data.draw(st.integers(0, sites))
    stop = data.draw(st.integers(start, sites))
    chosen = np.array(data.draw(st.lists(st.integers(0, 2 * samples - 1), max_size=5)), dtype=np.int64)
    part = panel.alleles(start, stop, chosen)
    assert part.dtype == np.uint8
    assert np.array_equal(part, alleles[start:stop].T[chosen])


def test_a_second_open_does_not_read_the_vcf(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = write_panel(tmp_path / "p.vcf.gz", random_alleles(1, 5, 3))
    first = open_panel(path, tmp_path / "cache", progress=False)
    request.getfixturevalue("no_packing")
    second = open_panel(path, tmp_path / "cache", progress=False)
    assert np.array_equal(first.packed, second.packed)
    assert (first.samples, first.skipped) == (second.samples, second.skipped)


def test_a_changed_input_gets_its_own_entry_even_with_the_old_time_stamp(tmp_path: Path) -> None:
    alleles = random_alleles(1, 5, 3)
    path = write_panel(tmp_path / "p.vcf.gz", alleles)
    stamp = path.stat()
    open_panel(path, tmp_path / "cache", progress=False)
    alleles[2, 3] ^= 1
    write_panel(path, alleles)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    changed = open_panel(path, tmp_path / "cache", progress=False)
    assert np.array_equal(changed.alleles(0, 5), alleles.T)
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_build_leaves_nothing_and_the_next_open_succeeds(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    alleles = random_alleles(1, 5, 3)
    path = write_panel(tmp_path / "p.vcf.gz", alleles)

    class Interrupted(VariantReader):
        def sites(self, part):  # type: ignore[no-untyped-def]
            sites = super().sites(part)
            yield next(sites)
            raise interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "VariantReader", Interrupted)
        with pytest.raises(interruption):
            open_panel(path, tmp_path / "cache", progress=False)
    assert entries(tmp_path / "cache") == unfinished(tmp_path / "cache") == []
    assert np.array_equal(open_panel(path, tmp_path / "cache", progress=False).alleles(0, 5), alleles.T)


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    alleles = random_alleles(1, 5, 3)
    path = write_panel(tmp_path / "p.vcf.gz", alleles)
    cache = tmp_path / "cache"
    open_panel(path, cache, progress=False)
    (entry,) = entries(cache)
    leftover = cache / f".tmp-01234567-{entry.name}"
    entry.rename(leftover)
    (leftover / "alleles.bits").write_bytes(b"\xff")
    (leftover / "sites.npz").write_text("half a li", encoding="utf-8")
    assert np.array_equal(open_panel(path, cache, progress=False).alleles(0, 5), alleles.T)
    assert unfinished(cache) == []


def test_processes_that_open_a_panel_at_once_build_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_panel(tmp_path / "p.vcf.gz", random_alleles(1, 5, 3))
    built = []
    pack = panel_module.pack
    monkeypatch.setattr(panel_module, "pack", lambda *given: (built.append(1), pack(*given)))
    opened = []
    threads = [
        threading.Thread(target=lambda: opened.append(open_panel(path, tmp_path / "cache", progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(built)) == (4, 1)


def test_an_empty_panel_is_a_user_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_panel(tmp_path / "p.vcf.gz", random_alleles(1, 0, 3))
    with pytest.raises(UserError, match="it has no records; check the file"):
        open_panel(path, tmp_path / "cache", progress=False)
    assert entries(tmp_path / "cache") == unfinished(tmp_path / "cache") == []


def test_an_absent_panel_is_a_user_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.vcf\.gz"):
        open_panel(tmp_path / "absent.vcf.gz", tmp_path / "cache", progress=False)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sites=st.integers(1, 20),
    of=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    block=st.integers(1, 8),
    data=st.data(),
)
def test_frequencies_equal_a_plain_loop_over_the_sets_samples(
    seed: int, sites: int, of: list[int], block: int, data: st.DataObject
) -> None:
    alleles = random_alleles(seed, sites, len(of))
    samples = data.draw(st.lists(st.integers(0, len(of) - 1), min_size=1, unique=True))
    populations = Populations(("x", "y", "z"), np.array(of))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panel_module, "_SITES_PER_READ", block)
        reference = PanelSubset(memory_panel(alleles), populations, np.array(samples))
        overall, counts, sizes = reference.allele_frequency, reference.population_counts, reference.population_sizes
    assert overall.dtype == counts.dtype == sizes.dtype == np.float32
    for site in range(sites):
        copies = [int(alleles[site, 2 * sample + i]) for sample in samples for i in range(2)]
        assert overall[site] == pytest.approx(sum(copies) / len(copies), abs=1e-6)
        assert reference.minor_allele_count[site] == min(sum(copies), len(copies) - sum(copies))
        for code in range(3):
            members = [sample for sample in samples if of[sample] == code]
            copies = [int(alleles[site, 2 * sample + i]) for sample in members for i in range(2)]
            assert (counts[code, site], sizes[code]) == (sum(copies), len(copies))


def test_frequencies_ignore_samples_outside_the_set() -> None:
    alleles = random_alleles(1, 30, 6)
    populations = Populations(("x", "y"), np.array([0, 1, 0, 1, 0, 1]))
    samples = np.array([4, 0, 1])
    before = PanelSubset(memory_panel(alleles), populations, samples)
    changed = alleles.copy()
    changed[:, [4, 5, 6, 7, 10, 11]] ^= 1
    after = PanelSubset(memory_panel(changed), populations, samples)
    assert np.array_equal(before.allele_frequency, after.allele_frequency)
    assert np.array_equal(before.population_counts, after.population_counts)
    assert np.array_equal(before.alleles(0, 30), after.alleles(0, 30))


@pytest.mark.parametrize("samples", [[3, 1], [0, 1, 2, 3]])
def test_rows_of_a_reference_set_belong_to_the_sample_it_names(samples: list[int]) -> None:
    alleles = random_alleles(2, 9, 4)
    reference = PanelSubset(memory_panel(alleles), Populations(("x", "y"), np.array([0, 1, 1, 0])), np.array(samples))
    rows = reference.alleles(2, 7)
    assert len(reference) == len(rows) == 2 * len(samples)
    for row, sample in enumerate(reference.sample_of.tolist()):
        assert np.array_equal(rows[row], alleles[2:7, 2 * sample + row % 2])
        assert reference.population_of[row] == [0, 1, 1, 0][sample]
    assert sorted(set(reference.sample_of.tolist())) == sorted(samples)


def test_without_a_sample_table_all_are_one_population() -> None:
    populations = read_populations(None, ("a", "b"))
    assert (populations.names, populations.of.tolist()) == (("all",), [0, 0])


def test_a_sample_table_may_have_a_header_more_columns_other_samples_and_any_order(tmp_path: Path) -> None:
    path = tmp_path / "samples.tsv"
    path.write_text("sample\tpop\tsex\nb\tYRI\tf\n\nz\tOther\tm\na\tCEU\tm\n", encoding="utf-8")
    populations = read_populations(path, ("a", "b"))
    assert (populations.names, populations.of.tolist()) == (("CEU", "YRI"), [0, 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tCEU\nb\n", "line 2"),
        (b"a\tCEU\n", "1 samples have no line, the first is b"),
        (b"a\tCEU\nb\t\t\n", "line 2: expected sample and population"),
        (b"a\tCEU\nb\t \tf\n", "line 2: expected sample and population"),
        (b"a\tCEU\n\tCEU\n", "line 2: expected sample and population"),
        (b"a\tCEU\nb\tCEU \nb\tYRI\n", "line 3: b has another population further up"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_errors_of_a_sample_table_name_file_and_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "samples.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as fault:
        read_populations(path, ("a", "b"))
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("between", [b"\t", b" \t ", b"  "])
def test_a_sample_table_may_come_from_another_system(tmp_path: Path, mark: bytes, end: bytes, between: bytes) -> None:
    rows = [(b"#IID", b"SuperPop"), (b"a", b"EUR "), (b"caf\xe9", b"EUR"), (b" #1", b"S\xc3\xa9n\xc3\xa9gal")]
    lines = [
        mark + b"# made by hand, ",
        b"##x",
        *(between.join(row) for row in rows),
        b" \t",
        b"a" + between + b"EUR\t",
    ]
    (tmp_path / "samples.tsv").write_bytes(end.join(lines))
    populations = read_populations(tmp_path / "samples.tsv", ("#1", "caf\udce9", "a"))
    assert (populations.names, populations.of.tolist()) == (("EUR", "S\u00e9n\u00e9gal"), [1, 0, 0])


def test_an_absent_sample_table_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_populations(tmp_path / "absent.tsv", ("a",))


@given(seed=st.integers(0, 2**32), sites=st.integers(0, 12), samples=st.integers(1, 9))
def test_copies_and_alleles_at_any_sites(seed: int, sites: int, samples: int) -> None:
    alleles = random_alleles(seed, sites, samples)
    panel = memory_panel(alleles)
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panel_module, "_SITES_PER_READ", 5)
        np.testing.assert_array_equal(panel.alt_count, alleles.sum(axis=1))
    chosen = rng.integers(sites, size=5) if sites else np.arange(0)
    haplotypes = rng.integers(2 * samples, size=4)
    np.testing.assert_array_equal(panel.alleles_at(chosen), alleles[chosen])
    np.testing.assert_array_equal(panel.alleles_at(chosen, haplotypes), alleles[chosen][:, haplotypes])
    assert panel.alleles_at(chosen, haplotypes).dtype == np.uint8
