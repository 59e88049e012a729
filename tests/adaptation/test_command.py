"""``embrag impute`` with a model that adapts: records, report, saved model, and panels with little to learn from."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from embrag_ds.adaptation import adapt
from embrag_ds.adaptation.learner import HeldOutScores, Learner
from embrag_ds.adaptation.settings import Adapt
from embrag_ds.cli.main import main
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.simulate import DefaultData
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.evaluation.metrics import DISJOINT_BINS, AggregateR2
from embrag_ds.export import PRETRAINED, ExportedModel, read_export, write_export
from embrag_ds.imputation.impute import impute
from embrag_ds.imputation.preparation import TargetOptions
from embrag_ds.training.trainer import Trainer
from tests.whole_files import PhasedData, read_phased

MakeModel = Callable[..., ExportedModel]
SOME = 0.033
"""Minutes that give the tiny network 42 steps, and the shipped one without its transformer 21."""


class Run(NamedTuple):
    """What was written: the records, as text, and the section of the report."""

    records: list[str]
    adaptation: dict[str, Any]


RunImpute = Callable[..., Run]


@pytest.fixture
def model_file(make_model: MakeModel, tmp_path: Path) -> Path:
    return saved(make_model(), tmp_path / "tiny.safetensors")


def saved(model: ExportedModel, path: Path) -> Path:
    write_export(path, model)
    return path


def records_of(path: Path) -> list[str]:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.fixture
def run(simulated: DefaultData, model_file: Path, tmp_path: Path) -> RunImpute:
    """Function that imputes the simulated targets with the tiny model, in an own cache unless it is named."""
    number = iter(range(99))

    def impute_one(
        how: Adapt, cache: str | None = None, files: PanelFiles | None = None, target: Path | None = None, **given: Any
    ) -> Run:
        place = tmp_path / f"run{next(number)}"
        place.mkdir()
        options = TargetOptions(report=place / "report.json", **given.pop("options", {}))
        impute(
            files or PanelFiles(simulated.panel, simulated.genetic_map, simulated.samples),
            target or simulated.target,
            place / "out.vcf.gz",
            options=options,
            device="cpu",
            adapt=how,
            cache_dir=tmp_path / (cache or f"cache-{place.name}"),
            **{"model": model_file, "transformer": False, **given},
        )
        report = json.loads(
            (place / "report.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON")
        )
        return Run(records_of(place / "out.vcf.gz"), report["adaptation"])

    return impute_one


def mean_r2(simulated: DefaultData, records: list[str], typed: set[tuple[str, int, str, str]]) -> dict[str, float]:
    """Aggregate r2 by MAF bin of DS at sites that were not typed, and their mean."""
    truth, panel = read_phased(simulated.truth), read_phased(simulated.panel)
    rows = {site: number for number, site in enumerate(truth.sites.identities())}
    dosage, chosen, frequency = [], [], []
    for line, alleles in zip(records, panel.alleles, strict=True):
        fields = line.split("\t")
        site = (fields[0], int(fields[1]), fields[3], fields[4])
        if site not in typed:
            chosen.append(rows[site])
            dosage.append([float(call.split(":")[1]) for call in fields[9:]])
            frequency.append(alleles.mean())
    tally = AggregateR2(len(truth.samples))
    counts = (truth.alleles[:, 0::2] + truth.alleles[:, 1::2])[chosen].astype(float)
    tally.add(counts, np.array(dosage), np.array(frequency))
    found = tally.result()
    return {"mean": float(np.nanmean([found[name] for name in DISJOINT_BINS])), "all": found["all"]}


@pytest.mark.parametrize("transformer", [True, False])
def test_off_gives_the_records_of_the_model_as_it_is(
    run: RunImpute, transformer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = run("off", transformer=transformer)
    assert off.adaptation == {"adapt": "off"}
    monkeypatch.setattr(
        "embrag_ds.adaptation.adapt.adapt_model", lambda source, model, how, cache: adapt.Adapted(model, {})
    )
    assert run("auto", transformer=transformer).records == off.records


def test_a_model_that_adapted_imputes_better(
    run: RunImpute, simulated: DefaultData, make_model: MakeModel, tmp_path: Path
) -> None:
    typed = set(read_phased(simulated.target).sites.identities())
    model = saved(make_model("embrag.retrieval.k=64"), tmp_path / "more.safetensors")
    off, adapted = (run(how, model=model) for how in ("off", 0.1))
    assert adapted.adaptation["kept"] and adapted.records != off.records
    assert adapted.adaptation["map_scale"] in (1.0, pytest.approx(10**0.5)), "the panel is tiny, its map right"
    before, after = (mean_r2(simulated, each.records, typed) for each in (off, adapted))
    assert after["all"] > before["all"] - 0.0005 and after["mean"] > before["mean"] + 0.003, (before, after)
    assert adapted.adaptation["before"]["loss"] > adapted.adaptation["after"]["loss"]
    assert set(adapted.adaptation) == {
        *("adapt", "kept", "steps", "windows", "samples", "held_out_samples", "map_scale", "dependence"),
        *("before", "after", "head"),
    }


def test_a_wrong_map_costs_the_shipped_model_nothing(run: RunImpute, simulated: DefaultData, tmp_path: Path) -> None:
    typed = set(read_phased(simulated.target).sites.identities())
    lines = [line.split() for line in simulated.genetic_map.read_text().splitlines()]
    thirtyfold = tmp_path / "long.map"
    thirtyfold.write_text("".join(f"{contig} {name} {30 * float(cm)} {pos}\n" for contig, name, cm, pos in lines))
    right, wrong = (
        PanelFiles(simulated.panel, each, simulated.samples) for each in (simulated.genetic_map, thirtyfold)
    )
    chosen_runs = (("off", right), ("off", wrong), (SOME, wrong))
    runs = [run(how, files=files, model=PRETRAINED) for how, files in chosen_runs]
    best, unscaled, scaled = (mean_r2(simulated, each.records, typed) for each in runs)
    assert runs[2].adaptation["kept"] and 1 / 90 < runs[2].adaptation["map_scale"] < 3.2 / 30
    for name, loss in (("mean", 0.03), ("all", 0.01)):
        assert unscaled[name] < best[name] - loss and scaled[name] > best[name] - 0.005, (best, unscaled, scaled)


def test_a_model_that_got_no_better_imputes_as_it_was(run: RunImpute, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Learner.scores, iter(range(9))

    def worse(self: Learner) -> HeldOutScores:
        found = real(self)
        return replace(found, loss=found.loss + next(calls) % 2)

    monkeypatch.setattr(Learner, "scores", worse)
    found = run(SOME)
    assert found.adaptation["kept"] is False and found.adaptation["steps"] >= 20
    assert found.records == run("off").records


def test_parts_and_repeats_use_the_same_model(run: RunImpute, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(SOME, cache="one")
    assert whole.adaptation["kept"] and whole.records != run("off").records
    middle = int(whole.records[len(whole.records) // 2].split("\t")[1])
    with caplog.at_level(logging.INFO, logger="embrag_ds"):
        again = run(SOME, cache="one")
        parts = [run(SOME, cache="one", options={"region": f"1:{each}"}) for each in (f"1-{middle}", f"{middle + 1}-")]
        assert sum("was adapted to this panel and these sites before" in each for each in caplog.messages) == 3
    assert again == whole and parts[0].records + parts[1].records == whole.records
    # A machine that imputes one part only adapts anew, to the same.
    assert run(SOME, cache="two", options={"region": f"1:{middle + 1}-"}).records == parts[1].records


def test_targets_of_the_same_sites_use_the_same_model(
    run: RunImpute, simulated: DefaultData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their names and alleles are: a cohort in batches is imputed by one model."""
    first = run(SOME, cache="one")
    target = read_phased(simulated.target)
    others = replace(target, samples=tuple(f"other{name}" for name in target.samples), alleles=target.alleles[:, ::-1])
    monkeypatch.setattr(Learner, "learn", lambda self, steps: pytest.fail("it learnt again"))
    found = run(SOME, cache="one", target=written(others, tmp_path / "others.vcf"))
    assert found.adaptation == first.adaptation and found.records != first.records


