"""What a target haplotype copies: probabilities of the panel's haplotypes along the chromosome, to look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from embrag_ds.data.cache import scratch_folder
from embrag_ds.data.inputs import PanelFiles, PanelInputs, cache_directory, open_inputs, settings_for, windowed
from embrag_ds.data.packing.reading import TARGET
from embrag_ds.data.panel import open_panel
from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.data.targets import Targets, match_targets, open_targets
from embrag_ds.errors import UserError
from embrag_ds.export import PRETRAINED, ExportedModel, read_export
from embrag_ds.model.poolings.copying import CopyingPooling
from embrag_ds.retrieval.reference import Reference
from embrag_ds.variants.sites import SiteTable

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Copied:
    """What one target haplotype copies from a panel of H haplotypes and S sites, T of which are typed.

    * ``sites``: the panel's site table; ``samples``: its samples, of which sample i owns the haplotypes 2i and 2i + 1.
    * ``typed`` int64 [T]: rows of the typed sites.
    * ``probability`` float32 [T, H]: that each haplotype is copied at each typed site, by the slow copying model. They
      sum to 1, and negligible ones are 0.
    * ``dosage`` float32 [S]: expected allele at every site, 0 for REF and 1 for ALT, from both copying models. On a
      contig without typed sites it is the allele frequency.
    """

    sites: SiteTable
    samples: tuple[str, ...]
    typed: np.ndarray
    probability: np.ndarray
    dosage: np.ndarray


def copied_by(
    sample: str,
    haplotype: int,
    files: PanelFiles,
    target: Path,
    *,
    model: Path = PRETRAINED,
    cache_dir: Path | None = None,
) -> Copied:
    """What the first (0) or second (1) ``haplotype`` of a ``sample`` in the file ``target`` copies from a panel.

    All haplotypes of the panel may be copied, but a sample's own. ``model`` is an exported model, and the packed panel
    lies in ``cache_dir``. Memory grows with the typed sites times the panel's haplotypes, several float32 for each:
    give files of a region where the panel is large.

    Raises :class:`UserError` for faulty files, a sample that is not in the file, and a model that does not copy.
    """
    settings = settings_for(cache_dir)
    exported = read_export(model)
    if exported.config.model.fusion != "copying":
        raise UserError(f"{model}: it has the fusion {exported.config.model.fusion}; give a model with copying")
    if haplotype not in (0, 1):
        raise UserError(f"haplotype {haplotype}: a sample has the haplotypes 0 and 1")
    inputs = open_inputs(files, settings, progress=False)
    with scratch_folder(cache_directory(settings), "copied-") as scratch:
        opened = open_panel(target, scratch, progress=False, reading=TARGET)
        if sample not in opened.samples:
            raise UserError(f"{target}: it has no sample {sample}; the first is {opened.samples[0]}")
        targets = open_targets(opened, match_targets(opened, inputs.panel, "report", True), inputs.panel)
        return _copied(exported, inputs, targets, opened.samples.index(sample), haplotype)


@torch.no_grad()
def _copied(model: ExportedModel, inputs: PanelInputs, targets: Targets, number: int, haplotype: int) -> Copied:
    """:func:`copied_by` for the target with a ``number`` in the file."""
    sites, samples = inputs.panel.sites, inputs.panel.samples
    # A contig is one window: the copying model sees all of it.
    settings = replace(model.config.data, window_sites=max(2, len(sites)), overlap_sites=0, windows_file=None)
    data = windowed(inputs, settings, np.arange(len(samples)))
    network = model.network()
    assert isinstance(network.pooling, CopyingPooling)
    retrieval = replace(model.config.retrieval, mode="embedding", store="factored", encoding="live", backend="torch")
    reference = Reference(retrieval, data, network.embedding, _CPU, exclusion_table(samples, None))
    collate = reference.collator(1, whole=True)
    dosage = data.reference.allele_frequency.astype(np.float32)
    found = []
    in_panel = samples.index(targets.samples[number]) if targets.samples[number] in samples else -1
    for window in data.windows:
        typed = targets.typed[window.sites]
        if not typed.any():
            continue
        of_sample = slice(number, number + 1)
        queries = QueryBatch(
            window=window.index,
            samples=np.array([in_panel]),
            alleles=targets.alleles(window.sites, of_sample),
            masked=~typed[None],
            missing=targets.missing_alleles(window.sites, of_sample),
        )
        batch = collate(queries, step=0)
        assert batch.retrieved is not None
        weight = network.embedding.site_weights(batch.window.sites.frequency)
        given = batch, batch.retrieved, weight / weight.mean()
        slow, _ = network.pooling.posteriors(*given)
        ids = batch.retrieved.ids[haplotype].numpy()
        probability = np.zeros((int(typed.sum()), 2 * len(samples)), dtype=np.float32)
        probability[:, ids] = slow[haplotype].numpy()
        found.append(probability)
        dosage[window.core_sites] = network.pooling(*given).dosage[haplotype].numpy()
    return Copied(sites, samples, targets.sites, np.concatenate(found), dosage)
