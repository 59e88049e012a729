"""The parsers under test, called as the commands call them, in a process of their own.

A request is ``[reader, folder]``; the answer has an ``outcome``: ``read``, ``refused`` (a UserError) or ``traceback``.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from embrag_ds.data.packing.reading import TARGET, Reading
from embrag_ds.data.panel import Panel, open_panel, read_populations
from embrag_ds.data.sampler import exclusion_table, read_manifest
from embrag_ds.data.targets import match_targets, open_targets
from embrag_ds.data.windows import blend_weights, read_windows
from embrag_ds.errors import UserError
from embrag_ds.maps.genetic_map import GeneticMap
from embrag_ds.ops.bits import unpack_host
from embrag_ds.variants import container
from embrag_ds.variants.dosages import spool_dosages
from embrag_ds.variants.genotypes import HAPLOID, UNKNOWN, Calls
from embrag_ds.variants.harmonise import Strand
from embrag_ds.variants.records import Excluded, VariantReader
from tests.fuzz import mutate, seeds
from tests.fuzz.child import serve

READINGS = (
    TARGET,
    TARGET,
    TARGET,
    Reading(),
    Reading(missing="major"),
    Reading(missing="drop"),
    Reading(duplicates="error", missing="keep"),
)
STRANDS: tuple[Strand, ...] = ("report", "flip", "drop")
_SPARE_BYTES = 2 << 30


class Inconsistent(Exception):
    """Two ways to read the same input that do not agree."""


def call_texts(calls: Calls) -> list[str]:
    """Calls as text: ``0|1``, ``0/1`` where phase is missing, ``1`` and ``.`` of haploid ones."""
    pairs = calls.alleles.reshape(-1, 2).tolist()
    missing = np.zeros_like(calls.alleles) if calls.missing is None else calls.missing
    texts = []
    for sample, (pair, lost) in enumerate(zip(pairs, missing.reshape(-1, 2).tolist(), strict=True)):
        shown = ["." if gone else str(allele) for allele, gone in zip(pair, lost, strict=True)]
        if calls.ploidy is not None and calls.ploidy[sample] in (HAPLOID, UNKNOWN):
            texts.append(shown[0])
            continue
        texts.append(("/" if calls.unphased is not None and calls.unphased[sample] else "|").join(shown))
    return texts


def variants(folder: Path) -> dict[str, Any]:
    """Sites and calls of a variant file, and of the panel packed from it."""
    path = next(each for each in folder.iterdir() if each.name.startswith("in."))
    number = _number(folder)
    reading = READINGS[number % len(READINGS)]
    # Lines that lie in two blocks, or many, without large files.
    container._BLOCK_BYTES = (1 << 20, 1 << 20, 97, 2000)[number // len(READINGS) % 4]
    events: list[list[Any]] = []

    def excluded(each: Excluded) -> None:
        events.append(["excluded", each.contig, each.pos, each.id, each.ref, each.alt, each.reason])

    with VariantReader(
        path, duplicates=reading.duplicates, without_alt=reading.without_alt, on_excluded=excluded
    ) as vcf:
        for site in vcf.sites():
            calls = vcf.calls(site)
            contig = vcf.contigs[site.contig_code]
            events.append(["site", contig, site.pos, site.id, site.ref, site.alt, call_texts(calls), site.extent])
        samples, records = list(vcf.samples), vcf.records
    panel = open_panel(path, folder / "cache", progress=False, reading=reading)
    _compare_packed(events, panel, reading)
    return {"events": events, "samples": samples, "records": records}


def _compare_packed(events: list[list[Any]], panel: Panel, reading: Reading) -> None:
    """Compare what was read with the packed file."""
    found = [event for event in events if event[0] == "site"]
    if reading.missing == "drop":
        found = [event for event in found if not any("." in call or "/" in call for call in event[6])]
    rows = [(contig, pos, ref, alt) for _, contig, pos, _, ref, alt, _, _ in found]
    if rows != list(panel.sites.identities()):
        raise Inconsistent(f"packed sites {list(panel.sites.identities())[:5]} of {rows[:5]}")
    if [event[3] for event in found] != panel.sites.id:
        raise Inconsistent("packed ids")
    if [event[7] for event in found] != [panel.sites.extent.get(row, "") for row in range(len(found))]:
        raise Inconsistent("packed extents")
    count = len(panel.samples)
    alleles = unpack_host(panel.packed, 0, 2 * count).reshape(len(found), count, 2)
    missing = None if panel.missing is None else unpack_host(panel.missing, 0, 2 * count).reshape(alleles.shape)
    unphased = None if panel.unphased is None else unpack_host(panel.unphased, 0, count)
    haploid = None if panel.ploidy is None else panel.ploidy.at(np.arange(len(found)))
    for row, event in enumerate(found):
        for sample, text in enumerate(event[6]):
            shown = text.replace("/", "|").split("|")
            held = [str(allele) for allele in alleles[row, sample].tolist()]
            if missing is not None:
                held = ["." if gone else allele for allele, gone in zip(held, missing[row, sample], strict=True)]
            if reading.missing == "major" and ("." in shown or "/" in text):
                continue
            if held != (shown if len(shown) == 2 else shown * 2):
                raise Inconsistent(f"packed call {held} of {text} at site {row}, sample {sample}")
            if unphased is not None and bool(unphased[row, sample]) != ("/" in text):
                raise Inconsistent(f"packed phase of {text} at site {row}, sample {sample}")
            if set(shown) != {"."} and (haploid is not None and bool(haploid[row, sample])) != (len(shown) == 1):
                raise Inconsistent(f"packed ploidy of {text} at site {row}, sample {sample}")


def _dosages(folder: Path, truth: bool) -> dict[str, Any]:
    path = folder / "in.vcf"
    with spool_dosages(path, folder, truth=truth) as file:
        every = np.arange(len(file.sites))
        dosage = file.dosage(every)
        file.gp(every)
        file.ploidy(every)
        if file.has_haplotypes:
            file.haplotype_dosage(every)
        return {
            "sites": [list(each) for each in file.sites.identities()],
            "samples": list(file.samples),
            "dosage": [[None if np.isnan(value) else float(value) for value in row] for row in dosage],
        }


def imputed(folder: Path) -> dict[str, Any]:
    """Dosages of an imputed file."""
    return _dosages(folder, truth=False)


def truth(folder: Path) -> dict[str, Any]:
    """Dosages of a truth."""
    return _dosages(folder, truth=True)


def evaluation(folder: Path) -> None:
    """The command ``embrag evaluate``."""
    from embrag_ds.evaluation.score import evaluate

    report = evaluate(
        folder / "truth.vcf",
        {"tool": folder / "imputed.vcf"},
        folder / "panel.vcf",
        folder / "target.vcf",
        baselines=True,
        bootstrap=5,
        cache_dir=folder / "cache",
    )
    report.table()
    report.to_json()


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def targets(folder: Path) -> None:
    """Targets matched to a panel, and their alleles."""
    panel = open_panel(folder / "panel.vcf", folder / "cache", progress=False)
    target = open_panel(folder / "target.vcf", folder / "cache", progress=False, reading=TARGET)
    match = match_targets(target, panel, STRANDS[_number(folder) % len(STRANDS)], allow_overlap=False)
    matched = open_targets(target, match, panel)
    span, every = slice(0, len(panel.sites)), slice(0, len(matched.samples))
    matched.alleles(span, every)
    matched.missing_alleles(span, every)
    matched.haploid(span)


def impute(folder: Path) -> None:
    """The command ``embrag impute`` with a tiny model; its output has every site of the panel."""
    from embrag_ds.data.inputs import PanelFiles
    from embrag_ds.imputation.impute import impute as run
    from embrag_ds.imputation.preparation import TargetOptions

    model, out = folder / "model.safetensors", folder / "out.vcf.gz"
    model.write_bytes(seeds.model())
    strand = STRANDS[_number(folder) % len(STRANDS)]
    options = TargetOptions(strand=strand, report=folder / "report.json", excluded=folder / "excluded.tsv")
    files = PanelFiles(folder / "panel.vcf")
    run(
        files,
        folder / "target.vcf",
        out,
        model=model,
        options=options,
        device="cpu",
        adapt="off",
        cache_dir=folder / "cache",
    )
    with VariantReader(out) as vcf:
        written = sum(1 for site in vcf.sites() if vcf.calls(site))
    if written != seeds.SITES:
        raise Inconsistent(f"{written} sites in the output, of {seeds.SITES}")


def _base(folder: Path) -> Panel:
    """The panel that tables describe, packed once by this process."""
    if not _PANEL:
        place = folder.parent / "base"
        place.mkdir(exist_ok=True)
        (place / "panel.vcf").write_bytes(seeds.imputation()["panel.vcf"])
        _PANEL.append(open_panel(place / "panel.vcf", place / "cache", progress=False))
    return _PANEL[0]


_PANEL: list[Panel] = []


def genetic_map(folder: Path) -> None:
    """A genetic map, and the positions of a panel's sites on it."""
    panel = _base(folder)
    found = GeneticMap.read(folder / "map")
    positions = found.positions(panel.sites)
    found.log_doubts(panel.sites)
    if not np.isfinite(positions).all() or (np.diff(positions) < 0).any():
        raise Inconsistent("positions that are not finite, or decrease")


