"""What comes before imputing: files are read and matched, reports written, and the model adapts. Rank 0 does it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embrag_ds.adaptation.settings import Adapt
from embrag_ds.data.inputs import PanelFiles, PanelInputs, cache_directory
from embrag_ds.data.left_out import LeftOutTable, left_out_table
from embrag_ds.data.packing.reading import TARGET
from embrag_ds.data.panel import Panel, open_panel
from embrag_ds.data.targets import Phase, Targets, match_targets, open_targets, phase_targets
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import UserError
from embrag_ds.export import ExportedModel, write_export
from embrag_ds.files import write_json
from embrag_ds.imputation.computing.stretches import Precision
from embrag_ds.imputation.extent import Extent, UntypedContigs, extent
from embrag_ds.imputation.genome import Genome, OpenPanels, Piece, Unit, keep_targets, kept_targets, report_of
from embrag_ds.imputation.report import describe, describe_targets, table, write_left_out
from embrag_ds.imputation.sample_checks import check_samples, inbreeding
from embrag_ds.ops.threads import thread_count
from embrag_ds.preflight import require_space
from embrag_ds.variants.harmonise import Strand
from embrag_ds.variants.header import Contents
from embrag_ds.variants.output import EVERYTHING, OutputOptions
from embrag_ds.variants.published import last_positions
from embrag_ds.variants.records import Duplicates

logger = logging.getLogger(__name__)

_MOST_APART = 0.1
"""Difference of the inbreeding coefficients of targets and panel up to which their genotypes are alike."""
_LEAST_BYTES, _LIKELY_BYTES = 0.015, 3.0
"""Bytes of output for a genotype: of 16 bytes of text DEFLATE leaves 0.015 at best (1 of 1032), and 3.0 is what 250
samples of 1000 Genomes take on chromosome 20.
"""


@dataclass(frozen=True)
class TargetOptions:
    """Options of what is read from the targets, and of what is imputed.

    ``duplicates`` is the rule for sites that the file has twice, and ``strand`` that for sites on the other strand
    (:func:`embrag_ds.variants.harmonise.harmonise`). ``phase`` says what phases unphased targets. With
    ``allow_overlap``, targets may also be in the panel. ``region`` limits what is written, and ``untyped_contigs`` says
    what becomes of contigs without typed sites (:func:`embrag_ds.imputation.extent.extent`). ``report`` is a file for
    the numbers as JSON, and ``excluded`` one for the sites that were left out, each with the reason.
    """

    duplicates: Duplicates = "first"
    strand: Strand = "report"
    phase: Phase = "none"
    allow_overlap: bool = False
    region: str | None = None
    untyped_contigs: UntypedContigs = "drop"
    report: Path | None = None
    excluded: Path | None = None


AS_IT_IS = TargetOptions()
"""The defaults."""


@dataclass(frozen=True)
class Job:
    """What is to be imputed and how: the arguments of :func:`embrag_ds.imputation.impute.impute`, checked.

    ``log`` is a file for Beagle's, where it phases one file of targets.
    """

    panels: list[PanelFiles]
    targets: list[Path]
    out: Path
    options: TargetOptions
    exported: ExportedModel
    device: str
    transformer: bool
    precision: Precision
    block: int | None
    adapt: Adapt
    save_model: Path | None
    output: OutputOptions
    settings: DataConfig
    log: Path

    @property
    def is_single(self) -> bool:
        """Whether one panel file and one file of targets are all."""
        return len(self.panels) == len(self.targets) == 1


@dataclass(frozen=True)
class Plan:
    """What is to be imputed of all files: ``pieces`` in order, and what the output's header and index have of them.

    ``last`` is the greatest position that a record covers.
    """

    samples: tuple[str, ...]
    contents: Contents
    last: int
    pieces: list[Piece]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        return {**asdict(self), "contents": [self.contents.contigs, sorted(self.contents.extents)]}

    @staticmethod
    def from_json(found: dict[str, Any]) -> Plan:
        """The plan that :meth:`to_json` gave."""
        contigs, extents = found["contents"]
        pieces = [Piece(**{**each, "spans": [tuple(span) for span in each["spans"]]}) for each in found["pieces"]]
        return Plan(tuple(found["samples"]), Contents(contigs, frozenset(extents)), found["last"], pieces)


def prepare_one(job: Job, inputs: PanelInputs, scratch: Path) -> tuple[Targets, Extent, ExportedModel]:
    """Targets of the only panel file, the sites to write, and the model that imputes them."""
    panel, options = inputs.panel, job.options
    (target,) = job.targets
    logger.info("panel %s: %d samples, %d sites", panel.path, len(panel.samples), len(panel.sites))
    opened = open_panel(target, scratch, reading=replace(TARGET, duplicates=options.duplicates))
    targets, found = _read_targets(job, opened, inputs, scratch, job.log)
    written = extent(panel.sites, targets.typed, options.region, options.untyped_contigs, str(panel.path), str(target))
    _require_space(job, len(targets.samples) * len(written.rows()))
    write_left_out(options.excluded, panel, opened, targets.match)
    return targets, written, _adapted(job, inputs, targets, found)


def prepare_all(job: Job, panels: OpenPanels, scratch: Path, kept: Path) -> tuple[Plan, ExportedModel]:
    """The plan for all files, whose targets are written to folders in ``kept``, and the model that imputes them."""
    if job.is_single:
        inputs = panels.inputs(0, progress=True)
        targets, written, model = prepare_one(job, inputs, scratch)
        keep_targets(targets, kept / "0")
        sites = written.table(inputs.panel.sites)
        last = max(last_positions(sites), default=0)
        return Plan(targets.samples, Contents.of(sites), last, [Piece(0, 0, written.spans)]), model
    options = job.options
    genome = Genome(panels, job.targets, scratch, options.duplicates)
    found: list[_Prepared] = []
    with left_out_table(options.excluded) as left_out:
        for what, excluded in genome.excluded:
            left_out.add_list(what, excluded)
        for number, unit in enumerate(genome.units(options.region)):
            found.append(_prepare_unit(job, genome, number, unit, left_out, scratch, kept))
        for number in range(len(job.targets)):
            for each in genome.without_panel(number):
                left_out.add("target", each)
    kept_units = [each for each in found if each.piece.spans]
    extents: frozenset[str] = frozenset().union(*(each.extents for each in kept_units))
    last = max(each.last for each in kept_units)
    plan = Plan(genome.samples, Contents(genome.contigs, extents), last, [each.piece for each in kept_units])
    _require_space(job, len(plan.samples) * sum(each.sites for each in plan.pieces))
    chosen = max(kept_units, key=lambda each: each.typed).piece
    inputs = panels.inputs(chosen.panel)
    targets = kept_targets(kept / str(chosen.number), plan.samples, len(inputs.panel.sites))
    if job.adapt != "off":
        logger.info(
            "one model imputes all files; it adapts to the one with the most typed sites, %s", inputs.panel.path
        )
    reports = [each.report for each in found if each.report is not None]
    return plan, _adapted(job, inputs, targets, report_of(reports, genome))


@dataclass(frozen=True)
class _Prepared:
    """What of a unit stays in memory: its piece, its report, and what the output's header and index have of it."""

    piece: Piece
    report: dict[str, Any] | None
    typed: int
    extents: frozenset[str]
    last: int


