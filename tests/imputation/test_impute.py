"""Imputation: its output, which does not depend on batches, and its windows."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pysam.bcftools
import pytest
import torch

from embrag_ds.cli.main import main
from embrag_ds.config import RunConfig, parse_config
from embrag_ds.config_files import read_tree
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.data.panel import Panel
from embrag_ds.data.simulate import DefaultData
from embrag_ds.data.targets import Targets, match_targets, open_targets
from embrag_ds.data.windows import DataConfig, Window
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.evaluation.metrics import AggregateR2
from embrag_ds.export import MODEL_FILE, ExportedModel, read_export
from embrag_ds.imputation import engine
from embrag_ds.imputation import impute as imputation_module
from embrag_ds.imputation.computing import blending, windows
from embrag_ds.imputation.engine import Imputation, impute_to_vcf
from embrag_ds.imputation.impute import impute
from embrag_ds.ops import cuda
from embrag_ds.retrieval import codebooks
from embrag_ds.retrieval.codebooks import Encoder
from embrag_ds.retrieval.fastest import FirstSearch
from embrag_ds.training.trainer import Trainer
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable
from tests.cuda_rules import Machine
from tests.untrained import untrained
from tests.whole_files import PhasedData, read_dosages, read_phased

MakeConfig = Callable[..., RunConfig]
CPU = "cpu"


@pytest.fixture(autouse=True)
def by_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows copy from their nearest haplotypes, as on a GPU without CuPy."""
    monkeypatch.setattr(engine, "_way", lambda *given: "windows")


@pytest.fixture
def model(make_config: MakeConfig) -> ExportedModel:
    return untrained(make_config(), head=0.3)


@pytest.fixture
def retrieval_alone(make_config: MakeConfig) -> ExportedModel:
    return untrained(make_config(), head=0.0)


def matched(target: PhasedData, path: Path, inputs: PanelInputs, overlap: bool) -> Targets:
    packed = np.packbits(target.alleles, axis=1, bitorder="little")
    panel = Panel(path, target.sites, target.samples, packed, target.skipped)
    return open_targets(panel, match_targets(panel, inputs.panel, "report", overlap), inputs.panel)


@pytest.fixture
def target(simulated: DefaultData) -> PhasedData:
    return read_phased(simulated.target)


def imputed(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, block: int = 4, overlap: bool = False
) -> list[tuple[int, np.ndarray]]:
    targets = matched(target, Path("target.vcf.gz"), inputs, overlap)
    return [(window.index, found) for window, found in Imputation(model, inputs, targets, CPU, block).windows()]


@pytest.fixture
def written(model: ExportedModel, inputs: PanelInputs, target: PhasedData, tmp_path: Path) -> Path:
    """Output file of the simulated targets, imputed by a random network."""
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    impute_to_vcf(Imputation(model, inputs, targets, CPU, 4), tmp_path / "out.vcf.gz")
    return tmp_path / "out.vcf.gz"


def test_every_panel_site_comes_out_in_order_and_typed_ones_unchanged(
    written: Path, inputs: PanelInputs, target: PhasedData
) -> None:
    found = read_dosages(written)
    assert found.samples == target.samples
    assert list(found.sites.identities()) == list(inputs.panel.sites.identities())
    row = {site: number for number, site in enumerate(inputs.panel.sites.identities())}
    typed = np.array([row[site] for site in target.sites.identities()])
    assert found.imputed is not None and found.haplotype_dosage is not None
    assert set(np.flatnonzero(~found.imputed)) == set(typed)
    np.testing.assert_array_equal(found.haplotype_dosage[typed], target.alleles)
    with pysam.VariantFile(str(written)) as records:
        genotypes = [[record.samples[name].allele_indices for name in target.samples] for record in records]
    np.testing.assert_array_equal(np.array(genotypes).reshape(len(row), -1)[typed], target.alleles)


