"""Imputation of several files, by one rank or by several, each of which writes its part."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import embrag_ds
from embrag_ds.export import ExportedModel, read_export, write_export
from embrag_ds.imputation.computing.blending import write_blended
from embrag_ds.imputation.engine import Imputation
from embrag_ds.imputation.extent import Extent, warn_of_few_typed
from embrag_ds.imputation.genome import OpenPanels, Piece, kept_targets
from embrag_ds.imputation.parts import Parts, room_for
from embrag_ds.imputation.preparation import Job, Plan, prepare_all
from embrag_ds.imputation.ranks import Ranks
from embrag_ds.imputation.shares import Division
from embrag_ds.runs import alive
from embrag_ds.variants.header import imputed_header
from embrag_ds.variants.output import ImputedRecords, log_left_out
from embrag_ds.variants.published import Publication, published

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

_MODEL = "model.safetensors"


def impute_files(job: Job, scratch: Path) -> int:
    """Impute several files with one rank; returns the number of samples."""
    panels = OpenPanels(job.panels, job.settings)
    with room_for(job.out, scratch.parent):
        plan, model = prepare_all(job, panels, scratch, scratch)
    with published(job.out, plan.last) as publication:
        publication.write(_header(job, plan, model))
        counts = _write_share(job, panels, plan, model, scratch, publication, None)
    log_left_out(job.out, job.output, *counts)
    return len(plan.samples)


def impute_by_ranks(job: Job, ranks: Ranks, scratch: Path) -> int:
    """Impute with all ranks (collective); returns the number of samples.

    Rank 0 reads the targets, and has the model adapt. All ranks then impute their shares, and the output is the same as
    that of one rank.
    """
    panels = OpenPanels(job.panels, job.settings)
    with ranks.folder(job.out) as folder:

        def prepared() -> str:
            with room_for(job.out, folder.parent):
                plan, model = prepare_all(job, panels, scratch, folder)
                if model is not job.exported:
                    write_export(folder / _MODEL, model)
            return json.dumps({"plan": plan.to_json(), "adapted": model is not job.exported})

        with alive.busy("reading the files"):
            found = json.loads(ranks.on_main(prepared))
        plan = Plan.from_json(found["plan"])
        model = read_export(folder / _MODEL) if found["adapted"] else job.exported
        parts = Parts(job.out, folder)
        with parts.written(ranks.rank) as (publication, text):
            if ranks.is_main:
                publication.write(_header(job, plan, model))
            counts = _write_share(job, panels, plan, model, folder, publication, ranks)
        lines = [json.loads(each) for each in ranks.gather(json.dumps([text.text_bytes, *counts]))]
        lengths = [length for length, *_ in lines]
        with alive.busy("joining the parts"):
            if not job.out.name.endswith(".bcf"):
                parts.compress(ranks.rank, lengths)
            ranks.gather("")

            def joined() -> str:
                parts.join(lengths, plan.last)
                return ""

            ranks.on_main(joined)
        if ranks.is_main:
            log_left_out(job.out, job.output, *(sum(column) for column in list(zip(*lines, strict=True))[1:]))
    return len(plan.samples)


def _header(job: Job, plan: Plan, model: ExportedModel) -> bytes:
    source = f"embrag_ds {embrag_ds.__version__}"
    return imputed_header(plan.contents, plan.samples, source, job.output.written_fields, model.dependence)


def _write_share(
    job: Job,
    panels: OpenPanels,
    plan: Plan,
    model: ExportedModel,
    kept: Path,
    publication: Publication,
    ranks: Ranks | None,
) -> Sequence[int]:
    """Write a rank's share of all pieces, or everything; returns how many imputed sites DR2 left out, and of how many.

    Targets are found in folders of ``kept``.
    """
    below = imputed = offset = 0
    total = sum(each.sites for each in plan.pieces)
    for piece in plan.pieces:
        division = Division(1 if ranks is None else ranks.ranks, offset, total)
        offset += piece.sites
        if division.is_touched(0 if ranks is None else ranks.rank, piece.sites):
            counts = _write_piece(job, panels, plan, piece, division, model, kept, publication, ranks)
            below, imputed = below + counts[0], imputed + counts[1]
    return below, imputed


def _write_piece(
    job: Job,
    panels: OpenPanels,
    plan: Plan,
    piece: Piece,
    division: Division,
    model: ExportedModel,
    kept: Path,
    publication: Publication,
    ranks: Ranks | None,
) -> Sequence[int]:
    """:func:`_write_share` of one piece; nothing of it stays in memory."""
    inputs = panels.inputs(piece.panel)
    sites = inputs.panel.sites
    targets = kept_targets(kept / str(piece.number), plan.samples, len(sites))
    imputation = Imputation(model, inputs, targets, job.device, job.block, job.transformer, job.precision)
    where = Extent(piece.spans)
    windows, wanted = where.windows(imputation.data.windows), where.places(len(sites))
    record = sites.record if job.output.join_multiallelic else None
    share = division.share(0 if ranks is None else ranks.rank, windows, wanted, record)
    if not share.windows:
        return 0, 0
    if share.windows[0] is windows[0]:
        warn_of_few_typed(windows, sites, targets.typed)
    bounds = int(wanted[share.begin]), int(wanted[share.end])
    given = publication, where.table(sites), len(plan.samples), job.output, *bounds, model.dependence
    with ImputedRecords(*given) as writer:
        exchange = None if ranks is None else ranks.exchange(job.out, kept, piece.number)
        write_blended(imputation, writer, where, share, exchange)
    return writer.below, writer.imputed
