"""Phasing of targets by Beagle, and by a stand-in for it where it is not installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.data.packing.reading import TARGET
from embrag_ds.data.panel import Panel, open_panel
from embrag_ds.data.phasing import _Consensus, command_for
from embrag_ds.data.targets import Targets, match_targets, phase_targets
from embrag_ds.errors import UserError
from tests.containers import vcf_text

needs_beagle = pytest.mark.skipif(shutil.which("beagle") is None, reason="Beagle is not installed")

STAND_IN = """#!{python}
import gzip, sys
given = dict(each.split("=", 1) for each in sys.argv[1:])
print("beagle.stand-in.jar (version 0)")
{more}
with gzip.open(given["gt"], "rt") as source, gzip.open(given["out"] + ".vcf.gz", "wt") as out:
    for line in source:
        fields = line.rstrip("\\n").split("\\t")
        if not line.startswith("#"):
            # The other phase for all heterozygotes, and some allele for missing ones.
            calls = [each[::-1].replace("/", "|") for each in fields[9:]]
            fields[9:] = ["1|0" if "." in each else each for each in calls]
        out.write("\\t".join(fields) + "\\n")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called ``beagle``, the only one on the path."""
    return write_stand_in(tmp_path, monkeypatch)


def write_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> Path:
    program = tmp_path / "bin" / "beagle"
    program.parent.mkdir(exist_ok=True)
    program.write_text(STAND_IN.format(python=sys.executable, more=more))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def opened(folder: Path, panel: list[str], target: list[str], samples: tuple[str, ...]) -> tuple[Panel, Panel]:
    """Panel and targets of records; the panel's samples are numbered."""
    number = len(panel[0].split()) - 9
    for name, records, names in (("p.vcf", panel, [f"p{i}" for i in range(number)]), ("t.vcf", target, samples)):
        (folder / name).write_bytes(vcf_text(*records, samples=names))
    cache = folder / "cache"
    return (
        open_panel(folder / "p.vcf", cache, progress=False),
        open_panel(folder / "t.vcf", cache, progress=False, reading=TARGET),
    )


def phased(folder: Path, panel: Panel, target: Panel, log: Path | None = None, cm_per_bp: float = 1e-6) -> Targets:
    scratch = folder / "a scratch folder"
    scratch.mkdir(exist_ok=True)
    match = match_targets(target, panel, "report", allow_overlap=False)
    position_cm = panel.sites.pos * cm_per_bp
    return phase_targets(target, match, panel, position_cm, scratch, log or folder / "out of it.log", threads=1)


PANEL = [f"1 {pos} . A C . . . GT 0|1 1|1" for pos in (10, 20, 30, 40)]


def test_the_result_is_read_and_what_made_it_is_kept(tmp_path: Path, stand_in: Path) -> None:
    target = ["1 10 . C A . . . GT 0/1 1|0", "1 20 . A C . . . GT 0/1 0|1", "1 40 . A C . . . GT 1/1 0|1"]
    panel, own = opened(tmp_path, PANEL, target, ("T", "U"))
    targets = phased(tmp_path, panel, own)
    # At the first site the file has REF and ALT exchanged. U needs no phasing and keeps its own.
    assert targets.alleles(slice(0, 4), slice(0, 2)).T.tolist() == [
        [0, 1, 0, 1],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 1],
    ]
    assert targets.sites.tolist() == [0, 1, 3] and targets.missing is None
    assert targets.phased is not None
    assert targets.phased.version == "beagle.stand-in.jar (version 0)"
    command = "beagle gt=target.vcf.gz ref=panel.vcf.gz map=genetic.map out=phased impute=false nthreads=1 seed="
    commands = [f"{command}{seed}" for seed in (1, 2, 3)]
    assert targets.phased.command == "; ".join(commands)
    log = (tmp_path / "out of it.log").read_text().splitlines()
    assert "3 sites of both" in log[0]
    assert log[1:] == [line for each in commands for line in (f"command: {each}", "beagle.stand-in.jar (version 0)")]


