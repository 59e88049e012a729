"""Targets as people have them: missing and haploid calls, regions, contigs without typed sites."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools
import pytest

from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.simulate import DefaultData
from embrag_ds.errors import UserError
from embrag_ds.imputation.impute import impute
from embrag_ds.imputation.preparation import TargetOptions
from tests.whole_files import read_dosages

Record = list[str]
Edit = Callable[[list[Record]], None]


@pytest.fixture(scope="module")
def header_and_records(simulated: DefaultData) -> dict[str, tuple[list[str], list[Record]]]:
    """Header lines and records, split at tabs, of the simulated panel and target."""
    found = {}
    for name, path in (("panel", simulated.panel), ("target", simulated.target)):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        records = [line.split("\t") for line in lines if not line.startswith("#")]
        found[name] = [line for line in lines if line.startswith("#")], records
    return found


@pytest.fixture
def run(
    header_and_records: dict[str, tuple[list[str], list[Record]]], tmp_path: Path, cache_dir: Path
) -> Callable[..., Path]:
    """Function that imputes edited copies of the simulated files, in plain text, and returns the output's path."""

    def written(name: str, edit: Edit | None) -> Path:
        header, records = header_and_records[name]
        copied = [list(record) for record in records]
        if edit is not None:
            edit(copied)
        path = tmp_path / f"{name}.vcf"
        columns = "\t".join(header[-1].split("\t")[: len(copied[0])])
        path.write_text("\n".join([*header[:-1], columns, *("\t".join(each) for each in copied), ""]))
        return path

    def run(
        target: Edit | None = None,
        panel: Edit | None = None,
        out: str = "out.vcf.gz",
        transformer: bool = False,
        **options: object,
    ) -> Path:
        files = PanelFiles(written("panel", panel))
        path = tmp_path / out
        impute(
            files,
            written("target", target),
            path,
            options=TargetOptions(**options),  # type: ignore[arg-type]
            transformer=transformer,
            device="cpu",
            adapt="off",
            cache_dir=cache_dir,
        )
        return path

    return run


def records_of(path: Path) -> list[Record]:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def test_a_missing_call_is_imputed_and_other_samples_do_not_change(run: Callable[..., Path]) -> None:
    base = records_of(run())
    chosen = 7

    def edit(records: list[Record]) -> None:
        records[chosen][9 + 2] = "./."
        records[chosen][9 + 4] = ".|" + records[chosen][9 + 4][2]
        records[chosen + 1][9 + 5] = "."

    found = records_of(run(edit))
    assert len(found) == len(base)
    touched = {9 + 2, 9 + 4, 9 + 5}
    typed = [number for number, record in enumerate(base) if "IMP" not in record[7]]
    for number, (one, other) in enumerate(zip(base, found, strict=True)):
        assert one[:7] == other[:7] and ("IMP" in one[7]) == ("IMP" in other[7])
        for column in range(9, len(one)):
            if column not in touched:
                assert one[column] == other[column]
        if number in typed and number not in (typed[chosen], typed[chosen + 1]):
            assert one == other
    at = found[typed[chosen]]
    for column in (9 + 2, 9 + 4):
        values = [float(each) for each in at[column].split(":")[2].split(",")]
        assert 0 < values[0] < 1
    # The half of the call that is there stays.
    assert at[9 + 4].split(":")[2].split(",")[1] == base[typed[chosen]][9 + 4].split(":")[2].split(",")[1]
    assert 0 < float(found[typed[chosen + 1]][9 + 5].split(":")[2].split(",")[0]) < 1


def test_a_sample_without_any_call_gets_allele_frequencies(
    run: Callable[..., Path], header_and_records: dict[str, tuple[list[str], list[Record]]]
) -> None:
    def edit(records: list[Record]) -> None:
        for record in records:
            record[9 + 3] = "./."

    found = read_dosages(run(edit))
    panel = header_and_records["panel"][1]
    frequency = [sum(call.count("1") for call in record[9:]) / (2 * len(record[9:])) for record in panel]
    np.testing.assert_allclose(found.dosage[:, 3], 2 * np.array(frequency), atol=0.0011)


def test_a_site_that_nobody_has_is_not_typed(run: Callable[..., Path]) -> None:
    def edit(records: list[Record]) -> None:
        records[5][9:] = ["./."] * len(records[5][9:])

    def drop(records: list[Record]) -> None:
        del records[5]

    assert records_of(run(edit)) == records_of(run(drop))


def test_a_haploid_sample_is_imputed_as_a_homozygous_one_and_written_haploid(run: Callable[..., Path]) -> None:
    def haploid(records: list[Record]) -> None:
        for record in records:
            record[9 + 1] = record[9 + 1][0]

    def homozygous(records: list[Record]) -> None:
        for record in records:
            record[9 + 1] = "/".join(record[9 + 1][0] * 2)

    found, expected = records_of(run(haploid)), records_of(run(homozygous))
    for one, other in zip(found, expected, strict=True):
        gt, ds, hds, gp = one[9 + 1].split(":")
        both = other[9 + 1].split(":")
        assert gt == both[0][0] and hds == both[2].split(",")[0]
        assert float(ds) == pytest.approx(float(both[1]) / 2, abs=0.0006)
        assert [float(each) for each in gp.split(",")] == pytest.approx([1 - float(hds), float(hds)], abs=0.0006)
        assert one[9] == other[9]


