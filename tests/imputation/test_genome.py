"""Several panel files and several files of targets in one command."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.cli.main import make_parser
from embrag_ds.cli.panel_options import several_panel_files
from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelFiles, PanelInputs
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.targets import Targets
from embrag_ds.dependence import Dependence
from embrag_ds.errors import UserError
from embrag_ds.export import write_export
from embrag_ds.imputation import genome as genome_module
from embrag_ds.imputation.genome import NO_MATCH, keep_targets, kept_targets, some_sites
from embrag_ds.imputation.impute import _of_rank, impute
from embrag_ds.imputation.preparation import TargetOptions
from embrag_ds.imputation.ranks import Ranks
from embrag_ds.runs.meeting import Meeting
from embrag_ds.variants.output import OutputOptions
from tests.imputation.genomes import GenomeFiles, simulate_genome
from tests.untrained import untrained
from tests.variants.imputed_files import lines_of

MakeConfig = Callable[..., RunConfig]
Run = Callable[..., Path]


@pytest.fixture(scope="session")
def genome(tmp_path_factory: pytest.TempPathFactory) -> GenomeFiles:
    return simulate_genome(tmp_path_factory.mktemp("genome"))


@pytest.fixture
def run(genome: GenomeFiles, make_config: MakeConfig, tmp_path: Path, cache_dir: Path) -> Run:
    """Function that imputes by the places of panel files and of targets, and returns the output.

    The model has no Good-Turing correction, which depends on all sites of a panel file.
    """
    model = untrained(make_config("embrag.model.good_turing=false"), head=0.3)
    write_export(tmp_path / "m.safetensors", replace(model, dependence=Dependence(0.3, 0.0)))

    def run(name: str, panels: tuple[int, ...], targets: tuple[int, ...] | tuple[Path, ...], **given: Any) -> Path:
        files = [PanelFiles(genome.panels[each], genome.maps[each]) for each in panels]
        paths = [genome.targets[each] if isinstance(each, int) else each for each in targets]
        how: dict[str, Any] = {"model": tmp_path / "m.safetensors", "adapt": "off", "cache_dir": cache_dir}
        impute(files, paths, tmp_path / name, **{**how, **given})
        return tmp_path / name

    return run


@pytest.mark.parametrize("ending", ["vcf.gz", "bcf"])
def test_several_files_give_what_one_file_of_all_contigs_gives(run: Run, ending: str) -> None:
    whole = run(f"whole.{ending}", (2,), (2,))
    for panels, targets in (((0, 1), (2,)), ((0, 1), (0, 1)), ((0, 1), (1, 0)), ((2,), (0, 1)), ((2,), (1, 0))):
        parts = run(f"parts.{ending}", panels, targets)
        assert parts.read_bytes() == whole.read_bytes()
        index = ".csi" if ending == "bcf" else ".tbi"
        assert Path(f"{parts}{index}").read_bytes() == Path(f"{whole}{index}").read_bytes()


def test_each_file_is_imputed_as_it_would_be_alone_and_in_the_order_of_the_panels(run: Run, tmp_path: Path) -> None:
    joined = OutputOptions(join_multiallelic=True, formats=("GT", "DS"))
    alone = [lines_of(run("alone.vcf.gz", (each,), (each,), output=joined)) for each in (1, 0)]
    both = lines_of(run("both.vcf.gz", (1, 0), (2,), output=joined))
    records = [line for lines in alone for line in lines if not line.startswith(b"#")]
    assert [line for line in both if not line.startswith(b"#")] == records
    assert [line.split(b"\t")[0] for line in (records[0], records[-1])] == [b"2", b"1"]


def test_a_region_needs_one_file(run: Run) -> None:
    region = TargetOptions(region="chr2:20,000-50,000")
    whole = run("whole.vcf.gz", (2,), (2,), options=region)
    assert run("parts.vcf.gz", (0, 1), (2,), options=region).read_bytes() == whole.read_bytes()
    assert len(lines_of(whole)) > 20
    with pytest.raises(UserError, match=r"^--region 3: no such region of .*0-panel.vcf, .*1-panel.vcf, whose contigs"):
        run("parts.vcf.gz", (0, 1), (2,), options=TargetOptions(region="3"))


def test_a_report_has_every_file_and_the_excluded_sites_those_of_all(
    run: Run, genome: GenomeFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = genome.targets[2].read_bytes().splitlines(keepends=True)
    third = lines[-1].split(b"\t", 2)
    (tmp_path / "t.vcf").write_bytes(b"".join([*lines, b"3\t7\t" + third[2], b"3\t9\t" + third[2]]))
    options = TargetOptions(report=tmp_path / "r.json", excluded=tmp_path / "x.tsv")
    run("out.vcf.gz", (0, 1), (tmp_path / "t.vcf",), options=options)
    report = json.loads((tmp_path / "r.json").read_text())
    assert [Path(each["panel"]["file"]).name for each in report["files"]] == ["0-panel.vcf", "1-panel.vcf"]
    assert all(each["harmonisation"]["dropped"] == {} for each in report["files"])
    assert [each["typed_sites"] for each in report["files"]] == [each["target"]["sites"] for each in report["files"]]
    assert report["targets"] == [{"file": str(tmp_path / "t.vcf"), "sites_without_panel": 2}]
    assert report["adaptation"] == {"adapt": "off"}
    excluded = [line.split("\t") for line in (tmp_path / "x.tsv").read_text().splitlines()[1:]]
    assert [(*each[:3], each[-1]) for each in excluded] == [
        ("target", "3", "7", "contig not in the panel"),
        ("target", "3", "9", "contig not in the panel"),
    ]
    warned = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert f"{tmp_path / 't.vcf'}: 2 sites on 3, which no panel has, are left out" in warned


def test_a_panel_file_without_targets_is_left_out_or_gets_frequencies(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    dropped = run("dropped.vcf.gz", (0, 1), (1,))
    assert "what --target names is not typed on 1, which 107 sites of " in caplog.text
    alone = run("alone.vcf.gz", (1,), (1,))
    assert lines_of(dropped) == lines_of(alone)
    filled = run("filled.vcf.gz", (0, 1), (1,), options=TargetOptions(untyped_contigs="frequency"))
    whole = run("whole.vcf.gz", (2,), (1,), options=TargetOptions(untyped_contigs="frequency"))
    assert filled.read_bytes() == whole.read_bytes() and len(lines_of(filled)) > len(lines_of(alone))


def test_one_model_adapts_to_the_file_with_the_most_typed_sites(
    run: Run, genome: GenomeFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "embrag_ds")
    seen: list[str] = []

    def adapt(source: Any, model: Any, how: Any, cache: Path) -> Any:
        seen.append(source.inputs.panel.path.name)
        return type("Adapted", (), {"model": model, "report": {"adapt": how}})

    monkeypatch.setattr("embrag_ds.adaptation.adapt.adapt_model", adapt)
    run("out.vcf.gz", (0, 1), (2,), adapt="auto")
    assert seen == ["1-panel.vcf"]
    assert f"it adapts to the one with the most typed sites, {genome.panels[1]}" in caplog.text


def refused(run: Run, *given: Any, **named: Any) -> str:
    with pytest.raises(UserError) as caught:
        run("out.vcf.gz", *given, **named)
    text = str(caught.value)
    assert "\n" not in text and ";" in text
    return text


def test_what_does_not_belong_together_is_refused(run: Run, genome: GenomeFiles, tmp_path: Path) -> None:
    assert refused(run, (0, 2), (2,)).startswith(f"{genome.panels[2]}: its contig 1 is in {genome.panels[0]}, too; ")
    assert refused(run, (0, 1), (2, 0)).startswith(f"{genome.targets[0]}: its contig 1 is in {genome.targets[2]}, too")
    assert "no panel file has a contig of it: its contigs are 2 and the panels' 1; " in refused(run, (0,), (0, 1))
    text = genome.targets[1].read_text()
    last = text.split("FORMAT", 2)[-1].split("\n")[0].split("\t")[-1]
    (tmp_path / "other.vcf").write_text(text.replace(last, "another"))
    assert f"other.vcf: its samples are not those of {genome.targets[0]} in the same order" in refused(
        run, (0, 1), (genome.targets[0], tmp_path / "other.vcf")
    )
    (tmp_path / "p.vcf").write_text(genome.panels[1].read_text().replace("ID=1,length=60000", "ID=1,length=7"))
    files = [PanelFiles(genome.panels[0]), PanelFiles(tmp_path / "p.vcf")]
    with pytest.raises(UserError, match="its header has contig 1 with 7 bp, and another panel file with 60000; give"):
        impute(files, genome.targets[2], tmp_path / "out.vcf.gz", adapt="off", cache_dir=tmp_path / "cache")
    (tmp_path / "far.vcf").write_text(genome.targets[1].read_text().replace("\n2\t", "\n2\t9"))
    fault = refused(run, (0, 1), (genome.targets[0], tmp_path / "far.vcf"))
    assert "far.vcf: no site in common with " in fault and fault.endswith(f"; or leave {genome.panels[1]} out")
    assert refused(run, (0, 1), (Path("/dev/stdin"),)).startswith("/dev/stdin: of several files each is read more")
    assert not (tmp_path / "out.vcf.gz").exists()


def test_maps_are_one_for_all_or_one_for_each(genome: GenomeFiles) -> None:
    def files(*given: str) -> list[PanelFiles]:
        options = make_parser().parse_args(["impute", "--out=o.vcf.gz", "--target", "t.vcf", *given])
        return several_panel_files(options)

    panels = ["--panel", "a.vcf", "b.vcf"]
    assert [each.genetic_map for each in files(*panels, "--map", "m")] == [Path("m"), Path("m")]
    assert [each.genetic_map for each in files(*panels, "--map", "m", "n")] == [Path("m"), Path("n")]
    assert [(each.panel, each.genetic_map) for each in files(*panels)] == [(Path("a.vcf"), None), (Path("b.vcf"), None)]
    assert files() == [PanelFiles()]
    with pytest.raises(UserError, match="--map names 3 files and --panel 2: give one map for all, or one for each"):
        files(*panels, "--map", "m", "n", "o")


def test_targets_are_kept_with_what_they_lack_and_with_their_ploidy(tmp_path: Path) -> None:
    samples, size, rng = 5, 40, np.random.default_rng(2)
    rows = np.array([3, 1, 7, 5, 6])
    packed, missing = (rng.integers(256, size=(9, 2), dtype=np.uint8) for _ in range(2))
    ploidy = Ploidy(np.array([0, 12]), rng.random((2, samples)) < 0.5)
    sites = np.array([0, 8, 9, 20, 39])
    typed = np.isin(np.arange(size), sites)
    swapped = rng.random(5) < 0.5
    targets = Targets(tuple("abcde"), typed, sites, packed, rows, swapped, missing, ploidy, NO_MATCH)
    for number, each in enumerate((targets, replace(targets, missing=None, ploidy=None))):
        keep_targets(each, tmp_path / str(number))
        kept = kept_targets(tmp_path / str(number), targets.samples, size)
        span, some = slice(2, 40), slice(1, 4)
        np.testing.assert_array_equal(kept.typed, typed)
        np.testing.assert_array_equal(kept.alleles(span, some), each.alleles(span, some))
        assert (kept.missing_alleles(span, some) is None) == (kept.haploid(span) is None) == bool(number)
        if not number:
            np.testing.assert_array_equal(kept.missing_alleles(span, some), each.missing_alleles(span, some))
            np.testing.assert_array_equal(kept.haploid(span), each.haploid(span))


@pytest.mark.parametrize("chosen", [[3, 4, 5, 6], [0, 3, 4, 11], [11]])
def test_some_sites_of_a_file_have_their_alleles_and_ploidy(inputs: PanelInputs, chosen: list[int]) -> None:
    whole = inputs.panel
    ploidy = Ploidy(np.array([0, 4, 9]), np.random.default_rng(3).random((3, len(whole.samples))) < 0.5)
    rows = np.array(chosen)
    some = some_sites(replace(whole, ploidy=ploidy, missing=whole.packed), rows)
    assert list(some.sites.identities()) == [list(whole.sites.identities())[row] for row in chosen]
    np.testing.assert_array_equal(some.packed, whole.packed[rows])
    np.testing.assert_array_equal(some.missing, whole.packed[rows])
    assert some.ploidy is not None and some.unphased is None
    np.testing.assert_array_equal(some.ploidy.at(np.arange(len(rows))), ploidy.at(rows))


def test_a_rank_takes_the_gpu_with_its_number_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ranks = Ranks(Meeting(3, 8, torch.distributed.HashStore()))
    assert [_of_rank(each, ranks) for each in ("cuda", "cpu", "cuda:1")] == ["cuda:3", "cpu", "cuda:1"]
    assert _of_rank("cuda", Ranks(Meeting(0, 1, None))) == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task 1
    assert _of_rank("cuda", ranks) == "cuda:0"


def test_one_panel_file_is_open_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = genome_module.open_inputs
    known: list[weakref.ref[Any]] = []

    def one(*given: Any) -> Any:
        gc.collect()
        assert not [each for each in known if each() is not None]
        inputs = opened(*given)
        known.append(weakref.ref(inputs.panel))
        return inputs

    monkeypatch.setattr(genome_module, "open_inputs", one)
    run("out.vcf.gz", (0, 1), (0, 1))
    assert len(known) == 6