def written(data: PhasedData, path: Path, haploid: frozenset[int] = frozenset()) -> Path:
    """Write a file in plain text, where samples numbered ``haploid`` have one allele a site."""
    rows = ["##fileformat=VCFv4.2", *(f"##contig=<ID={name}>" for name in data.sites.contigs)]
    rows.append('##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">')
    rows.append("\t".join(["#CHROM", *["POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT"], *data.samples]))
    for number, (contig, pos, ref, alt) in enumerate(data.sites.identities()):
        pairs = data.alleles[number].reshape(-1, 2).tolist()
        calls = [str(one) if sample in haploid else f"{one}|{two}" for sample, (one, two) in enumerate(pairs)]
        rows.append("\t".join([contig, str(pos), ".", ref, alt, ".", ".", ".", "GT", *calls]))
    path.write_text("\n".join([*rows, ""]))
    return path


def chosen(data: PhasedData, samples: list[int], sites: np.ndarray | None = None) -> PhasedData:
    """Some samples of a file, at some of its sites."""
    columns = [number for sample in samples for number in (2 * sample, 2 * sample + 1)]
    kept = np.ones(len(data.sites), dtype=bool) if sites is None else sites
    rows = np.flatnonzero(kept)
    table = replace(
        data.sites,
        contig=data.sites.contig[rows],
        pos=data.sites.pos[rows],
        **{name: [getattr(data.sites, name)[row] for row in rows] for name in ("ref", "alt", "id")},
    )
    alleles = np.ascontiguousarray(data.alleles[rows][:, columns])
    return replace(data, sites=table, samples=tuple(data.samples[sample] for sample in samples), alleles=alleles)


