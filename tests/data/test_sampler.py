"""Training sampler: an epoch visits all groups, and a micro-batch is a function of its number."""

from __future__ import annotations

import gzip
import pickle
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data import sampler as sampler_module
from embrag_ds.data.masking import VALIDATION_MASKS, MaskingConfig, training_masks, validation_mask
from embrag_ds.data.panel import Panel, PanelSubset, Populations, map_packed
from embrag_ds.data.sampler import (
    AugmentationConfig,
    QueryBatch,
    TrainingSampler,
    exclusion_table,
    read_manifest,
    split_samples,
)
from embrag_ds.data.windows import DataConfig, WindowedPanel, make_windows
from embrag_ds.errors import UserError
from embrag_ds.variants.sites import SiteTable


def make_panel(samples: int, lengths: tuple[int, ...], seed: int = 1) -> tuple[Panel, np.ndarray]:
    """A panel in memory, ``lengths[i]`` sites on contig ``i + 1``, and its alleles [S, 2N]."""
    size = sum(lengths)
    alleles = np.random.default_rng(seed).integers(0, 2, size=(size, 2 * samples), dtype=np.uint8)
    sites = SiteTable(
        contigs=tuple(str(i + 1) for i in range(len(lengths))),
        contig_lengths=(0,) * len(lengths),
        contig=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        pos=np.concatenate([np.arange(1, n + 1) * 100 for n in lengths]),
        ref=["A"] * size,
        alt=["C"] * size,
        id=["."] * size,
    )
    names = tuple(f"p{i}" for i in range(samples))
    packed = np.packbits(alleles, axis=1, bitorder="little")
    return Panel(Path("panel.vcf.gz"), sites, names, packed, {}), alleles


def make_data(samples: list[int], in_panel: int, lengths: tuple[int, ...] = (30, 20)) -> WindowedPanel:
    panel, _ = make_panel(in_panel, lengths)
    reference = PanelSubset(panel, Populations(("all",), np.zeros(in_panel, dtype=np.int64)), np.array(samples))
    return WindowedPanel(reference, make_windows(panel.sites, 12, 3, 2), panel.sites.pos * 1e-6)


def make_sampler(data: WindowedPanel, samples_per_batch: int, **more: int) -> TrainingSampler:
    flat = MaskingConfig(random_rate=(0.5, 0.5))
    return TrainingSampler(data, flat, seed=5, samples_per_batch=samples_per_batch, **more)


