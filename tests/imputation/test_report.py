"""The report of what was read and matched: numbers, table, and the list of what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from embrag_ds.data.packing.reading import TARGET, Reading
from embrag_ds.data.panel import Panel, open_panel
from embrag_ds.data.targets import match_targets, open_targets
from embrag_ds.files import write_json
from embrag_ds.imputation.report import describe, describe_targets, table, write_left_out
from embrag_ds.variants.harmonise import Harmonised
from tests.containers import vcf_text

PANEL = [
    "1 10 . A C . . . GT 0|1 1|1",
    "1 10 twice A C . . . GT 0|1 1|1",
    "1 20 . A T . . . GT 0|1 ./.",
    "1 30 . A G . . . GT 0|1 0",
    "1 40 . A C,T . . . GT 0|1 1|2",
]
TARGETS: list[str | bytes] = [
    "chr1 10 . C A . . . GT 0|1",
    "chr1 20 palindromic T A . . . GT 0|1",
    "chr1 30 . A G . . . GT 0|.",
    b"chr1\t40\tcaf\xe9\tA\tG\t.\t.\t.\tGT\t0|1",
    "chr1 40 . A T . . . GT 0|1",
    "chr1 41 none A <*> . . . GT 0|0",
    "2 1 far A T . . . GT 0|1",
]


def read(folder: Path) -> tuple[Panel, Panel, Harmonised]:
    (folder / "p.vcf").write_bytes(vcf_text(*PANEL))
    (folder / "t.vcf").write_bytes(vcf_text(*TARGETS, samples=("m\udce9",)))
    panel = open_panel(folder / "p.vcf", folder / "cache", progress=False, reading=Reading(missing="major"))
    target = open_panel(folder / "t.vcf", folder / "cache", progress=False, reading=TARGET)
    return panel, target, match_targets(target, panel, "report", allow_overlap=False)


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    panel, target, match = read(tmp_path)
    found = describe(panel, target, match, "report")
    assert found["panel"] == {
        "file": str(tmp_path / "p.vcf"),
        "samples": 2,
        "records": 5,
        "sites": 5,
        "monomorphic_sites": 0,
        "left_out": {"duplicate": 1},
        "filled_with_major_allele": 1,
        "haploid_samples": 1,
    }
    assert found["target"] == {
        "file": str(tmp_path / "t.vcf"),
        "samples": 1,
        "records": 7,
        "sites": 7,
        "monomorphic_sites": 2,
        "left_out": {},
        "filled_with_major_allele": 0,
        "haploid_samples": 0,
    }
    both = found["harmonisation"]
    assert both["matched_by_relation"] == {"the same alleles": 2, "REF and ALT exchanged": 1}
    assert both["dropped"] == {
        "palindromic, strand unclear": 1,
        "other alleles in the panel": 1,
        "not in the panel": 1,
        "contig not in the panel": 1,
    }
    assert (both["matched"], both["matched_palindromic"], both["contigs"]) == (3, 1, {"chr1": "1"})
    assert both["matched"] + sum(both["dropped"].values()) == found["target"]["sites"]
    assert both["palindromic_rule"] == {"likelihood_ratio": 1000.0, "greatest_minor_allele_frequency": 0.4}
    targets = open_targets(target, match, panel)
    found |= describe_targets(targets, [{"sample": target.samples[0], "call_rate": 0.8, "distance": None}])
    assert (found["typed_sites"], found["phased_by"]) == (3, None)
    write_json(tmp_path / "report.json", found)
    assert json.loads((tmp_path / "report.json").read_text()) == found


def test_the_table_has_every_number(tmp_path: Path) -> None:
    panel, target, match = read(tmp_path)
    lines = table(describe(panel, target, match, "report")).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "panel: records 5",
        "panel: sites 5",
        "panel: monomorphic sites 0",
        "panel: left out, duplicate 1",
        "panel: sites with the major allele for missing calls 1",
        "panel: samples with haploid calls 1",
        "target: records 7",
        "target: sites 7",
        "target: monomorphic sites 2",
        "matched, the same alleles 2",
        "matched, REF and ALT exchanged 1",
        "of these palindromic 1",
        "dropped, palindromic, strand unclear 1",
        "dropped, other alleles in the panel 1",
        "dropped, not in the panel 1",
        "dropped, contig not in the panel 1",
    ]
    assert len({line.rindex("  ") for line in lines}) == 1


def test_what_was_left_out_is_listed_with_its_reason(tmp_path: Path) -> None:
    panel, target, match = read(tmp_path)
    write_left_out(tmp_path / "excluded.tsv", panel, target, match)
    assert (tmp_path / "excluded.tsv").read_bytes().split(b"\n") == [
        b"file\tcontig\tpos\tid\tref\talt\treason",
        b"panel\t1\t10\ttwice\tA\tC\tduplicate",
        b"target\tchr1\t20\tpalindromic\tT\tA\tpalindromic, strand unclear",
        b"target\tchr1\t40\tcaf\xe9\tA\tG\tother alleles in the panel",
        b"target\tchr1\t41\tnone\tA\t.\tnot in the panel",
        b"target\t2\t1\tfar\tA\tT\tcontig not in the panel",
        b"",
    ]
    assert sum(np.array([reason is not None for reason in match.reason])) == 4
