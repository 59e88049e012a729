"""Ablation of a trained model: accuracy of each of its parts on the samples held out of its training.

    python profiling/ablation.py --run-dir RUN --panel P [--map M] [--samples S] --typed sparse=A.vcf.gz \\
        --typed dense=B.vcf.gz [--without-retrieval RUN2] --json FILE

Rows, each with the same samples, sites and windows:

    no retrieval      a model trained with embrag.retrieval.mode = none (--without-retrieval)
    random            the copying model over random haplotypes instead of the nearest
    top 1             the single nearest haplotype
    copying, fixed    the untrained copying model over the K nearest
    copying, learned  the trained copying model, the residual left out
    with confidence   with the correction from the evidence for the dosage, the transformer left out
    with residual     the whole trained model
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embrag_ds.cli.command import run_command
from embrag_ds.config import EmbragConfig
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs, windowed
from embrag_ds.data.sampler import QueryBatch, exclusion_table, read_manifest, split_samples
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.evaluation.metrics import BIN_NAMES, AggregateR2
from embrag_ds.export import MODEL_FILE, ExportedModel, read_export
from embrag_ds.files import require_writable, write_json
from embrag_ds.model.imputer import Imputer, Prediction
from embrag_ds.retrieval.collate import RetrievalCollator
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.search import TorchSearch, barred

logger = logging.getLogger("embrag_ds.profiling.ablation")

CPU = torch.device("cpu")
BLOCK = 25


class RandomSearch(TorchSearch):
    """Search that returns random neighbours, as many and with the same exclusions as the real search."""

    name = "random"

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        order = torch.rand(len(tokens), count).masked_fill_(barred(excluded, count), -1)
        ids = torch.topk(order, k, dim=1).indices
        return torch.zeros(ids.shape), ids


@dataclass(frozen=True)
class Row:
    """One row of the ablation: the batches, the network, and the part of its prediction that is scored."""

    collate: RetrievalCollator
    network: Imputer
    read: Callable[[Prediction], Tensor]
    transformer: bool

    @torch.no_grad()
    def dosage(self, queries: QueryBatch) -> np.ndarray:
        """ALT dosage in the core, float32 [L, N]."""
        haplotypes = self.read(self.network(self.collate(queries, 0), self.transformer)).sigmoid()
        return haplotypes.unflatten(0, (-1, 2)).sum(1).T.numpy()


def network_of(model: ExportedModel, trained: bool) -> Imputer:
    """The model's network, with its trained weights or with initial ones."""
    return model.network() if trained else Imputer(model.config.model).eval()


def make_row(
    model: ExportedModel,
    data: WindowedPanel,
    read: Callable[[Prediction], Tensor],
    trained: bool = True,
    k: int | None = None,
    search: TorchSearch | None = None,
    transformer: bool = True,
) -> Row:
    """Row of a model over ``data``, with ``k`` neighbours and ``search`` in place of those of its settings."""
    settings = model.config.retrieval if k is None else replace(model.config.retrieval, k=k)
    network = network_of(model, trained)
    exclusions = exclusion_table(data.reference.panel.samples, None)
    snapshot = model.snapshot if trained else None
    reference = Reference(settings, data, network.embedding, CPU, exclusions, snapshot=snapshot)
    reference.begin_refresh(0)
    return Row(reference.collator(BLOCK, search=search), network, read, transformer)