def samples(folder: Path) -> None:
    """A table of samples and populations."""
    found = read_populations(folder / "samples.tsv", seeds.PANEL_SAMPLES)
    if len(set(found.names)) != len(found.names) or any(name != name.strip() or not name for name in found.names):
        raise Inconsistent(f"populations {found.names}")


def windows(folder: Path) -> None:
    """A file of windows."""
    sites = _base(folder).sites
    found = read_windows(folder / "windows", sites, 8)
    weights = np.zeros(len(sites))
    for window, blend in zip(found, blend_weights(found), strict=True):
        weights[window.core_sites] += blend
    if not np.isin(weights.round(9), (0, 1)).all():
        raise Inconsistent("windows whose weights do not sum to 1")


def manifest(folder: Path) -> None:
    """The sites of an array."""
    read_manifest(folder / "manifest", _base(folder))


def relatives(folder: Path) -> None:
    """Pairs of related samples."""
    exclusion_table(seeds.PANEL_SAMPLES, folder / "relatives")


def configuration(folder: Path) -> None:
    """A run's configuration."""
    from embrag_ds.config import load_config

    given = folder / "set"
    # As the system gives arguments to Python.
    overrides = os.fsdecode(given.read_bytes()).split("\n") if given.exists() else []
    load_config(folder / "run.json", overrides)