def epoch_of(data: WindowedPanel, samples_per_batch: int, ranks: int, epoch: int) -> list[QueryBatch]:
    """Every micro-batch of an epoch, over all ranks."""
    samplers = [make_sampler(data, samples_per_batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    size = samplers[0].micro_batches_per_epoch
    places = range(epoch * size, (epoch + 1) * size)
    return [samplers[place % ranks].queries(place // ranks) for place in places]


def key_of(queries: QueryBatch) -> tuple[int, tuple[int, ...]]:
    return queries.window, tuple(queries.samples.tolist())


def same(one: QueryBatch, two: QueryBatch) -> bool:
    return key_of(one) == key_of(two) and all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in ("alleles", "masked")
    )


@settings(deadline=None, max_examples=40)
@given(
    samples=st.lists(st.integers(0, 14), min_size=2, unique=True),
    per_batch=st.integers(1, 6),
    ranks=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_an_epoch_visits_every_group_once_and_every_sample_at_most_once_per_window(
    samples: list[int], per_batch: int, ranks: int, epoch: int
) -> None:
    data = make_data(samples, 15)
    visited = epoch_of(data, per_batch, ranks, epoch)
    seen = Counter((queries.window, sample) for queries in visited for sample in queries.samples.tolist())
    groups = Counter(queries.window for queries in visited)
    size = min(per_batch, len(samples))
    assert set(seen.values()) == {1}
    assert {sample for _, sample in seen} <= set(samples)
    assert groups == {window: len(samples) // size for window in range(len(data))}
    assert all(len(queries.samples) == size for queries in visited)
    assert len(samples) - sum(window == 0 for window, _ in seen) < size


@pytest.mark.parametrize("epoch", [0, 1])
def test_two_ranks_partition_the_epoch_of_one(epoch: int) -> None:
    data = make_data(list(range(9)), 10)
    alone, together = epoch_of(data, 2, 1, epoch), epoch_of(data, 2, 2, epoch)
    assert all(same(one, two) for one, two in zip(alone, together, strict=True))
    shares = [{key_of(queries) for queries in together[rank::2]} for rank in (0, 1)]
    assert not shares[0] & shares[1]
    assert len(shares[0] | shares[1]) == len(together)


def test_a_micro_batch_is_a_function_of_its_number() -> None:
    data = make_data(list(range(9)), 10)
    numbers = [40, 3, 11, 0, 3]
    again = {number: make_sampler(make_data(list(range(9)), 10), 2).queries(number) for number in numbers}
    sampler = make_sampler(data, 2)
    assert all(same(sampler.queries(number), again[number]) for number in numbers)


def test_epochs_and_seeds_differ_in_order_groups_and_masks() -> None:
    data = make_data(list(range(9)), 10)
    first, second = epoch_of(data, 2, 1, 0), epoch_of(data, 2, 1, 1)
    assert [queries.window for queries in first] != [queries.window for queries in second]
    assert {key_of(queries) for queries in first} != {key_of(queries) for queries in second}
    other = TrainingSampler(data, MaskingConfig(), seed=6, samples_per_batch=2)
    assert [key_of(other.queries(n)) for n in range(10)] != [key_of(queries) for queries in first[:10]]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 7, 2**32 + 1])
def test_nothing_that_is_drawn_shares_its_random_numbers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_at: dict[int, set[tuple[str, int]]] = {}
    make = np.random.default_rng

    def noted(*entropy: Any) -> np.random.Generator:
        rng = make(*entropy)
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith("seeds.py"):
            assert frame.f_back is not None
            frame = frame.f_back
        place = (frame.f_code.co_filename, frame.f_lineno)
        drawn_at.setdefault(rng.bit_generator.state["state"]["state"], set()).add(place)
        return rng

    monkeypatch.setattr(np.random, "default_rng", noted)
    data = make_data(list(range(9)), 10)
    drawn_at.clear()  # of the panel's alleles
    sampler_module._epoch_order.cache_clear()
    augmentation = AugmentationConfig(typing_error=0.1)
    sampler = TrainingSampler(data, MaskingConfig(), seed, 2, augmentation=augmentation)
    for number in range(3 * sampler.micro_batches_per_epoch):
        sampler.queries(number)
    split_samples(10, 2, seed)
    for window in range(len(data)):
        for mask in VALIDATION_MASKS:
            validation_mask(mask, data.mask_sites(window), window)
    assert len(set.union(*drawn_at.values())) == 6
    assert [places for places in drawn_at.values() if len(places) > 1] == []


def test_alleles_are_those_of_the_samples_named_flanks_included() -> None:
    panel, alleles = make_panel(10, (30, 20))
    data = make_data(list(range(3, 10)), 10)
    for queries in epoch_of(data, 2, 1, 0):
        window = data.windows[queries.window]
        for row, haplotype in enumerate(queries.alleles):
            column = 2 * queries.samples[row // 2] + row % 2
            assert np.array_equal(haplotype, alleles[window.start : window.stop, column])
        assert queries.masked.shape == (len(queries.samples), len(window))
    assert panel.samples == data.reference.panel.samples


def test_a_pickled_sampler_draws_the_same_without_a_copy_of_the_panel(tmp_path: Path) -> None:
    panel, alleles = make_panel(400, (300, 200))
    path = tmp_path / "alleles.bits"
    panel.packed.tofile(path)
    panel = replace(panel, packed=map_packed(path, panel.packed.shape))
    reference = PanelSubset(panel, Populations(("all",), np.zeros(400, dtype=np.int64)), np.arange(380))
    data = WindowedPanel(reference, make_windows(panel.sites, 120, 30, 20), panel.sites.pos * 1e-6)
    sampler = TrainingSampler(data, MaskingConfig(), 5, 4, augmentation=AugmentationConfig(typing_error=0.1))
    pickled = pickle.dumps(sampler)
    assert len(pickled) < panel.packed.nbytes / 2 < alleles.nbytes / 2
    copy = pickle.loads(pickled)
    assert not hasattr(copy, "data")
    assert isinstance(copy._source._packed, np.memmap) and not copy._source._packed.flags.writeable
    for number in (0, 3, 200, 700):
        assert same(copy[number], sampler.queries(number))


def test_a_pickled_micro_batch_is_small_and_the_same() -> None:
    sampler = make_sampler(make_data(list(range(9)), 10, (3000,)), 8)
    queries = sampler.queries(1)
    pickled = pickle.dumps(queries)
    copy = pickle.loads(pickled)
    assert same(copy, queries)
    assert (copy.alleles.dtype, copy.masked.dtype) == (np.uint8, bool)
    assert copy.alleles.flags.c_contiguous and copy.alleles.flags.writeable and copy.masked.flags.writeable
    wide = QueryBatch(0, np.arange(2), np.eye(4, 9999, dtype=np.uint8), np.eye(2, 9999, dtype=bool))
    assert same(pickle.loads(pickle.dumps(wide)), wide) and len(pickle.dumps(wide)) < wide.alleles.nbytes / 4


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_curriculum_counts_optimiser_steps(accumulation: int) -> None:
    data = make_data(list(range(9)), 10)
    masking = MaskingConfig(policies={"random": 1.0}, random_rate=(0.1, 0.9), curriculum_steps=5)
    sampler = TrainingSampler(data, masking, seed=5, samples_per_batch=2, accumulation=accumulation)
    for number in range(3 * accumulation + 2):
        queries = sampler.queries(number)
        step = sum(later % accumulation == 0 for later in range(1, number + 1))
        sites = data.mask_sites(queries.window)
        expected = training_masks(masking, sites, 5, 0, step, queries.window, queries.samples)
        assert np.array_equal(queries.masked, expected)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2), (4, 50)])
def test_steps_per_epoch_is_what_fits_in_an_epoch(ranks: int, accumulation: int) -> None:
    sampler = make_sampler(make_data(list(range(9)), 10), 2, ranks=ranks, accumulation=accumulation)
    whole = 0
    while (whole + 1) * ranks * accumulation <= sampler.micro_batches_per_epoch:
        whole += 1
    assert sampler.steps_per_epoch == max(1, whole)


def test_too_few_samples_to_train_on_is_a_user_error() -> None:
    with pytest.raises(UserError, match="at least 3 samples"):
        make_sampler(make_data([4], 10), 2)


@given(count=st.integers(2, 300), held_out=st.integers(1, 60), seed=st.integers(0, 99))
def test_held_out_samples_are_disjoint_from_the_others_and_at_most_a_tenth(
    count: int, held_out: int, seed: int
) -> None:
    train, validation = split_samples(count, held_out, seed)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(count))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    assert 1 <= len(validation) <= max(1, min(held_out, count / 10))
    again = split_samples(count, held_out, seed)
    assert np.array_equal(again[0], train) and np.array_equal(again[1], validation)


