"""External tools: the commands that run Beagle and minimac4, and missing or failing programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.data.simulate import DefaultData
from embrag_ds.errors import UserError
from embrag_ds.evaluation.external_tools import TOOLS, impute_with_tools, plink_map
from embrag_ds.maps.genetic_map import GeneticMap
from tests.whole_files import read_dosages

# A stand-in records its arguments and copies the panel to the output file that they name.
STAND_IN = {
    "beagle": 'for word in "$@"; do case $word in out=*) cp "$PANEL" "${word#out=}.vcf.gz";; esac; done',
    "minimac4": 'while [ $# -gt 1 ]; do [ "$1" = -o ] && cp "$PANEL" "$2"; shift; done',
}


@pytest.fixture
def programs(tmp_path: Path, simulated: DefaultData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of stand-ins for the tools, on a PATH with nothing else but the shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_IN.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/calls\n{body}\n', encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.setenv("PANEL", str(simulated.panel))
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return folder


def test_every_tool_gets_panel_target_and_map(programs: Path, tmp_path: Path, simulated: DefaultData) -> None:
    found = impute_with_tools(simulated.panel, simulated.target, simulated.genetic_map, tmp_path / "work", 3)
    assert list(found) == ["beagle", "minimac4"]
    assert all(path.read_bytes() == simulated.panel.read_bytes() for path in found.values())
    beagle, converted, minimac = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    genetic_map = tmp_path / "work" / "genetic.map"
    for word in (f"ref={simulated.panel}", f"gt={simulated.target}", f"map={genetic_map}", "gp=true", "nthreads=3"):
        assert word in beagle.split()
    assert converted.split()[1:3] == ["--compress-reference", str(simulated.panel)]
    assert minimac.split()[1:3] == [converted.split()[-1], str(simulated.target)]
    assert f"--map {genetic_map}" in minimac and "-t 3" in minimac
    bp = np.linspace(1000, 2_000_000, 7)
    written, given = (GeneticMap.read(path)._interpolate("1", bp) for path in (genetic_map, simulated.genetic_map))
    assert written == pytest.approx(given, abs=1e-7)


def test_a_missing_program_is_left_out_and_none_is_an_error(
    programs: Path, tmp_path: Path, simulated: DefaultData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{programs}")
    (programs / "beagle").unlink()
    assert [name for name in TOOLS if shutil.which(name)] == ["minimac4"]
    (programs / "minimac4").unlink()
    with pytest.raises(UserError, match="neither beagle nor minimac4 is installed"):
        impute_with_tools(simulated.panel, simulated.target, None, tmp_path / "work", 1)


def test_a_program_that_fails_is_an_error_with_its_last_line(
    programs: Path, tmp_path: Path, simulated: DefaultData
) -> None:
    (programs / "beagle").write_text("#!/bin/sh\necho starting\necho no memory >&2\nexit 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"beagle ended with 3 \(no memory\); see .*beagle\.out"):
        impute_with_tools(simulated.panel, simulated.target, None, tmp_path / "work", 1)


@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="beagle and minimac4 are not installed")
def test_the_real_programs_impute(tmp_path: Path, simulated: DefaultData) -> None:
    found = impute_with_tools(simulated.panel, simulated.target, simulated.genetic_map, tmp_path, 1)
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
    with pytest.raises(UserError, match=rf"beagle ended with 1 \(.*{why}[^()]*\); see .*beagle\.out"):
        impute_with_tools(simulated.panel, simulated.target, None, tmp_path / "work", 1)


def test_the_map_has_the_contigs_of_a_panel_without_contig_lines(tmp_path: Path) -> None:
    names = "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", "A"])
    panel, genetic_map = tmp_path / "panel.vcf", tmp_path / "map"
    panel.write_text(f"##fileformat=VCFv4.2\n{names}\nchr7\t10\t.\tA\tC\t.\t.\t.\tGT\t0|1\n", encoding="utf-8")
    genetic_map.write_text("7 . 0.5 1000\n7 . 1.5 900000\n", encoding="utf-8")
    assert plink_map(genetic_map, panel, tmp_path).read_text(encoding="utf-8").startswith("chr7\t.\t0.5")