def test_the_phase_is_that_of_most_runs() -> None:
    """Three runs, each with switch errors of its own and haplotypes in an order of its own."""
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 2, (60, 8), dtype=np.uint8)
    missing = np.repeat(rng.random((60, 4)) < 0.1, 2, axis=1)
    known = (truth[:, 0::2] != truth[:, 1::2]) & ~missing[:, 0::2]
    consensus = _Consensus(lambda span: (truth[span], missing[span]), 60, 4)
    for run in range(3):
        alleles = np.where(missing, rng.integers(0, 2, truth.shape), truth).astype(np.uint8)
        for sample in range(4):
            pair = alleles[:, 2 * sample : 2 * sample + 2]
            begins = np.flatnonzero(known[:, sample])[3 * run + 1]  # a switch error that no other run has
            turned = (np.arange(60) >= begins) ^ bool(rng.integers(2))
            pair[turned] = pair[turned, ::-1]
        consensus.add(alleles)
    found = consensus.alleles()
    for sample in range(4):
        pair, right = found[:, 2 * sample : 2 * sample + 2], truth[:, 2 * sample : 2 * sample + 2]
        same = pair[known[:, sample], 0] == right[known[:, sample], 0]
        assert same.all() or not same.any()
        np.testing.assert_array_equal(np.sort(pair[known[:, sample]]), np.sort(right[known[:, sample]]))


def test_missing_calls_stay_missing(tmp_path: Path, stand_in: Path) -> None:
    target = [
        "1 10 . A C . . . GT 0/1 .|1",
        "1 20 . A C . . . GT ./. 0|1",
        "1 30 . A C . . . GT .|1 .|.",
        "1 40 . A C . . . GT ./1 1|0",
    ]
    panel, own = opened(tmp_path, PANEL, target, ("T", "U"))
    targets = phased(tmp_path, panel, own)
    missing = targets.missing_alleles(slice(0, 4), slice(0, 2))
    assert missing is not None
    # Beside Beagle's phase, the place of T's one allele at the third site means nothing, so that nobody is typed there.
    assert targets.typed.tolist() == [True, True, False, True]
    # U keeps its phase.
    assert missing.T.tolist() == [
        [False, False, True, False],
        [True, True, False, False],
        [False, False, False, False],
        [True, True, False, False],
    ]
    known = targets.alleles(slice(0, 4), slice(0, 2)).T[~missing.T]
    assert known.tolist() == [1, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0]


def test_phased_targets_need_no_beagle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    caplog.set_level("INFO")
    panel, own = opened(tmp_path, PANEL, ["1 10 . A C . . . GT 0|1 1/1", "1 20 . A C . . . GT ./1 ./."], ("T", "U"))
    targets = phased(tmp_path, panel, own)
    assert targets.phased is None and targets.typed.tolist() == [True, False, False, False]
    assert "all calls are phased; Beagle is not run" in caplog.text


def test_without_beagle_the_error_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    panel, own = opened(tmp_path, PANEL, ["1 10 . A C . . . GT 0/1 1/1"], ("T", "U"))
    with pytest.raises(UserError) as caught:
        phased(tmp_path, panel, own)
    text = str(caught.value)
    assert text.startswith(f"{own.path}: --phase beagle: Beagle is not installed; install it") and "\n" not in text
    assert f"`beagle gt={own.path} ref={panel.path} out=phased impute=false`" in text


def test_the_command_converts_what_beagle_does_not_read() -> None:
    assert command_for(Path("t.vcf"), Path("p.vcf.gz")) == "beagle gt=t.vcf ref=p.vcf.gz out=phased impute=false"
    assert command_for(Path("a b/t.vcf.gz"), Path("p.bcf")) == (
        "bcftools view -Oz -o target.vcf.gz 'a b/t.vcf.gz' && bcftools view -Oz -o panel.vcf.gz p.bcf && "
        "beagle gt=target.vcf.gz ref=panel.vcf.gz out=phased impute=false"
    )


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("sys.exit('no memory')", "beagle ended with 1 (no memory); see {log}"),
        ("import os; os.abort()", "beagle ended with -6"),
        (
            "gzip.open(given['out'] + '.vcf.gz', 'wt').write('#CHROM\\tPOS\\tID\\tREF\\tALT\\tQUAL\\tFILTER\\tINFO\\t"
            "FORMAT\\ts0\\ts1\\n'); sys.exit(0)",
            "Beagle's output lacks 1 of 1 sites, or their phase; use Beagle 5.4, see {log}",
        ),
        ("sys.exit(0)", "there is no such file"),
    ],
)
def test_a_failure_of_beagle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, problem: str) -> None:
    write_stand_in(tmp_path, monkeypatch, more)
    panel, own = opened(tmp_path, PANEL, ["1 10 . A C . . . GT 0/1 1/1"], ("T", "U"))
    log = tmp_path / "kept.log"
    with pytest.raises(UserError) as caught:
        phased(tmp_path, panel, own, log)
    assert problem.format(log=log) in str(caught.value) and "\n" not in str(caught.value)
    assert "beagle.stand-in.jar" in log.read_text() or "abort" in more


# --- the real one -----------------------------------------------------------------------------------------