def _prepare_unit(
    job: Job, genome: Genome, number: int, unit: Unit, left_out: LeftOutTable, scratch: Path, kept: Path
) -> _Prepared:
    """Read, match and keep a unit's targets."""
    inputs = genome.panels.inputs(unit.panel)
    sites, options = inputs.panel.sites, job.options
    report = None
    if unit.target is None:
        name, targets = "what --target names", genome.untyped(len(sites))
    else:
        opened = genome.target(unit)
        log = Path(f"{job.out}.{number + 1}.beagle.log")
        name = str(opened.path)
        targets, report = _read_unit(job, opened, inputs, scratch, log)
        left_out.add_dropped("target", targets.match, opened.sites)
    given = options.region, options.untyped_contigs, str(inputs.panel.path), name
    written = extent(sites, targets.typed, *given, unit.contigs)
    if not written.spans:
        return _Prepared(Piece(number, unit.panel, []), report, 0, frozenset(), 0)
    keep_targets(targets, kept / str(number))
    own = written.table(sites)
    last = max(last_positions(own))
    return _Prepared(
        Piece(number, unit.panel, written.spans), report, int(targets.typed.sum()), Contents.of(own).extents, last
    )


def _read_unit(
    job: Job, opened: Panel, inputs: PanelInputs, scratch: Path, log: Path
) -> tuple[Targets, dict[str, Any]]:
    try:
        return _read_targets(job, opened, inputs, scratch, log)
    except UserError as fault:
        if "no site in common" not in str(fault):
            raise
        raise UserError(f"{fault}; or leave {inputs.panel.path} out") from fault


