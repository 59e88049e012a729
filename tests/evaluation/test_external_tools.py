"""External tools: the commands that run Beagle, minimac4 and Selphi, and missing or failing programs."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.cli.main import main
from embrag_ds.data.simulate import DefaultData
from embrag_ds.errors import UserError
from embrag_ds.evaluation.external_tools import TOOLS, able, impute_with_tools, not_run, plink_map, tool_files
from embrag_ds.maps.genetic_map import GeneticMap
from tests.whole_files import read_dosages

# A stand-in records its arguments and copies the panel to the output file that they name.
STAND_IN = {
    "beagle": 'for word in "$@"; do case $word in out=*) cp "$PANEL" "${word#out=}.vcf.gz";; esac; done',
    "minimac4": 'while [ $# -gt 1 ]; do [ "$1" = -o ] && cp "$PANEL" "$2"; shift; done',
}
# It takes the options of Selphi 1.5.3, and stops where that stops: at an unknown option, at a file that is missing, at
# a panel without an index, and at a map whose columns are not one space apart.
SELPHI = """\
import argparse, gzip, os, shutil

parser = argparse.ArgumentParser(prog="Selphi", allow_abbrev=False)
parser.add_argument("--refpanel", required=True)
for option in ("--target", "--map", "--outvcf", "--ref_source_vcf"):
    parser.add_argument(option)
parser.add_argument("--cores", type=int, default=1)
parser.add_argument("--prepare_reference", action="store_true")
given = parser.parse_args()
if given.prepare_reference:
    source = given.ref_source_vcf
    if not source:
        raise KeyError("Reference panel path required with --prepare_reference")
    if not any(os.path.exists(source + index) for index in (".tbi", ".csi")):
        raise ValueError(f"Error executing bcftools: index: failed to open {source}")
    for suffix in (".pbwt", ".samples", ".sites", ".srp"):
        open(given.refpanel + suffix, "w").close()
    if not given.target:
        raise SystemExit(0)
if not given.target or not given.map:
    raise KeyError("Path to target vcf/bcf and genetic map required for imputation")
for path in (given.target, given.refpanel + ".pbwt", given.refpanel + ".srp", given.map):
    if not os.path.exists(path):
        raise FileNotFoundError(f"Missing file: {path}")