def on_two_contigs(data: PhasedData, at: int) -> PhasedData:
    """The same, where the sites from position ``at`` on lie on a second contig."""
    sites = data.sites
    contig = (sites.pos >= at).astype(np.int32)
    return replace(data, sites=replace(sites, contigs=("1", "2"), contig_lengths=(0, 0), contig=contig))


class Odd(NamedTuple):
    """Files of a panel with something odd, and what the report must then say."""

    panel: Path
    target: Path
    options: dict[str, Any]
    expected: dict[str, Any]


TOO_FEW = "the panel has {} samples to learn from"
NO_WINDOW = "no window has 10 typed sites and a site to predict"


def odd(name: str, simulated: DefaultData, folder: Path) -> Odd:
    panel, target = read_phased(simulated.panel), read_phased(simulated.target)
    samples, sites, allowed = list(range(60)), None, {"allow_overlap": True}
    haploid: frozenset[int] = frozenset()
    options: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    word, _, number = name.partition(" ")
    if word == "samples":
        samples = list(range(0, 60, 60 // int(number)))[: int(number)]
        expected = {"left_alone": TOO_FEW.format(number)} if int(number) < 12 else {"total": int(number)}
    elif word == "haploid":
        samples, haploid, expected = samples[:30], frozenset(range(0, 30, 2)), {"total": 30}
    elif word == "sites":
        sites, expected = np.arange(len(target.sites)) % 12 == 0, {"left_alone": NO_WINDOW}
    elif word == "everything":
        truth = read_phased(simulated.truth)
        target, expected = truth, {"left_alone": NO_WINDOW}
    elif word == "contig":
        middle = int(panel.sites.pos[len(panel.sites) // 2])
        panel = on_two_contigs(panel, middle)
        target = chosen(target, list(range(9)), target.sites.pos < middle)
        options, expected = {"untyped_contigs": "frequency"}, {"total": 60, "windows": 3}
    elif word == "overlap":
        overlapping = {"all": list(range(60)), "most": list(range(49)), "some": [3, 17, 40]}[number]
        known = set(target.sites.identities())
        typed = np.array([site in known for site in panel.sites.identities()])
        target, options = chosen(panel, overlapping, typed), allowed
        left = 60 - len(overlapping)
        expected = {"left_alone": TOO_FEW.format(left)} if left < 12 else {"total": left}
    elif word == "monomorphic":
        panel = replace(panel, alleles=np.zeros_like(panel.alleles))
        expected = {"left_alone": NO_WINDOW}
    target = target if sites is None else chosen(target, list(range(9)), sites)
    paths = folder / "panel.vcf", folder / "target.vcf"
    return Odd(written(chosen(panel, samples), paths[0], haploid), written(target, paths[1]), options, expected)


ODD = [
    *("samples 3", "samples 11", "samples 12", "samples 20", "haploid males", "sites few", "everything typed"),
    *("contig untyped", "overlap all", "overlap most", "overlap some", "monomorphic panel"),
]


@pytest.mark.parametrize("name", ODD)
def test_odd_panels_are_adapted_to_or_left_alone_with_a_word(
    run: RunImpute,
    simulated: DefaultData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(adapt, "steps_within", lambda *given: 3)
    panel, target, options, expected = odd(name, simulated, tmp_path)
    with caplog.at_level(logging.INFO, logger="embrag_ds"):
        found = run("auto", files=PanelFiles(panel), target=target, options=options)
    assert len(found.records) == len(read_phased(panel).sites if "haploid" not in name else found.records)
    report = found.adaptation
    assert report["adapt"] == "auto" and isinstance(report["kept"], bool)
    if "left_alone" in expected:
        assert report == {"adapt": "auto", "kept": False, "left_alone": expected["left_alone"]}
        assert f"the model is not adapted to the panel: {expected['left_alone']}" in caplog.messages
        assert found.records == run("off", files=PanelFiles(panel), target=target, options=options).records
    else:
        assert report["samples"] + report["held_out_samples"] == expected["total"] and report["steps"] == 3
        assert report["held_out_samples"] >= 1 and report["windows"] == expected.get("windows", report["windows"])
        assert any("adapting the model to the panel" in each for each in caplog.messages)


def test_a_panel_of_one_window(run: RunImpute, make_model: MakeModel, tmp_path: Path) -> None:
    model = saved(make_model("embrag.data.window_sites=4096"), tmp_path / "wide.safetensors")
    found = run(SOME, model=model)
    assert found.adaptation["windows"] == 1 and found.adaptation["steps"] >= 20


def test_a_saved_model_imputes_the_same_and_trains_on(
    run: RunImpute,
    simulated: DefaultData,
    tmp_path: Path,
    make_config: Callable[..., Any],
    distributed: DistributedContext,
    inputs: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = PanelFiles(simulated.panel, samples=simulated.samples, cm_per_mb=30.0)
    path = tmp_path / "saved.safetensors"
    found = run(SOME, files=long, save_model=path)
    assert found.adaptation["kept"] and found.adaptation["map_scale"] < 1
    off = run("off", files=long, model=path)
    assert off.records == found.records
    # One that is not adapted is written as well.
    run("off", save_model=tmp_path / "copy.safetensors")
    start, copy = read_export(tmp_path / "tiny.safetensors"), read_export(tmp_path / "copy.safetensors")
    assert all(torch.equal(value, copy.weights[name]) for name, value in start.weights.items())

    scale = read_export(path).config.data.map_scale
    assert scale == found.adaptation["map_scale"]
    for settings in ([], [f"embrag.data.map_scale={scale!r}"]):
        config = make_config("embrag.data.flank_sites=64", *settings)
        caplog.clear()
        Trainer(config, inputs, tmp_path / f"train{len(settings)}", distributed, resume=False, init_from=path)
        warned = [each.getMessage() for each in caplog.records if "map_scale" in each.getMessage()]
        assert len(warned) == 1 - len(settings)
        assert all(f"--set embrag.data.map_scale={scale!r}" in each for each in warned)


@pytest.fixture
def handler() -> Iterator[None]:
    """The command's handler of SIGTERM is taken back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("where", ["panel", "target", "model", "missing"])
def test_a_model_is_saved_over_no_input_and_in_no_missing_folder(
    handler: None,
    simulated: DefaultData,
    model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    given = {"panel": simulated.panel, "target": simulated.target, "model": model_file}
    before = {path: path.read_bytes() for path in given.values()}
    place = given.get(where, tmp_path / "none" / "model.safetensors")
    arguments = ["impute", f"--out={tmp_path / 'out.vcf.gz'}", f"--save-model={place}"]
    arguments += [f"--{name}={path}" for name, path in given.items()] + [f"--cache-dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit) as ended:
        main(arguments=arguments)
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    if where == "missing":
        assert f"the folder {place.parent} does not exist" in line
    else:
        assert line.startswith(
            f"error: {place}: --save-model is the same file as --{where} {place}, which would be lost"
        )
    assert {path: path.read_bytes() for path in given.values()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"tiny.json", "tiny.safetensors"}


@pytest.mark.parametrize("how", [0.0, -1.0, float("nan"), float("inf"), 1441.0, "x"])
def test_python_callers_get_the_same_error(run: RunImpute, how: Any) -> None:
    with pytest.raises(UserError, match=r"^--adapt .*: give auto, off, or minutes of two cores"):
        run(how)


KILLED = """
import sys, time
from embrag_ds.adaptation.fitting import Fit
from embrag_ds.cli.main import main
real = Fit.step
def step(self, number, loss):
    real(self, number, loss)
    if number == 3:
        print("ready", flush=True)
        time.sleep(60)
Fit.step = step
main()
"""


@pytest.mark.long
def test_a_command_killed_while_it_adapts_leaves_nothing(
    run: RunImpute, simulated: DefaultData, model_file: Path, root: Path, tmp_path: Path
) -> None:
    folder, cache = tmp_path / "results", tmp_path / "cache"
    folder.mkdir()
    arguments = ["impute", f"--out={folder / 'out.vcf.gz'}", f"--save-model={folder / 'model.safetensors'}"]
    arguments += [f"--report={folder / 'report.json'}", f"--adapt={SOME}", "--device=cpu", f"--cache-dir={cache}"]
    arguments += [f"--panel={simulated.panel}", f"--map={simulated.genetic_map}", f"--samples={simulated.samples}"]
    arguments += [f"--target={simulated.target}", f"--model={model_file}"]
    command = [sys.executable, "-c", KILLED, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert not list(cache.glob("adapted-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert list(folder.iterdir()) == []
    left = {path.name.partition("-")[0] for path in cache.iterdir() if not path.name.endswith(".lock")}
    assert left == {path.name.partition("-")[0] for path in cache.iterdir() if path.name.startswith("panel")}
    found = run(SOME, cache="cache")
    assert found.adaptation["steps"] >= 20 and len(list(cache.glob("adapted-*"))) == 1