def score(rows: dict[str, Row], data: WindowedPanel, samples: np.ndarray, typed: np.ndarray, stride: int) -> dict:
    """Aggregate r2 by MAF bin of every row, at the sites that are not ``typed`` bool [S].

    Every ``stride``-th window is scored; a site in two cores counts once.
    """
    tallies = {name: AggregateR2(1) for name in rows}
    reference = data.reference
    left = ~typed & reference.passes_minimum_count
    last_logged = time.monotonic()
    for window in data.windows[::stride]:
        core = window.core_sites
        scored = left[core].copy()
        left[core] = False
        frequency = reference.allele_frequency[core][scored]
        for start in range(0, len(samples), BLOCK):
            group = samples[start : start + BLOCK]
            alleles = data.samples_alleles(window.index, group)
            masked = np.repeat(~typed[None, window.start : window.stop], len(group), axis=0)
            queries = QueryBatch(window.index, group, alleles, masked)
            truth = (alleles[0::2] + alleles[1::2]).T[window.core][scored]
            for name, row in rows.items():
                dosage = row.dosage(queries)[scored]
                tallies[name].add(truth.reshape(-1, 1), dosage.reshape(-1, 1), np.repeat(frequency, truth.shape[1]))
        if time.monotonic() - last_logged > 10:
            logger.info("  window %d/%d", window.index + 1, len(data.windows))
            last_logged = time.monotonic()
    return {name: tally.result() for name, tally in tallies.items()}


def rows_of(
    model: ExportedModel, without: ExportedModel | None, data: WindowedPanel, which: Iterable[str]
) -> dict[str, Row]:
    """The rows named in ``which``, or all, by name; raises :class:`UserError` for an unknown name."""
    prior, whole = (lambda found: found.prior), (lambda found: found.logits)
    makers: dict[str, Callable[[], Row]] = {
        "random": lambda: make_row(model, data, prior, search=RandomSearch()),
        "top 1": lambda: make_row(model, data, prior, k=1),
        "copying, fixed": lambda: make_row(model, data, prior, trained=False),
        "copying, learned": lambda: make_row(model, data, prior),
        "with confidence": lambda: make_row(model, data, whole, transformer=False),
        "with residual": lambda: make_row(model, data, whole),
    }
    if without is not None:
        makers = {"no retrieval": lambda: make_row(without, data, whole), **makers}
    unknown = [name for name in which if name not in makers]
    if unknown:
        raise UserError(f"--rows: no row {unknown[0]!r}; there are {', '.join(map(repr, makers))}")
    return {name: make() for name, make in makers.items() if not which or name in which}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each part of a trained model adds.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--without-retrieval", type=Path, metavar="DIR", help="a run with mode none")
    parser.add_argument("--panel", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--typed", action="append", required=True, metavar="NAME=FILE", help="VCF or list of sites")
    parser.add_argument("--rows", nargs="*", default=[], help="only these")
    parser.add_argument("--stride", type=int, default=1, help="every so many windows only")
    parser.add_argument("--window-sites", type=int, help="cores of this length instead of the training's")
    parser.add_argument("--held-out", type=int, metavar="N", help="at most so many of the held-out samples")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def held_out(config: EmbragConfig, inputs: PanelInputs, sites: int | None) -> tuple[WindowedPanel, np.ndarray]:
    """The panel in the windows of the training, or with cores of ``sites`` sites, and the held-out samples' indices."""
    training, samples = split_samples(len(inputs.panel.samples), config.data.validation_samples, config.seed)
    settings = replace(config.data, window_sites=sites or config.data.window_sites)
    return windowed(inputs, settings, training), samples


def main() -> None:
    options = parse_arguments()
    require_writable(options.json)
    model = read_export(options.run_dir / MODEL_FILE)
    without = read_export(options.without_retrieval / MODEL_FILE) if options.without_retrieval else None
    inputs = open_inputs(PanelFiles(options.panel, options.map, options.samples), model.config.data)
    data, samples = held_out(model.config, inputs, options.window_sites)
    samples = samples[: options.held_out]
    rows = rows_of(model, without, data, options.rows)
    result = {}
    for each in options.typed:
        name, _, path = each.partition("=")
        logger.info("%s: %d held-out samples", name, len(samples))
        found = result[name] = score(rows, data, samples, read_manifest(Path(path), inputs.panel), options.stride)
        sys.stdout.write(f"| {name} | {' | '.join(BIN_NAMES)} |\n")
        for row, values in found.items():
            sys.stdout.write(f"| {row} | {' | '.join(f'{values[bin_name]:.4f}' for bin_name in BIN_NAMES)} |\n")
    write_json(options.json, {"samples": len(samples), "r2": result})


if __name__ == "__main__":
    run_command(main)