def model(folder: Path) -> None:
    """An exported model, applied to a panel."""

    from embrag_ds.data.inputs import PanelInputs
    from embrag_ds.export import read_export
    from embrag_ds.imputation.engine import Imputation

    export = read_export(folder / "model.safetensors")
    panel = _base(folder)
    positions = GeneticMap.uniform().positions(panel.sites)
    inputs = PanelInputs(panel, read_populations(None, panel.samples), positions)
    (folder / "target.vcf").write_bytes(seeds.imputation()["target.vcf"])
    target = open_panel(folder / "target.vcf", folder / "cache", progress=False, reading=TARGET)
    targets = open_targets(target, match_targets(target, panel, "report", allow_overlap=False), panel)
    Imputation(export, inputs, targets, "cpu", block=4)


def checkpoint(folder: Path) -> None:
    """What is text in a checkpoint: facts with a right digest, where they are JSON, so that what reads them is met."""
    from embrag_ds.config import parse_config
    from embrag_ds.runs.checkpoints import MANIFEST, write_manifest
    from embrag_ds.training.checkpoint import Checkpoints

    step = folder / "step4"
    step.mkdir()
    (step / "weights").write_bytes(b"w")
    content = (folder / "facts.json").read_bytes()
    try:
        write_manifest(step, json.loads(content))
    except (ValueError, RecursionError):
        (step / MANIFEST).write_bytes(content)
    distributed: Any = SimpleNamespace(ranks=1, on_main=lambda work: work())
    config = parse_config(json.loads(json.dumps(seeds.run_config())), "seed")
    Checkpoints(folder, config, {"samples": "a", "sites": "b"}, distributed).find()