def test_held_out_samples_depend_on_the_seed() -> None:
    assert len({tuple(split_samples(100, 10, seed)[1].tolist()) for seed in range(5)}) == 5


def test_features_and_mask_view_are_the_windows_slice_centred_on_its_core() -> None:
    data = make_data([0, 2, 3], 6)
    for number, window in enumerate(data.windows):
        features, sites = data.features(number), data.mask_sites(number)
        span = slice(window.start, window.stop)
        core = data.position_cm[window.core_sites]
        centre = (core[0] + core[-1]) / 2
        assert features.position == pytest.approx(data.position_cm[span] - centre, abs=1e-9)
        frequency = data.reference.allele_frequency[span]
        assert features.frequency == pytest.approx(
            np.clip(frequency, 0.5, 0.5)
        )  # six haplotypes are fewer than FEW, so the limit of rarity is 0.5
        assert np.array_equal(features.counts, data.reference.population_counts[:, span])
        assert features.position.dtype == features.frequency.dtype == features.counts.dtype == np.float32
        assert np.array_equal(sites.pos, data.reference.panel.sites.pos[span])
        assert sites.maf == pytest.approx([min(p, 1 - p) for p in frequency.tolist()], abs=1e-6)


def test_reference_alleles_of_a_window_are_the_sets_own() -> None:
    _, alleles = make_panel(6, (30, 20))
    data = make_data([4, 0, 5], 6)
    for number, window in enumerate(data.windows):
        expected = alleles[window.start : window.stop, [0, 1, 8, 9, 10, 11]].T
        assert np.array_equal(data.reference_alleles(number), expected)


VCF_MANIFEST = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\n1\t200\t.\tA\tC\n2\t100\t.\tA\tC\n9\t100\t.\tA\tC\n"
PLAIN_MANIFEST = "2 100\n\n1 200 anything\n1 201\n"


