"""Division among ranks: every window is computed once, and parts join to the bytes of one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import embrag_ds
from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.panel import Panel
from embrag_ds.data.simulate import DefaultData
from embrag_ds.data.targets import Targets, match_targets, open_targets
from embrag_ds.data.windows import Window, make_windows
from embrag_ds.imputation.computing import blending
from embrag_ds.imputation.computing.blending import write_blended
from embrag_ds.imputation.engine import Imputation, impute_to_vcf
from embrag_ds.imputation.extent import Extent
from embrag_ds.imputation.parts import Parts
from embrag_ds.imputation.shares import Border, Division, Share
from embrag_ds.variants.header import Contents
from embrag_ds.variants.output import EVERYTHING, ImputedRecords, OutputOptions, imputed_header
from embrag_ds.variants.published import last_positions
from tests.untrained import untrained
from tests.whole_files import read_phased

MakeConfig = Callable[..., RunConfig]
CPU = "cpu"
JOINED = OutputOptions(join_multiallelic=True)


class Lent:
    """Exchange of ranks that compute one after another, the last one first."""

    def __init__(self) -> None:
        self.lent: dict[int, np.ndarray] = {}

    def lend(self, border: Border, dosage: np.ndarray) -> None:
        assert dosage.shape[1] == border.sites
        self.lent[border.window] = dosage.copy()

    def borrow(self, border: Border) -> np.ndarray:
        return self.lent.pop(border.window)

    def check(self) -> None:
        pass


@pytest.fixture
def imputation(simulated: DefaultData, inputs: PanelInputs, make_config: MakeConfig) -> Imputation:
    """Several overlapping windows; sites by twos and threes of one record of the panel."""
    record = np.sort(
        np.arange(len(inputs.panel.sites)) // 2 * 2 % 101 + np.arange(len(inputs.panel.sites)) // 101 * 101
    )
    panel = dataclasses.replace(inputs.panel, sites=dataclasses.replace(inputs.panel.sites, record=record))
    inputs = dataclasses.replace(inputs, panel=panel)
    target = read_phased(simulated.target)
    packed = np.packbits(target.alleles, axis=1, bitorder="little")
    opened = Panel(Path("target.vcf.gz"), target.sites, target.samples, packed, target.skipped)
    targets: Targets = open_targets(opened, match_targets(opened, panel, "report", False), panel)
    return Imputation(untrained(make_config(), head=0.3), inputs, targets, CPU, 9)


def by_ranks(imputation: Imputation, out: Path, ranks: int, where: Extent, options: OutputOptions) -> None:
    """What ``embrag_ds.imputation.division`` does, with one rank after another."""
    sites, samples = imputation.data.reference.panel.sites, imputation.targets.samples
    windows, wanted = where.windows(imputation.data.windows), where.places(len(sites))
    division = Division(ranks, 0, int(wanted[-1]))
    record = sites.record if options.join_multiallelic else None
    out.with_suffix(".parts").mkdir()
    parts, lent, lengths, computed = Parts(out, out.with_suffix(".parts")), Lent(), [0] * ranks, []
    for rank in reversed(range(ranks)):
        share = division.share(rank, windows, wanted, record)
        computed += share.windows
        with parts.written(rank) as (publication, text):
            if rank == 0:
                header = imputed_header(
                    Contents.of(where.table(sites)), samples, f"embrag_ds {embrag_ds.__version__}", options.fields
                )
                publication.write(header)
            if share.windows:
                bounds = int(wanted[share.begin]), int(wanted[share.end])
                with ImputedRecords(publication, where.table(sites), len(samples), options, *bounds) as writer:
                    write_blended(imputation, writer, where, share, lent)
        lengths[rank] = text.text_bytes
    assert sorted(computed, key=lambda each: each.index) == windows and not lent.lent
    if out.suffix != ".bcf":
        for rank in range(ranks):
            parts.compress(rank, lengths)
    parts.join(lengths, max(last_positions(sites)))


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("out.vcf.gz", EVERYTHING, (1, 2, 3, 9)),
        ("out.vcf.gz", JOINED, (2, 3, 5)),
        ("out.vcf.gz", OutputOptions(typed_only=True), (3,)),
        ("out.bcf", EVERYTHING, (3,)),
    ],
)
@pytest.mark.parametrize("region", [False, True])
def test_parts_join_to_the_bytes_of_one_rank(
    imputation: Imputation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: OutputOptions,
    ranks: tuple[int, ...],
    region: bool,
) -> None:
    monkeypatch.setattr("embrag_ds.imputation.parts._READ_BYTES", 1000)
    where = Extent([(30, 201)]) if region else Extent(imputation.data.reference.panel.sites.contig_runs())
    impute_to_vcf(imputation, tmp_path / name, where, options)
    suffix = ".csi" if name.endswith("bcf") else ".tbi"
    for number in ranks:
        (tmp_path / str(number)).mkdir()
        by_ranks(imputation, tmp_path / str(number) / name, number, where, options)
        for file in (name, f"{name}{suffix}"):
            assert (tmp_path / str(number) / file).read_bytes() == (tmp_path / file).read_bytes()


def test_windows_go_to_the_rank_in_whose_share_their_middle_is() -> None:
    windows = [Window(number, 10 * number, 10 * number + 10, 10 * number, 10 * number + 10) for number in range(7)]
    wanted = np.arange(71)

    def of(ranks: int, offset: int = 0, total: int = 70) -> list[list[int]]:
        division = Division(ranks, offset, total)
        return [[each.index for each in division.share(rank, windows, wanted, None).windows] for rank in range(ranks)]

    assert of(1) == [[0, 1, 2, 3, 4, 5, 6]]
    assert of(2) == [[0, 1, 2], [3, 4, 5, 6]]
    assert of(3) == [[0, 1], [2, 3, 4], [5, 6]]
    assert sorted(map(len, of(9))) == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert of(3, offset=70, total=210) == [[], [0, 1, 2, 3, 4, 5, 6], []]
    assert [Division(3, 70, 210).is_touched(rank, 70) for rank in range(3)] == [False, True, True]
    assert not Division(3, 71, 210).is_touched(0, 69) and Division(3, 69, 210).is_touched(0, 69)


def test_a_record_that_reaches_into_a_third_window_stays_with_one_rank(inputs: PanelInputs) -> None:
    windows = make_windows(inputs.panel.sites, 30, 6, 0)
    size = len(inputs.panel.sites)
    wanted = np.arange(size + 1)
    bound = windows[1].core_stop
    plain = Division(2, 0, 2 * bound - windows[1].core_start)  # the border is before the second or the third window

    def borders(record: np.ndarray | None) -> list[Share]:
        return [plain.share(rank, windows[:4], wanted, record) for rank in range(2)]

    left, right = borders(None)
    assert left.after == right.before and left.after is not None and left.after.sites == 6
    record = np.arange(size)
    first = left.windows[-1].core_stop - 1
    record[first : first + 3] = record[first]
    left, right = borders(record)
    assert left.after == right.before and left.after is not None and left.after.sites == 8
    record[first : first + 25] = record[first]
    longer, shorter = borders(record)
    assert len(longer.windows) == len(left.windows) + 1 and longer.after == shorter.before


@pytest.mark.parametrize("sites", [1, 7])
def test_how_many_sites_are_written_at_once_changes_nothing(
    imputation: Imputation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: int
) -> None:
    whole, parts = tmp_path / "whole.vcf.gz", tmp_path / "parts.vcf.gz"
    impute_to_vcf(imputation, whole)
    monkeypatch.setattr(blending, "_BYTES_AT_ONCE", 2 * len(imputation.targets.samples) * sites)
    impute_to_vcf(imputation, parts)
    assert parts.read_bytes() == whole.read_bytes()