def test_windows_are_blended_site_by_site(
    written: Path, model: ExportedModel, inputs: PanelInputs, target: PhasedData
) -> None:
    """Two windows that share n sites weigh (n - i) : (i + 1) at the i-th of them."""
    found = read_dosages(written)
    windows = model.config.data.windows(inputs.panel)
    outputs = dict(imputed(model, inputs, target))
    assert len(windows) == len(outputs) > 3 and found.haplotype_dosage is not None and found.imputed is not None
    shared, disagreeing = 0, 0
    for site in np.flatnonzero(found.imputed).tolist():
        here = [each for each in windows if each.core_start <= site < each.core_stop]
        values = [outputs[each.index][:, site - each.core_start] for each in here]
        if len(here) == 2:
            left, right = here
            size = left.core_stop - right.core_start
            weight = (site - right.core_start + 1) / (size + 1)
            expected = (1 - weight) * values[0] + weight * values[1]
            shared += 1
            disagreeing += bool(np.abs(values[0] - values[1]).max() > 0.01)
        else:
            (expected,) = values
        np.testing.assert_allclose(found.haplotype_dosage[site], expected, atol=0.00051)
    assert shared > 20 and disagreeing > 10


def test_every_window_is_said_at_least_to_those_who_debug(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="embrag_ds")
    imputation = Imputation(model, inputs, matched(target, Path("target.vcf.gz"), inputs, False), CPU, 4)
    impute_to_vcf(imputation, tmp_path / "out.vcf.gz")
    said = [each.getMessage() for each in caplog.records if each.name == blending.__name__]
    windows, sites = imputation.data.windows, len(inputs.panel.sites)
    ends = [each.core_start for each in windows[1:]] + [sites]
    every = [f"imputed window {number}/{len(windows)}, {end}/{sites} sites" for number, end in enumerate(ends, 1)]
    assert said == every