@pytest.mark.parametrize("text", [VCF_MANIFEST, PLAIN_MANIFEST], ids=["vcf", "plain"])
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_a_manifest_marks_exactly_its_sites(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"array{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix == ".gz" else text.encode())
    panel, _ = make_panel(2, (3, 2))
    assert read_manifest(path, panel).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 200\n1 x\n", "line 2: expected contig and position"),
        (b"1 200\n1\n", "line 2: expected contig and position"),
        (b"chr1 200\n", "no site of the manifest is in panel.vcf.gz"),
        (b"", "no site of the manifest"),
        (b"1 200\n1 2_00\n", "line 2: expected contig and position"),
        (b"1 " + b"9" * 5000, "no site of the manifest"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_errors_of_a_manifest_name_file_and_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "array.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as fault:
        read_manifest(path, make_panel(2, (3, 2))[0])
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("text", [VCF_MANIFEST, PLAIN_MANIFEST], ids=["vcf", "plain"])
@pytest.mark.parametrize("end", [b"\r\n", b"\r"], ids=["CRLF", "CR"])
def test_a_manifest_may_come_from_another_system(tmp_path: Path, text: str, end: bytes) -> None:
    path = tmp_path / "array.txt"
    path.write_bytes(b"\xef\xbb\xbf# caf\xe9" + end + text.encode().replace(b"\n", end))
    panel, _ = make_panel(2, (3, 2))
    assert read_manifest(path, panel).tolist() == [False, True, False, True, False]


DAMAGED = bytearray(gzip.compress(PLAIN_MANIFEST.encode(), mtime=0))
DAMAGED[10] = 0x07  # no such kind of block


@pytest.mark.parametrize(
    "content",
    [gzip.compress(PLAIN_MANIFEST.encode(), mtime=0)[:-12], bytes(DAMAGED)],
    ids=["truncated", "damaged"],
)
def test_a_gzipped_manifest_that_cannot_be_read_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "array.vcf.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read"):
        read_manifest(path, make_panel(2, (3, 2))[0])


def test_a_sample_may_not_retrieve_itself() -> None:
    assert exclusion_table(("a", "b", "c"), None).tolist() == [[0], [1], [2]]


def test_relatives_exclude_each_other_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "relatives.txt"
    path.write_text("a c\n\nb\ta\n", encoding="utf-8")
    table = exclusion_table(("a", "b", "c", "d"), path)
    assert [set(row.tolist()) - {-1} for row in table] == [{0, 1, 2}, {0, 1}, {0, 2}, {3}]
    assert table[:, 0].tolist() == [0, 1, 2, 3]


def test_relatives_may_come_from_another_system_and_have_comments_and_names_with_blanks(tmp_path: Path) -> None:
    path = tmp_path / "relatives.txt"
    path.write_bytes(b"\xef\xbb\xbf# trios\r\n a 1\tb\xe9 \r\n\r\n#x \tb\xe9\t\r\n")
    assert exclusion_table(("a 1", "b\udce9", "#x"), path).tolist() == [[0, 1, -1], [1, 0, 2], [2, 1, -1]]


def test_a_pair_listed_twice_or_with_itself_counts_once(tmp_path: Path) -> None:
    """The width of the table limits the number of neighbours of every sample."""
    path = tmp_path / "relatives.txt"
    path.write_text("a b\nb a\na b\nc c\n", encoding="utf-8")
    assert exclusion_table(("a", "b", "c"), path).tolist() == [[0, 1], [1, 0], [2, -1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a b\na z\n", "line 2"), (b"a\n", "line 1"), (b"a b c\n", "line 1"), (b"\xff\xfe\x00", "cannot read")],
)
def test_errors_of_the_relatives_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "relatives.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as fault:
        exclusion_table(("a", "b", "c"), path)
    assert str(path) in str(fault.value)


def test_an_absent_file_of_relatives_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        exclusion_table(("a",), tmp_path / "absent")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"window_sites": 1, "overlap_sites": 0}, "data.window_sites"),
        ({"window_sites": 30, "overlap_sites": 11}, "data.overlap_sites"),
        ({"overlap_sites": -1}, "data.overlap_sites"),
        ({"flank_sites": -1}, "data.flank_sites"),
        ({"validation_samples": 0}, "data.validation_samples"),
    ],
)
def test_bad_settings_are_user_errors_naming_the_key(settings: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        DataConfig(**settings)
