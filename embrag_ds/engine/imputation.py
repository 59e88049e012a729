"""Imputation: phased targets typed at some sites in, every panel site out.

Windows are computed one after another and blended over their overlap; sites are written as soon as no
later window can change them, so memory holds two windows of the targets, whatever the chromosome; the rest of
them, typed sites only, is packed on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import embrag_ds
from embrag_ds.data.dataset import DataConfig, Samples, WindowedPanel, exclusion_table
from embrag_ds.data.targets import Targets
from embrag_ds.data.vcf_output import ImputedVcfWriter
from embrag_ds.data.windows import blend_weights, uncovered
from embrag_ds.engine.checkpoint import ExportedModel
from embrag_ds.engine.inputs import PanelInputs, windowed
from embrag_ds.engine.reference import Reference
from embrag_ds.errors import UserError
from embrag_ds.model.imputer import Imputer
from embrag_ds.retrieval.collate import Batch
from embrag_ds.retrieval.prefetch import Prefetcher

_AHEAD = 1
_TIMES_AS_LONG = 4
_MOST_CORE_BYTES = 1 << 28


def _with_longer_windows(settings: DataConfig, haplotypes: int) -> DataConfig:
    """Longer cores, for the same flanks are retrieved from and copied along for each; retrieval and copying do not ask
    how long a core is, as the transformer does. The alleles of the panel's ``haplotypes`` in a core are in memory."""
    most = max(settings.window_sites, _MOST_CORE_BYTES // haplotypes)
    return replace(settings, window_sites=min(_TIMES_AS_LONG * settings.window_sites, most))


class Imputation:
    """An exported model applied to a panel: one window and one block of people at a time."""

    def __init__(
        self, model: ExportedModel, inputs: PanelInputs, device: torch.device, block: int, transformer: bool = True
    ):
        """``block`` people at a time; ``transformer``: :meth:`embrag_ds.model.imputer.Imputer.forward`. Without it
        windows are longer."""
        config = model.config
        everybody = np.arange(len(inputs.panel.samples))
        settings = config.data if transformer else _with_longer_windows(config.data, 2 * len(everybody))
        self.data: WindowedPanel = windowed(inputs, settings, everybody)
        left_out = uncovered(self.data.windows, len(inputs.panel.sites))
        if left_out:
            raise UserError(
                f"{config.data.windows_file}: {left_out} panel sites lie in no window; imputation needs all"
            )
        self._device = device
        self._block = block
        self._transformer = transformer
        self._samples = inputs.panel.samples
        self._network = Imputer(config.model)
        self._network.load_state_dict(model.weights)
        self._network.to(device).eval()
        exclusions = exclusion_table(inputs.panel.samples, None)
        self._reference = Reference(config.retrieval, self.data, self._network.embedding, device, exclusions)
        if model.snapshot is not None:
            self._reference.restore(model.snapshot)
        self._collate = self._reference.collator(block, slots=_AHEAD + 2)

    def windows(self, targets: Targets) -> Iterator[tuple[int, np.ndarray]]:
        """(window, ALT probability of every target haplotype in its core, float32 [2N, L]), in order.

        While the network works on one block of people, retrieval works on the next.
        """
        number = {sample: code for code, sample in enumerate(self._samples)}
        people = np.array([number.get(sample, -1) for sample in targets.samples], dtype=np.int64)
        starts = range(0, len(people), self._block)

        def build(block: int) -> Batch:
            index, place = divmod(block, len(starts))
            window = self.data.windows[index]
            span = slice(window.start, window.stop)
            group = people[starts[place] :][: self._block]
            samples = Samples(
                window=window.index,
                people=group,
                alleles=targets.alleles(span, slice(starts[place], starts[place] + len(group))),
                hidden=np.repeat(~targets.typed[span][None], len(group), axis=0),
            )
            return self._collate(samples, step=0)

        with closing(Prefetcher(build, 0, len(self.data.windows) * len(starts), _AHEAD)) as batches:
            for window in self.data.windows:
                yield window.index, np.concatenate([self._probability(batches.next()) for _ in starts])

    @torch.no_grad()
    def _probability(self, batch: Batch) -> np.ndarray:
        return self._network(batch, self._transformer).logits.sigmoid().cpu().numpy()


def impute_to_vcf(imputation: Imputation, targets: Targets, out: Path, say: Callable[[str], None]) -> None:
    """Impute every window, blend the overlaps, and write a bgzipped, indexed VCF."""
    windows = imputation.data.windows
    sites = imputation.data.reference.panel.sites
    weights = blend_weights(windows)
    source = f"embrag_ds {embrag_ds.__version__}"
    pending = np.zeros((2 * len(targets.samples), 0), dtype=np.float32)
    written = 0
    spoken = time.monotonic()
    with ImputedVcfWriter(out, sites, targets.samples, source) as writer:
        for number, probability in imputation.windows(targets):
            window = windows[number]
            # ``pending`` holds the blended part of the windows so far, from site ``written`` on.
            grown = np.zeros((len(pending), window.core_stop - written), dtype=np.float32)
            grown[:, : pending.shape[1]] = pending
            grown[:, window.core_start - written :] += probability * weights[number].astype(np.float32)
            last = number + 1 == len(windows)
            settled = window.core_stop if last else windows[number + 1].core_start
            span = slice(written, settled)
            everybody = slice(0, len(targets.samples))
            writer.write(written, grown[:, : settled - written], targets.typed[span], targets.alleles(span, everybody))
            pending = grown[:, settled - written :]
            written = settled
            if time.monotonic() - spoken > 2 or last:
                say(f"imputed window {number + 1}/{len(windows)}, {written}/{len(sites)} sites")
                spoken = time.monotonic()