def _read_targets(
    job: Job, opened: Panel, inputs: PanelInputs, scratch: Path, log: Path
) -> tuple[Targets, dict[str, Any]]:
    """Match, phase and check the ``opened`` targets; returns them, and the report of what was done."""
    panel, options = inputs.panel, job.options
    match = match_targets(opened, panel, options.strand, options.allow_overlap)
    found = describe(panel, opened, match, options.strand)
    logger.info("what was read and matched:\n%s", table(found))
    if options.phase == "beagle":
        targets = phase_targets(opened, match, panel, inputs.position_cm, scratch, log, thread_count())
    else:
        targets = open_targets(opened, match, panel)
    found |= describe_targets(targets, check_samples(targets, panel))
    return targets, found


def _require_space(job: Job, genotypes: int) -> None:
    if job.output == EVERYTHING:
        require_space(job.out, int(_LEAST_BYTES * genotypes), int(_LIKELY_BYTES * genotypes))


def _adapted(job: Job, inputs: PanelInputs, targets: Targets, found: dict[str, Any]) -> ExportedModel:
    """The model after its adaptation, which is noted in the report ``found``; both are written where asked for."""
    model: ExportedModel = job.exported
    report: dict[str, Any] = {"adapt": "off"}
    if job.adapt != "off":
        model, report = _adapt(job, inputs, targets)
    if job.save_model is not None:
        write_export(job.save_model, model)
    if job.options.report is not None:
        write_json(job.options.report, {**found, "adaptation": report})
    return for_targets(model, inputs.panel, targets)


def for_targets(model: ExportedModel, panel: Panel, targets: Targets) -> ExportedModel:
    """The model, whose samples' haplotypes are not alike where the targets are not as inbred as its panel."""
    if not model.dependence.alike:
        return model
    own, usual = inbreeding(targets, panel)
    if abs(own - usual) <= _MOST_APART:
        return model
    logger.info(
        "the targets' inbreeding coefficient is %.2f and the panel's %.2f: GP does not take their haplotypes for alike",
        own,
        usual,
    )
    return replace(model, dependence=replace(model.dependence, alike=0.0))


def _adapt(job: Job, inputs: PanelInputs, targets: Targets) -> tuple[ExportedModel, dict[str, Any]]:
    """The model after its adaptation, and what the report says of it."""
    import torch

    from embrag_ds.adaptation.adapt import adapt_model
    from embrag_ds.adaptation.learner import Source

    others = _no_targets(inputs.panel, targets)
    device, bf16 = torch.device(job.device), job.precision == "bf16"
    source = Source(inputs, targets.typed, others, device, job.transformer, bf16=bf16)
    adapted = adapt_model(source, job.exported, job.adapt, cache_directory(job.settings))
    return adapted.model, adapted.report


def _no_targets(panel: Panel, targets: Targets) -> np.ndarray:
    """Panel samples that are no targets, int64."""
    imputed = set(targets.samples)
    return np.array([number for number, name in enumerate(panel.samples) if name not in imputed], dtype=np.int64)