def cache(folder: Path) -> None:
    """A packed panel of which a file was damaged: it is built again, refused, or read as before.

    Packed alleles are too large to be checked whenever they are opened: only their size is.
    """
    name, _, seed = (folder / "mutation").read_text().partition(" ")
    rng = np.random.default_rng(int(seed))
    path = folder / "in.vcf"
    before = open_panel(path, folder / "cache", progress=False, reading=TARGET)
    wanted = _content(before)
    (damaged,) = (folder / "cache").glob(f"*/{name}") if name in _names(folder) else (None,)
    if damaged is None:
        return
    if rng.random() < 0.1:
        damaged.unlink()
    else:
        # A new file: the old one is mapped into memory.
        content = mutate.mutated(rng, damaged.read_bytes(), mutate.TABLE if name.endswith("tsv") else mutate.BYTES)
        if name.endswith(".bits") and len(content) == damaged.stat().st_size:
            return
        damaged.unlink()
        damaged.write_bytes(content)
    after = _content(open_panel(path, folder / "cache", progress=False, reading=TARGET))
    if after != wanted:
        raise Inconsistent(f"another panel after damage to {name}")


def _names(folder: Path) -> set[str]:
    return {each.name for each in (folder / "cache").glob("*/*")}


def _content(panel: Panel) -> list[Any]:
    ploidy = None if panel.ploidy is None else [panel.ploidy.start.tolist(), panel.ploidy.haploid.tolist()]
    bits = [None if each is None else each.tobytes() for each in (panel.packed, panel.missing, panel.unphased)]
    return [list(panel.sites.identities()), panel.sites.id, dict(panel.sites.extent), panel.samples, bits, ploidy]


# --- for the tests of the fuzzer ---


def _die(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _sleep(folder: Path) -> None:
    time.sleep(60)


def _fail(folder: Path) -> None:
    raise IndexError("planted")


def _take(folder: Path) -> None:
    np.ones(300 << 20, dtype=np.uint8)


# --- the process ----------------------------------------------------------------------------------------------------


def _memory(name: str) -> int:
    """A number of bytes in /proc/self/status: VmRSS, VmHWM (the peak of it), VmSize."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _warm_up(folder: Path) -> None:
    """Impute once: the first time compiles for seconds and takes memory."""
    folder.mkdir()
    for name, content in seeds.imputation().items():
        (folder / name).write_bytes(content)
    impute(folder)
    shutil.rmtree(folder)


_WARM: list[bool] = []


def answer(request: list[str]) -> dict[str, Any]:
    """Run a reader on the files in a folder."""
    reader: Callable[[Path], Any] = globals()[request[0]]
    folder = Path(request[1])
    if reader is impute and not _WARM:
        _warm_up(folder.parent / "first-0")
        _WARM.append(True)
    there = {each.name for each in folder.iterdir()}
    heard = _Warnings()
    package = logging.getLogger("embrag_ds")
    package.addHandler(heard)
    package.propagate = False
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    begin = time.perf_counter()
    result: dict[str, Any]
    try:
        result = {"outcome": "read", "found": reader(folder)}
    except UserError as error:
        result = {"outcome": "refused", "message": str(error)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in last if "/embrag_ds/" in frame.filename]
        at = f"{ours[-1].filename.rpartition('/embrag_ds/')[2]}:{ours[-1].lineno}" if ours else "tests"
        kind = "misread" if isinstance(error, Inconsistent) else "traceback"
        result = {"outcome": kind, "message": f"{type(error).__name__} at {at}: {str(error)[:300]}"}
        result["trace"] = traceback.format_exc()
    finally:
        package.removeHandler(heard)
        new = {each.name for each in folder.iterdir()} - there - {"cache", "step4", "model.safetensors"}
        result["left"] = sorted(name for name in new if result["outcome"] == "refused" or name.startswith(".tmp"))
        shutil.rmtree(folder / "cache", ignore_errors=True)
    result["seconds"] = time.perf_counter() - begin
    result["peak"] = max(0, _memory("VmHWM") - before)
    result["warnings"] = heard.messages
    return result


if __name__ == "__main__":
    import embrag_ds.config
    import embrag_ds.evaluation.score
    import embrag_ds.export
    import embrag_ds.imputation.impute  # noqa: F401

    allowed = _memory("VmSize") + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    serve(answer)