@pytest.mark.parametrize(("mode", "block"), [("embedding", 1), ("embedding", 4), ("embedding", 9), ("token", 9)])
def test_samples_do_not_depend_on_their_batch(
    make_config: MakeConfig, inputs: PanelInputs, target: PhasedData, mode: str, block: int
) -> None:
    model = untrained(make_config(f"embrag.retrieval.mode={mode}"), head=0.3)
    for (_, one), (_, other) in zip(
        imputed(model, inputs, target, 2), imputed(model, inputs, target, block), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_samples_do_not_depend_on_the_other_samples_imputed(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData
) -> None:
    alone = dataclasses.replace(target, samples=target.samples[4:5], alleles=target.alleles[:, 8:10])
    for (_, one), (_, all_of_them) in zip(imputed(model, inputs, alone), imputed(model, inputs, target), strict=True):
        np.testing.assert_allclose(one, all_of_them[8:10], atol=2e-5)


def exchanged(sites: SiteTable, rows: np.ndarray) -> SiteTable:
    """Sites with REF and ALT exchanged at ``rows``."""
    ref, alt = list(sites.ref), list(sites.alt)
    for row in rows.tolist():
        ref[row], alt[row] = alt[row], ref[row]
    return dataclasses.replace(sites, ref=ref, alt=alt)


def not_palindromic(sites: SiteTable) -> np.ndarray:
    """Rows whose alleles may be exchanged without a doubt about the strand."""
    pairs = zip(sites.ref, sites.alt, strict=True)
    return np.flatnonzero([f"{ref}{alt}" not in ("AT", "TA", "CG", "GC") for ref, alt in pairs])


def test_exchanged_alleles_mean_the_same(model: ExportedModel, inputs: PanelInputs, target: PhasedData) -> None:
    rows = not_palindromic(target.sites)[::2]
    alleles = target.alleles.copy()
    alleles[rows] = 1 - alleles[rows]
    other = dataclasses.replace(target, sites=exchanged(target.sites, rows), alleles=alleles)
    for (_, one), (_, two) in zip(imputed(model, inputs, target), imputed(model, inputs, other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_target_in_the_panel_is_refused_and_with_the_flag_never_copies_itself(
    retrieval_alone: ExportedModel, inputs: PanelInputs, target: PhasedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = read_phased(inputs.panel.path)
    row = {site: number for number, site in enumerate(panel.sites.identities())}
    typed = np.array([row[site] for site in target.sites.identities()])
    chosen = [5, 30]
    columns = [10, 11, 60, 61]
    own = dataclasses.replace(
        target, samples=tuple(panel.samples[each] for each in chosen), alleles=panel.alleles[typed][:, columns]
    )
    with pytest.raises(
        UserError, match=rf"target\.vcf\.gz: 2 samples are also in .*{sorted(own.samples)[0]}.*--allow-overlap"
    ):
        imputed(retrieval_alone, inputs, own)

    targets = matched(own, Path("target.vcf.gz"), inputs, True)
    imputation = Imputation(retrieval_alone, inputs, targets, CPU, 2)
    collate, copied = imputation._computing._collate, []

    def record(queries: Any, step: int) -> Any:
        batch = collate(queries, step)
        copied.append(batch.retrieved.ids // 2)
        return batch

    monkeypatch.setattr(imputation._computing, "_collate", record)
    list(imputation.windows())
    assert len(copied) == len(imputation.data.windows)
    for each in copied:
        assert not (each[:2] == 5).any() and not (each[2:] == 30).any()
    # Under another name nothing is excluded, and a sample retrieves itself (among identical haplotypes).
    copied.clear()
    renamed = Imputation(retrieval_alone, inputs, dataclasses.replace(targets, samples=("X", "Y")), CPU, 2)
    collate = renamed._computing._collate
    monkeypatch.setattr(renamed._computing, "_collate", record)
    list(renamed.windows())
    assert all((each[:2] == 5).any() and (each[2:] == 30).any() for each in copied)


def test_a_copy_of_panel_samples_is_recovered(
    retrieval_alone: ExportedModel, inputs: PanelInputs, target: PhasedData
) -> None:
    """The targets are panel samples under other names, so that the truth is known."""
    panel = read_phased(inputs.panel.path)
    row = {site: number for number, site in enumerate(panel.sites.identities())}
    typed = np.array([row[site] for site in target.sites.identities()])
    columns = np.concatenate([[2 * sample, 2 * sample + 1] for sample in range(0, 60, 5)])
    names = tuple(f"copy{number}" for number in range(12))
    copies = dataclasses.replace(target, samples=names, alleles=panel.alleles[typed][:, columns])
    untyped = np.setdiff1d(np.arange(len(panel.sites)), typed)
    windows = retrieval_alone.config.data.windows(inputs.panel)
    probability = np.empty((24, len(panel.sites)), dtype=np.float32)
    for number, values in imputed(retrieval_alone, inputs, copies):
        probability[:, windows[number].core_sites] = values
    truth = panel.alleles[:, columns].T
    called = probability > 0.5
    carried = truth[:, untyped] == 1
    assert (called == truth)[:, untyped].mean() > 0.97
    assert called[:, untyped][carried].mean() > 0.85
    most_common = panel.alleles.mean(axis=1) > 0.5
    assert (most_common == truth)[:, untyped].mean() < 0.93


def test_bcftools_reads_it_without_a_message(written: Path, inputs: PanelInputs) -> None:
    sites = len(inputs.panel.sites)
    assert Path(f"{written}.tbi").exists()
    text = pysam.bcftools.view(str(written))
    messages = [pysam.bcftools.view.get_messages()]
    assert sum(not line.startswith("#") for line in text.splitlines()) == sites
    first = inputs.panel.sites.pos[0]
    region = pysam.bcftools.view("-H", "-r", f"1:{first}-{inputs.panel.sites.pos[9]}", str(written))
    messages.append(pysam.bcftools.view.get_messages())
    assert len(region.splitlines()) == 10
    stats = pysam.bcftools.stats("-s", "-", str(written))
    messages.append(pysam.bcftools.stats.get_messages())
    assert f"number of records:\t{sites}\n" in stats
    pysam.bcftools.index("-f", "-c", str(written), catch_stdout=False)
    messages.append(pysam.bcftools.index.get_messages())
    pysam.bcftools.view("-Ob", "-o", f"{written}.bcf", str(written), catch_stdout=False)
    messages.append(pysam.bcftools.view.get_messages())
    assert [each for each in messages if each] == []
    assert len(read_dosages(Path(f"{written}.bcf")).sites) == sites


def test_an_interrupted_imputation_leaves_nothing(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    imputation = Imputation(model, inputs, targets, CPU, 4)
    whole = imputation.windows

    def interrupted(chosen: list[Window]) -> Any:
        for window, values in whole(chosen):
            if window.index == 3:
                raise KeyboardInterrupt
            yield window, values

    monkeypatch.setattr(imputation, "windows", interrupted)
    folder = tmp_path / "results"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        impute_to_vcf(imputation, folder / "out.vcf.gz")
    assert list(folder.iterdir()) == []


def test_windows_are_encoded_as_they_come(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If they were encoded ahead, all windows of a chromosome would take gigabytes."""
    encoded: list[int] = []
    encode = codebooks.encode_window

    def noted(encoder: Encoder, window: Window, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(window.index)
        return encode(encoder, window, device)

    monkeypatch.setattr(codebooks, "encode_window", noted)
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    imputation = Imputation(model, inputs, targets, CPU, 4)
    assert encoded == []
    for window, _ in imputation.windows():
        assert encoded == list(range(len(encoded))) and window.index < len(encoded) <= window.index + 3
    assert encoded == list(range(len(imputation.data)))


def test_a_dense_store_holds_one_generation(make_config: MakeConfig, inputs: PanelInputs, target: PhasedData) -> None:
    targets = matched(target, Path("target.vcf.gz"), inputs, False)

    def imputation(*settings: str) -> Imputation:
        dense = ["embrag.retrieval.store=dense", "embrag.retrieval.encoding=refresh"]
        return Imputation(untrained(make_config(*dense, *settings), head=0.0), inputs, targets, CPU, 4)

    data = imputation().data
    one = sum(map(len, data.windows)) * len(data.reference) * 16 * 4 / 2**30
    imputation(f"embrag.retrieval.dense_budget_gb={1.01 * one}")
    with pytest.raises(UserError, match="dense_budget_gb"):
        imputation(f"embrag.retrieval.dense_budget_gb={0.99 * one}")


def test_retrieval_runs_ahead_raises_its_failures_and_ends_with_its_reader(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ahead() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name == "retrieval-prefetch"]

    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    imputation = Imputation(model, inputs, targets, CPU, 4)
    reader = imputation.windows()
    next(reader)
    assert len(ahead()) == 1
    reader.close()
    assert ahead() == []

    def broken(queries: Any, step: int) -> Any:
        raise RuntimeError(f"window {queries.window}")

    monkeypatch.setattr(imputation._computing, "_collate", broken)
    with pytest.raises(RuntimeError, match="window 0"):
        list(imputation.windows())
    assert ahead() == []


def test_alleles_of_any_samples_and_sites_are_the_files(inputs: PanelInputs, target: PhasedData) -> None:
    rows = not_palindromic(target.sites)[[0, 3]]
    other = dataclasses.replace(target, sites=exchanged(target.sites, rows))
    targets = matched(other, Path("t.vcf.gz"), inputs, False)
    whole = np.zeros((18, len(inputs.panel.sites)), dtype=np.uint8)
    alleles = target.alleles.copy()
    alleles[rows] ^= 1
    whole[:, np.flatnonzero(targets.typed)] = alleles.T
    sites = len(inputs.panel.sites)
    for span in (slice(0, sites), slice(11, 12), slice(sites // 3, sites // 2)):
        for samples in (slice(0, 9), slice(1, 3), slice(3, 8), slice(8, 9)):
            expected = whole[2 * samples.start : 2 * samples.stop, span]
            np.testing.assert_array_equal(targets.alleles(span, samples), expected)


def test_the_numbers_of_matched_sites_are_logged(
    inputs: PanelInputs, target: PhasedData, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    row = exchanged(target.sites, not_palindromic(target.sites)[:1])
    matched(dataclasses.replace(target, sites=row), Path("t.vcf.gz"), inputs, False)
    message = caplog.messages[0]
    assert "9 samples" in message and f"{len(target.sites)} matched, 1 REF and ALT exchanged" in message
    with pytest.raises(UserError, match=r"t\.vcf\.gz: no site in common"):
        none = dataclasses.replace(target, sites=dataclasses.replace(target.sites, pos=target.sites.pos + 10_000_000))
        matched(none, Path("t.vcf.gz"), inputs, False)


def test_windows_that_leave_sites_out_are_refused(
    make_config: MakeConfig, inputs: PanelInputs, target: PhasedData, tmp_path: Path
) -> None:
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    pos = inputs.panel.sites.pos
    (tmp_path / "windows.txt").write_text(f"1 {pos[0]} {pos[-2]}\n")
    config = make_config(f"embrag.data.windows_file={tmp_path / 'windows.txt'}")
    with pytest.raises(UserError, match=r"windows\.txt: 1 panel sites lie in no window"):
        Imputation(untrained(config, 0.0), inputs, targets, CPU, 4)


def test_a_target_with_one_typed_site_or_all_of_them(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, tmp_path: Path, simulated: DefaultData
) -> None:
    truth = read_phased(simulated.truth)
    for name, rows in (("one", [20]), ("all", range(len(truth.sites)))):
        kept = list(rows)
        sites = dataclasses.replace(
            truth.sites,
            contig=truth.sites.contig[kept],
            pos=truth.sites.pos[kept],
            **{key: [getattr(truth.sites, key)[row] for row in kept] for key in ("ref", "alt", "id")},
        )
        write_phased(tmp_path / f"{name}.vcf.gz", sites, truth.samples, truth.alleles[kept])
        found = read_phased(tmp_path / f"{name}.vcf.gz")
        targets = matched(found, Path(name), inputs, False)
        impute_to_vcf(Imputation(model, inputs, targets, CPU, 9), tmp_path / f"{name}.out.vcf.gz")
        out = read_dosages(tmp_path / f"{name}.out.vcf.gz")
        assert np.isfinite(out.dosage).all()
        np.testing.assert_array_equal(out.dosage[kept], (truth.alleles[:, 0::2] + truth.alleles[:, 1::2])[kept])


def test_in_bf16_only_the_products_of_the_network_are_rounded(
    model: ExportedModel, retrieval_alone: ExportedModel, inputs: PanelInputs, target: PhasedData
) -> None:
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    for each, least, most in ((model, 1e-5, 0.03), (retrieval_alone, 0.0, 0.0)):
        rounded, exact = (
            np.concatenate(
                [part for _, part in Imputation(each, inputs, targets, CPU, 9, precision=precision).windows()], 1
            )
            for precision in ("bf16", "fp32")
        )
        assert least <= np.abs(rounded - exact).max() <= most


def test_the_precision_is_bf16_on_a_gpu_and_fp32_on_a_cpu_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for has_bf16 in (True, False):
        monkeypatch.setattr(imputation_module, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert [imputation_module._checked(None, where) for where in (cuda, CPU)] == ["bf16", "fp32"]
        assert [imputation_module._checked("fp32", where) for where in (cuda, CPU)] == ["fp32", "fp32"]
        assert imputation_module._checked("bf16", cuda) == "bf16"
    with pytest.raises(UserError, match=r"^--precision bf16: this processor has no bf16 instructions; use fp32$"):
        imputation_module._checked("bf16", CPU)
    with pytest.raises(UserError, match=r"^--precision fp16: no such precision; use bf16 or fp32$"):
        imputation_module._checked("fp16", CPU)


def test_the_command_passes_the_precision_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(imputation_module, "impute", lambda *given, **named: seen.update(named))
    for options, precision in (([], None), (["--precision=bf16"], "bf16"), (["--precision=fp32"], "fp32")):
        main(arguments=["impute", f"--out={tmp_path / 'out.vcf.gz'}", *options])
        assert seen["precision"] == precision


def with_backend(model: ExportedModel, backend: str) -> ExportedModel:
    retrieval = dataclasses.replace(model.config.retrieval, backend=backend)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, retrieval=retrieval))


def test_search_backends_are_timed_only_on_a_gpu_with_many_batches(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(FirstSearch, "fastest", lambda self: timed.append(len(self.query.tokens)) or "faiss-cpu")
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    imputation = Imputation(with_backend(model, "auto"), inputs, targets, CPU, 4)
    expected = {window.index: values for window, values in imputation.windows()}
    assert timed == [] and imputation._computing._collate.backend == "torch"
    asked: list[int] = []
    monkeypatch.setattr(windows, "_worth_timing", lambda batches, device: asked.append(batches) or True)
    found = {window.index: values for window, values in imputation.windows()}
    assert (
        timed == [8]
        and imputation._computing._collate.backend == "faiss-cpu"
        and asked == [3 * len(imputation.data.windows)]
    )
    # The backends may differ in ties.
    assert np.mean(np.abs(np.concatenate(list(found.values()), 1) - np.concatenate(list(expected.values()), 1))) < 0.02
    monkeypatch.undo()
    cuda = torch.device("cuda", 0)
    worth = [windows._worth_timing(*each) for each in ((1000, cuda), (999, cuda), (10**6, torch.device("cpu")))]
    assert worth == [True, False, False]


def test_a_model_trained_with_a_gpu_search_is_used_without_one(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData
) -> None:
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    for trained, here in (("faiss-gpu", "torch"), ("faiss-cpu", "faiss-cpu")):
        assert Imputation(with_backend(model, trained), inputs, targets, CPU, 4)._computing._collate.backend == here


@pytest.mark.long
@pytest.mark.real
def test_a_short_run_beats_the_nearest_haplotype_on_1000_genomes(
    real_data: Path, root: Path, distributed: DistributedContext, tmp_path: Path, cache_dir: Path
) -> None:
    """Train a few steps on chromosome 20, impute sparse targets of every population, score every MAF bin."""
    tree = read_tree(root / "ds_configs" / "quickstart.json")[0]
    tree["optimizer"]["params"]["torch_adam"] = True
    tree["train_micro_batch_size_per_gpu"] = 4
    tree["embrag"]["data"] |= {"window_sites": 256, "overlap_sites": 16, "flank_sites": 1024}
    tree["embrag"]["data"] |= {"cache_dir": str(cache_dir)}
    tree["embrag"]["retrieval"] |= {"encoding": "fixed", "k": 64}
    tree["embrag"]["model"] |= {"dims": 8, "layers": 1, "heads": 1}
    tree["embrag"]["train"] |= {"max_steps": 3}
    config = parse_config(tree, "real")
    files = PanelFiles(real_data / "panel.vcf.gz", real_data / "chr20.plink.map.gz", real_data / "samples.tsv")
    inputs = open_inputs(files, DataConfig(cache_dir=str(cache_dir)), progress=False)
    Trainer(config, inputs, tmp_path / "run", distributed, resume=False).run()

    target, truth = (read_phased(real_data / f"{name}.vcf.gz") for name in ("target.sparse", "truth"))
    assert target.samples == truth.samples and list(truth.sites.identities()) == list(inputs.panel.sites.identities())
    columns = np.flatnonzero(np.arange(500) // 2 % 3 == 0)  # a third of the samples
    names = tuple(target.samples[column // 2] for column in columns[::2])
    fewer = dataclasses.replace(target, samples=names, alleles=target.alleles[:, columns])
    targets = matched(fewer, real_data / "target.sparse.vcf.gz", inputs, False)
    imputation = Imputation(read_export(tmp_path / "run" / MODEL_FILE), inputs, targets, distributed.device, len(names))
    probability = np.empty((len(columns), len(truth.sites)), dtype=np.float32)
    for window, values in imputation.windows():
        probability[:, window.core_sites] = values
    untyped = ~targets.typed
    counts, dosage = (
        (each[0::2] + each[1::2]).T[untyped].astype(float) for each in (truth.alleles[:, columns].T, probability)
    )
    tally = AggregateR2(len(names))
    tally.add(counts, dosage, imputation.data.reference.allele_frequency[untyped])
    ours = tally.result()
    nearest = {"<0.1 %": 0.2173, "0.1-0.5 %": 0.2714, "0.5-1 %": 0.4041, "1-5 %": 0.5840, "5-50 %": 0.8031}
    assert {name: r2 for name, r2 in nearest.items() if not ours[name] > r2} == {}, ours


def test_without_the_kernels_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embrag_ds.ops.cuda.import_fault", lambda: "ImportError: no CuPy")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"cuda: .* CuPy, .* \(ImportError: no CuPy\); .* --device cpu in imputation"):
        impute(PanelFiles(), None, tmp_path / "out.vcf.gz", device="cuda")


def test_imputation_on_another_gpu_than_the_first_keeps_cudas_rules(
    model: ExportedModel, inputs: PanelInputs, target: PhasedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "available", lambda: False)  # torch's operations in place of the kernels
    targets = matched(target, Path("target.vcf.gz"), inputs, False)
    _, expected = next(Imputation(model, inputs, targets, CPU, 5).windows())
    with Machine(set_device=False) as machine:
        windows = Imputation(model, inputs, targets, machine.device, 5).windows()
        _, found = next(windows)
        windows.close()
    np.testing.assert_allclose(found, expected, atol=1e-3)