def two_kinds(sites: list[str], samples: int = 12) -> tuple[list[str], np.ndarray]:
    """A panel in which each haplotype is one of two that differ at every site (given as "1 10 . A C . . ."), and
    their numbers."""
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, 2, (samples, 2))
    pattern = rng.integers(0, 2, len(sites))
    pattern[: min(2, len(sites))] = [0, 1][: len(sites)]
    texts = []
    for site, flip in zip(sites, pattern.tolist(), strict=True):
        calls = " ".join(f"{a ^ flip}|{b ^ flip}" for a, b in kinds.tolist())
        texts.append(f"{site} GT {calls}")
    return texts, pattern


SITES = [
    "1 10000 . A C . . .",
    "1 20000 . A G . . .",
    "1 20000 . A T . . .",
    "1 20000 . A AT . . .",
    "1 30000 . A <DEL> . . END=30100",
    "1 30000 . A <DEL> . . END=30200",
    "1 40000 . A C,G . . .",
    "1 50000 . AC A . . .",
]


@needs_beagle
def test_beagle_phases_sites_at_one_position_and_symbolic_alleles(tmp_path: Path) -> None:
    sites = [each for each in SITES if "," not in each]
    panel_text, pattern = two_kinds(sites)
    # T has both haplotypes, U is homozygous but at one site that is missing, and V is haploid.
    lines = []
    for number, (site, flip) in enumerate(zip(sites, pattern.tolist(), strict=True)):
        homozygous = "./." if number == 3 else f"{flip}/{flip}"
        lines.append(f"{site} GT {'1/0' if number % 2 else '0/1'} {homozygous} {flip}")
    panel, own = opened(tmp_path, panel_text, lines, ("T", "U", "V"))
    targets = phased(tmp_path, panel, own)
    assert targets.phased is not None and targets.phased.version.startswith("beagle.")
    alleles = targets.alleles(slice(0, len(sites)), slice(0, 3)) ^ pattern.astype(np.uint8)
    assert sorted(alleles[:2].tolist()) == [[0] * len(sites), [1] * len(sites)]
    missing = targets.missing_alleles(slice(0, len(sites)), slice(0, 3))
    assert missing is not None and np.argwhere(missing).tolist() == [[2, 3], [3, 3]]
    assert not alleles[2:][~missing[2:]].any()
    haploid = targets.haploid(slice(0, len(sites)))
    assert haploid is not None and haploid.tolist() == [[False] * len(sites)] * 2 + [[True] * len(sites)]


@pytest.mark.long
@needs_beagle
@pytest.mark.parametrize(
    "places",
    [
        ["1 10"],
        ["1 10", "1 10"],
        ["1 10", "2 10"],
        ["1 10", "c;t\u00e9 7", "c;t\u00e9 9"],
        ["1 0", "1 2147483647"],
        # Windows of one position each, were gaps not limited; and no gap at all.
        ["1 10", "1 50000000", "1 100000000", "1 150000000"],
        ["1 10", "1 11", "1 12"],
    ],
)
def test_beagle_phases_contigs_of_few_sites(tmp_path: Path, places: list[str]) -> None:
    sites = [f"{place} . A {'CGT'[number % 3]} . . ." for number, place in enumerate(places)]
    panel_text, pattern = two_kinds(sites)
    panel, own = opened(tmp_path, panel_text, [f"{site} GT 0/1 1/1" for site in sites], ("T", "U"))
    targets = phased(tmp_path, panel, own, cm_per_bp=0.0 if places[-1] == "1 12" else 1e-6)
    alleles = targets.alleles(slice(0, len(sites)), slice(0, 2))
    assert alleles[:2].sum(0).tolist() == [1] * len(sites) and (alleles[2:] == 1).all()
    if places[-1].endswith(" 9"):
        assert len(set((alleles[:2] ^ pattern.astype(np.uint8))[0, 1:].tolist())) == 1


@needs_beagle
def test_beagle_splits_of_a_record_agree(tmp_path: Path) -> None:
    """A call 1/2 becomes heterozygous at two sites, whose ALT lie on different haplotypes."""
    panel_text = [f"1 {pos} . A C,G . . . GT 1|2 2|1 1|2 1|1 2|2 0|1" for pos in (1000, 2000, 3000)]
    panel, own = opened(
        tmp_path, panel_text, [f"1 {pos} . A C,G . . . GT 1/2 1/1" for pos in (1000, 2000, 3000)], ("T", "U")
    )
    alleles = phased(tmp_path, panel, own).alleles(slice(0, 6), slice(0, 2))
    assert (alleles[:2, 0::2] + alleles[:2, 1::2] == 1).all()