def test_the_transformer_takes_missing_and_haploid_calls(run: Callable[..., Path]) -> None:
    def edit(records: list[Record]) -> None:
        for number, record in enumerate(records):
            record[9 + 1] = record[9 + 1][0]
            record[9 + 3] = "./."
            record[9 + 4] = ".|" + record[9 + 4][2] if number % 3 else "./."

    without, found = (read_dosages(run(edit, transformer=each)) for each in (False, True))
    assert (found.dosage >= 0).all() and (found.dosage[:, 1] <= 1).all() and (found.dosage <= 2).all()
    np.testing.assert_array_equal(found.dosage[:, 3], without.dosage[:, 3])  # of frequencies
    apart = np.abs(found.dosage - without.dosage)
    assert 0.001 < apart.max() < 0.1 and apart[:, [1, 4]].max() > 0.001
    known = ~np.asarray(found.imputed)
    np.testing.assert_array_equal(found.dosage[known][:, [0, 1, 2]], without.dosage[known][:, [0, 1, 2]])


def test_haploid_samples_of_the_panel_count_once(run: Callable[..., Path]) -> None:
    """A panel of haploid samples is one of half as many diploid ones."""

    def haploid(records: list[Record]) -> None:
        for record in records:
            record[9:] = "|".join(record[9:]).split("|")[: len(record) - 9]

    def diploid(records: list[Record]) -> None:
        for record in records:
            record[9:] = record[9 : 9 + (len(record) - 9) // 2]

    one, other = read_dosages(run(panel=haploid)), read_dosages(run(panel=diploid))
    # Not equal, because a search finds a haploid sample's haplotype twice, and so fewer others.
    assert np.corrcoef(one.dosage.ravel(), other.dosage.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("every", [1, 2])
def test_which_of_two_alleles_is_ref_does_not_matter(
    run: Callable[..., Path], header_and_records: dict[str, tuple[list[str], list[Record]]], every: int
) -> None:
    """REF and ALT are exchanged in both files, at all sites or at every second one."""
    _, panel = header_and_records["panel"]
    exchanged = np.arange(len(panel)) % every == 0
    positions = {record[1] for record, each in zip(panel, exchanged, strict=True) if each}
    other = str.maketrans("01", "10")

    def exchange(records: list[Record]) -> None:
        for record in records:
            if record[1] in positions:
                record[3], record[4] = record[4], record[3]
                record[9:] = [call.translate(other) for call in record[9:]]

    before, after = read_dosages(run()).dosage, read_dosages(run(target=exchange, panel=exchange)).dosage
    alleles = ["".join(record[9:]) for record in panel]
    # Of two alleles that are equally frequent, the confidence head takes ALT for the rarer one.
    unequal = np.array([each.count("0") != each.count("1") for each in alleles])
    assert unequal.mean() > 0.9
    expected = np.where(exchanged[:, None], 2 - before, before)
    assert np.abs(after - expected)[unequal].max() < 0.0015  # the files have three decimals


def test_chunks_by_region_join_to_the_whole_run(run: Callable[..., Path], tmp_path: Path) -> None:
    whole = run()
    positions = [int(record[1]) for record in records_of(whole)]
    middle = positions[len(positions) // 3]
    parts = [
        run(out="one.vcf.gz", region=f"1:1-{middle}"),
        run(out="two.vcf.gz", region=f"chr1:{middle + 1:,}-"),
    ]
    joined = tmp_path / "joined.vcf.gz"
    pysam.bcftools.concat("-Oz", "-o", str(joined), *map(str, parts), catch_stdout=False)
    assert records_of(joined) == records_of(whole)
    with pytest.raises(UserError, match=r"--region 1:1-2: .*no site there"):
        run(region="1:1-2")


def test_contigs_without_typed_sites_are_left_out_or_have_frequencies(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def second(records: list[Record]) -> None:
        for record in records[-10:]:
            record[0] = "2"

    def first_only(records: list[Record]) -> None:
        records[:] = [record for record in records if int(record[1]) < 60_000]

    with caplog.at_level(logging.WARNING):
        found = records_of(run(target=first_only, panel=second))
    assert {record[0] for record in found} == {"1"}
    assert "is not typed on 2, which 10 sites" in caplog.text
    everything = records_of(run(target=first_only, panel=second, untyped_contigs="frequency"))
    assert [record[0] for record in everything].count("2") == 10
    assert everything[: len(found)] == found
    for record in everything[len(found) :]:
        assert len(set(record[9:])) == 1


def test_the_report_and_the_excluded_sites(run: Callable[..., Path], tmp_path: Path) -> None:
    complement = str.maketrans("ACGT", "TGCA")

    def edit(records: list[Record]) -> None:
        records[0][1] = str(int(records[0][1]) + 1)
        chosen = next(each for each in records[2:] if f"{each[3]}{each[4]}" not in ("AT", "TA", "CG", "GC"))
        chosen[3:5] = [each.translate(complement) for each in chosen[3:5]]
        records.insert(2, list(records[1]))

    report, excluded = tmp_path / "report.json", tmp_path / "excluded.tsv"
    run(edit, report=report, excluded=excluded)
    found = json.loads(report.read_text())
    assert found["target"]["left_out"] == {"duplicate": 1}
    assert found["harmonisation"]["dropped"] == {"not in the panel": 1, "on the other strand": 1}
    assert found["harmonisation"]["matched"] == found["typed_sites"] == found["target"]["sites"] - 2
    lines = [line.split("\t") for line in excluded.read_text().splitlines()]
    assert lines[0] == ["file", "contig", "pos", "id", "ref", "alt", "reason"]
    assert sorted(line[-1] for line in lines[1:]) == ["duplicate", "not in the panel", "on the other strand"]
    assert {line[0] for line in lines[1:]} == {"target"}