points = [line.rstrip("\\n").split(" ") for line in open(given.map)]
assert [float(each[2]) for each in points] and [int(each[3]) for each in points]
shutil.copy(os.environ["PANEL"], given.outvcf + ".vcf.gz")
"""


@pytest.fixture
def programs(tmp_path: Path, simulated: DefaultData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of stand-ins for the tools; a PATH with them alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_IN.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/calls\n{body}\n', encoding="utf-8")
        script.chmod(0o755)
    record = f'import sys\nprint("selphi", *sys.argv[1:], file=open({str(tmp_path / "calls")!r}, "a"))\n'
    (folder / "selphi").write_text(f"#!{sys.executable}\n{record}{SELPHI}", encoding="utf-8")
    (folder / "selphi").chmod(0o755)
    monkeypatch.setenv("PANEL", str(simulated.panel))
    (folder / "cp").symlink_to(shutil.which("cp") or "cp")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_every_tool_gets_panel_target_and_map(programs: Path, tmp_path: Path, simulated: DefaultData) -> None:
    found, failed = impute_with_tools(simulated.panel, simulated.target, simulated.genetic_map, tmp_path / "work", 3)
    assert failed == {}
    assert list(found) == ["beagle", "minimac4", "selphi"] and not_run(simulated.genetic_map) == {}
    assert all(path.read_bytes() == simulated.panel.read_bytes() for path in found.values())
    beagle, converted, minimac, *selphi = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    genetic_map = tmp_path / "work" / "genetic.map"
    for word in (f"ref={simulated.panel}", f"gt={simulated.target}", f"map={genetic_map}", "gp=true", "nthreads=3"):
        assert word in beagle.split()
    assert converted.split()[1:3] == ["--compress-reference", str(simulated.panel)]
    assert minimac.split()[1:3] == [converted.split()[-1], str(simulated.target)]
    assert f"--map {genetic_map}" in minimac and "-t 3" in minimac
    work = tmp_path / "work"
    panel = f"--refpanel {work / 'selphi-panel'}"
    assert selphi == [
        f"selphi --prepare_reference --ref_source_vcf {simulated.panel} {panel} --cores 3",
        f"selphi {panel} --target {simulated.target} --map {genetic_map} --outvcf {work / 'selphi'} --cores 3",
    ]
    assert set(work.iterdir()) <= set(tool_files(work))
    bp = np.linspace(1000, 2_000_000, 7)
    written, given = (GeneticMap.read(path)._interpolate("1", bp) for path in (genetic_map, simulated.genetic_map))
    assert written == pytest.approx(given, abs=1e-7)


def test_a_missing_program_is_left_out_and_none_is_an_error(
    programs: Path, tmp_path: Path, simulated: DefaultData
) -> None:
    (programs / "beagle").unlink()
    assert able(simulated.genetic_map) == ["minimac4", "selphi"]
    assert not_run(simulated.genetic_map) == {"beagle": "not installed"}
    assert not_run(None) == {"beagle": "not installed", "selphi": "needs a genetic map"}
    (programs / "minimac4").unlink()
    why = r"beagle \(not installed\), minimac4 \(not installed\), selphi \(needs a genetic map\); apt-get install"
    with pytest.raises(UserError, match=f"--run-tools: no tool can run: {why}"):
        impute_with_tools(simulated.panel, simulated.target, None, tmp_path / "work", 1)
    (programs / "selphi").unlink()
    assert able(simulated.genetic_map) == []
    assert not_run(simulated.genetic_map) == not_run(None) == dict.fromkeys(TOOLS, "not installed")


def test_selphi_stops_at_a_panel_without_an_index(programs: Path, tmp_path: Path, simulated: DefaultData) -> None:
    panel = Path(shutil.copy(simulated.panel, tmp_path / "bare.vcf.gz"))
    why = r"selphi ended with 1 \(ValueError: .*index: failed to open .*/bare\.vcf\.gz\); see .*/selphi-panel\.out"
    found, failed = impute_with_tools(panel, simulated.target, simulated.genetic_map, tmp_path / "work", 1)
    assert list(found) == ["beagle", "minimac4"] and re.fullmatch(why, failed["selphi"])


def test_the_report_tells_which_tools_did_not_run(
    programs: Path, tmp_path: Path, simulated: DefaultData, capsys: pytest.CaptureFixture[str]
) -> None:
    (programs / "minimac4").unlink()
    given = [f"--{name}={getattr(simulated, name)}" for name in ("truth", "panel", "target")]
    made = [f"--json={tmp_path / 'json'}", f"--markdown={tmp_path / 'markdown'}", f"--run-tools={tmp_path / 'work'}"]
    given = ["evaluate", *given, *made, f"--cache-dir={tmp_path / 'cache'}", "--bootstrap=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANEL", str(simulated.truth))  # the stand-ins' output, with the truth's samples
        main(arguments=given)
        line = "Not run: minimac4 (not installed), selphi (needs a genetic map)\n"
        assert f"\n\n{line}\nMore tables (" in capsys.readouterr().out
        written = json.loads((tmp_path / "json").read_text(encoding="utf-8"))
        assert written["tools_not_run"] == {"minimac4": "not installed", "selphi": "needs a genetic map"}
        assert list(written["tools"]) == ["beagle"]
        assert (tmp_path / "markdown").read_text(encoding="utf-8").endswith("\n\n" + line)
        main(arguments=[*given, f"--map={simulated.genetic_map}"])
        written = json.loads((tmp_path / "json").read_text(encoding="utf-8"))
        assert list(written["tools"]) == ["beagle", "selphi"]
        assert written["tools_not_run"] == {"minimac4": "not installed"}


def test_a_program_that_fails_is_told_with_its_last_line_and_the_others_are_scored(
    programs: Path, tmp_path: Path, simulated: DefaultData, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = "#!/bin/sh\necho starting\nprintf 'no \\033 memory\\n' >&2\nexit 3\n"
    (programs / "beagle").write_text(fails, encoding="utf-8")
    given = [f"--{name}={getattr(simulated, name)}" for name in ("truth", "panel", "target")]
    given = ["evaluate", *given, f"--cache-dir={tmp_path / 'cache'}", "--bootstrap=0"]
    why = f"beagle ended with 3 (no ? memory); see {tmp_path / 'work' / 'beagle.out'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANEL", str(simulated.truth))  # the stand-ins' output, with the truth's samples
        main(arguments=[*given, f"--run-tools={tmp_path / 'work'}"])
    said = capsys.readouterr()
    assert f"Not run: selphi (needs a genetic map), beagle ({why})\n" in said.out and "minimac4" in said.out
    assert f"warning: {why}\n" in said.err
    (programs / "minimac4").write_text(fails, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(arguments=[*given, f"--run-tools={tmp_path / 'work'}"])
    assert f"error: --run-tools: no tool imputed: {why}; minimac4 ended with 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--imputed=beagle={truth}"], "the name 'beagle' belongs to a tool that is run; choose another"),
        (
            ["--panel-missing=drop"],
            "--run-tools gives the panel to the tools as it is, without --panel-missing; leave",
        ),
        (["--panel={damaged}"], "is missing"),
    ],
)
def test_what_tools_would_not_take_is_refused_before_they_run(
    programs: Path,
    tmp_path: Path,
    simulated: DefaultData,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    damaged = tmp_path / "damaged.vcf"
    with gzip.open(simulated.panel, "rt") as stream:
        damaged.write_text(stream.read().replace("\t0|0", "\t.|.", 1), encoding="utf-8")
    given = [f"--{name}={getattr(simulated, name)}" for name in ("truth", "panel", "target")]
    given += [each.format(truth=simulated.truth, damaged=damaged) for each in options]
    with pytest.raises(SystemExit):
        main(arguments=["evaluate", *given, f"--run-tools={tmp_path / 'work'}", f"--cache-dir={tmp_path / 'cache'}"])
    assert said in capsys.readouterr().err and not (tmp_path / "calls").exists()


@pytest.mark.skipif(not all(map(shutil.which, ("beagle", "minimac4"))), reason="beagle and minimac4 are not installed")
def test_the_real_programs_impute(tmp_path: Path, simulated: DefaultData) -> None:
    found, failed = impute_with_tools(simulated.panel, simulated.target, simulated.genetic_map, tmp_path, 1)
    assert failed == {}
    for path in found.values():
        dosages = read_dosages(path)
        assert dosages.gp is not None and dosages.dr2 is not None and len(dosages.sites) > 0


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ("start\\nError: sample ploidy is not consistent\\nError: compressing variant failed", "sample ploidy"),
        ("start\\njava.lang.Exception: Sample A is haploid\\n\\tat java.base/run", "Sample A is haploid"),
    ],
)
def test_a_program_that_fails_is_quoted_with_the_line_that_tells_why(
    programs: Path, tmp_path: Path, simulated: DefaultData, printed: str, why: str
) -> None:
    (programs / "beagle").write_text(f'#!/bin/sh\nprintf "{printed}"\nexit 1\n', encoding="utf-8")
    _, failed = impute_with_tools(simulated.panel, simulated.target, None, tmp_path / "work", 1)
    assert re.fullmatch(rf"beagle ended with 1 \(.*{why}[^()]*\); see .*beagle\.out", failed["beagle"])


def test_the_map_has_the_contigs_of_a_panel_without_contig_lines(tmp_path: Path) -> None:
    names = "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", "A"])
    panel, genetic_map = tmp_path / "panel.vcf", tmp_path / "map"
    panel.write_text(f"##fileformat=VCFv4.2\n{names}\nchr7\t10\t.\tA\tC\t.\t.\t.\tGT\t0|1\n", encoding="utf-8")
    genetic_map.write_text("7 . 0.5 1000\n7 . 1.5 900000\n", encoding="utf-8")
    assert plink_map(genetic_map, panel, tmp_path).read_text(encoding="utf-8").startswith("chr7 . 0.5")
