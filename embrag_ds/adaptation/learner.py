"""What an adaptation learns from and is judged by: windows, panel samples, and the sites that targets are typed at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from embrag_ds.adaptation.fitting import FROZEN, FROZEN_AMONG_FEW, fit
from embrag_ds.adaptation.head import MOST_STRETCHES, HeadFit, PanelRows, Thinning, fit_head, stretch_settings
from embrag_ds.adaptation.held_out import HeldOut, MaskScores, Tally
from embrag_ds.adaptation.pairs import Pairs
from embrag_ds.adaptation.settings import StepSize
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.masking import MaskingConfig
from embrag_ds.data.panel import PanelSubset
from embrag_ds.data.sampler import QueryBatch, TrainingSampler, exclusion_table, split_samples
from embrag_ds.data.windows import DataConfig, Window, WindowedPanel, spread
from embrag_ds.export import ExportedModel
from embrag_ds.model.imputer import Prediction
from embrag_ds.model.losses import imputation_loss
from embrag_ds.model.row_blocks import RowBlocks
from embrag_ds.ops.threads import undivided
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.collate import receive
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.search import present_backend
from embrag_ds.runtime.streams import use_device
from embrag_ds.seeds import Purpose, generator

SEED = 1
"""Seed of held-out samples and batches: an adaptation repeats exactly."""
LEAST_TYPED = 10
"""Typed sites without which a window teaches nothing about copying."""
_MOST_WINDOWS = 128
_HELD_OUT_SAMPLES = 48
_HELD_OUT_PART = 5
"""Of a small panel, one sample in so many is held out: fewer cannot tell a better model from a worse one."""
_HELD_OUT_WINDOWS = 12
_TRIAL_BATCHES = 6
_BATCH = 16
"""Samples of a batch."""
_AHEAD = 2
_MASKING = MaskingConfig(policies={"array": 1.0}, scope="window")


@dataclass(frozen=True)
class Source:
    """Panel, typed sites and device of an adaptation.

    ``typed`` bool [S] marks the sites that the targets are typed at. ``samples`` int64 [N] are the panel samples to
    use: those that are no targets. Without ``transformer``, its residual is neither used nor trained. ``bf16`` has the
    network's matrix products in bf16.
    """

    inputs: PanelInputs
    typed: np.ndarray
    samples: np.ndarray
    device: torch.device
    transformer: bool
    bf16: bool

    @cached_property
    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples to learn from and those held out, both int64 panel indices."""
        learning, held_out = split_samples(len(self.samples), _HELD_OUT_SAMPLES, SEED, _HELD_OUT_PART)
        return self.samples[learning], self.samples[held_out]

    @cached_property
    def reference(self) -> PanelSubset:
        """The samples to learn from, which are the reference set, too."""
        return PanelSubset(self.inputs.panel, self.inputs.populations, self.split[0])

    def windows(self, model: ExportedModel) -> list[Window]:
        """Windows to learn from, numbered anew and spread evenly over those that qualify.

        A window qualifies by enough typed sites, flanks included, and by a site to predict in its core.
        """
        return self._qualified(model.config.data, _MOST_WINDOWS)

    def stretches(self, model: ExportedModel) -> list[Window]:
        """Stretches whose genotypes the confidence head is fitted to; they qualify as windows do.

        There are none for a model that does not copy haplotypes.
        """
        if not model.config.copies:
            return []
        long = stretch_settings(model.config.data, float(self.typed.mean()), len(self.reference))
        return self._qualified(long, MOST_STRETCHES)

    def _qualified(self, settings: DataConfig, most: int) -> list[Window]:
        typed = np.concatenate([[0], np.cumsum(self.typed)])
        scored = np.concatenate([[0], np.cumsum(~self.typed & self.reference.passes_minimum_count)])
        found = [
            each
            for each in settings.windows(self.inputs.panel)
            if typed[each.stop] - typed[each.start] >= LEAST_TYPED and scored[each.core_stop] > scored[each.core_start]
        ]
        chosen = spread(len(found), most)
        return [replace(found[place], index=number) for number, place in enumerate(chosen)]


@dataclass(frozen=True)
class HeldOutScores:
    """Training ``loss`` and other ``scores`` of the samples held out, and their genotypes, a window each."""

    loss: float
    scores: MaskScores
    pairs: list[Pairs]


class Learner:
    """A network that learns from most samples of a panel, and is scored on those held out.

    Its weights are those of ``model`` at first, and its genetic distances those of the panel times ``map_scale``.
    """

    def __init__(self, source: Source, model: ExportedModel, windows: list[Window], map_scale: float):
        self._source = source
        self._model, self._loss = model, model.config.loss
        inputs, device = source.inputs, source.device
        use_device(device)
        self._data = WindowedPanel(source.reference, windows, inputs.position_cm * map_scale, source.typed)
        self._sampler = TrainingSampler(self._data, _MASKING, SEED, _BATCH, augmentation=model.config.augmentation)
        self.network = model.network().to(device)
        # Threads would draw dropout in any order.
        in_blocks = device.type == "cpu" and not model.config.model.dropout
        self.network.row_blocks = RowBlocks() if in_blocks else None
        self._reference = Reference(
            model.config.retrieval,
            self._data,
            self.network.embedding,
            device,
            exclusion_table(inputs.panel.samples, None),
            snapshot=model.snapshot,
        )
        self._reference.backend = present_backend(self._reference.backend, device)
        self._collate = self._reference.collator(_BATCH, slots=_AHEAD + 2)
        self._held_out = HeldOut(self._data, source.split[1], _BATCH)

    @property
    def batches(self) -> int:
        """Number of different batches: pairs of a window and a group of samples."""
        return self._sampler.micro_batches_per_epoch

    def step_size(self) -> StepSize:
        """Sizes of one step, as a mean over the windows."""
        data = self._data
        return StepSize(
            rows=2 * min(_BATCH, len(self._source.split[0])),
            haplotypes=len(data.reference),
            typed=float(np.mean([self._source.typed[each.sites].sum() for each in data.windows])),
            neighbours=self._collate.k,
            core=float(np.mean([each.core_stop - each.core_start for each in data.windows])),
        )

    def loss(self) -> float:
        """Training loss of the network over the first few batches, the same for all learners from a source."""
        losses = []
        with closing(self._batches(_TRIAL_BATCHES)) as batches, self._computing(), torch.no_grad():
            for _ in range(_TRIAL_BATCHES):
                losses.append(self.network(batches.next(), self._source.transformer, loss=self._loss).total)
        return float(torch.stack(losses).mean())

    def learn(self, steps: int) -> None:
        """Take ``steps`` optimiser steps."""
        with closing(self._batches(steps)) as batches, self._computing():
            few = 2 * self._collate.k < len(self._data.reference)
            frozen = (*FROZEN, *FROZEN_AMONG_FEW) if few else FROZEN
            fit(self.network, batches, steps, self._loss, self._source.transformer, SEED, frozen)

    def fit_head(self) -> HeadFit | None:
        """Fit the confidence head to panel samples as imputation sees them; None if there is nothing to learn from."""
        source, head = self._source, self.network.confidence
        stretches = source.stretches(self._model)
        if not stretches or head is None:
            return None
        now = ExportedModel.of(self._model.config, self.weights(), self._model.snapshot)
        data = WindowedPanel(source.reference, stretches, self._data.position_cm)
        rows = PanelRows(now, source.transformer, data, source.typed)
        most, (many, few) = rows.most_samples, source.split
        if not most:
            return None
        held_out = rows.of(few)
        if not len(held_out):
            return None
        chosen, rng = many[spread(len(many), most)], generator(Purpose.HEAD_ROWS, SEED)
        learning = rows.of(chosen, Thinning.to_most(held_out, len(chosen) / len(few), rng))
        if not len(learning):
            return None
        with undivided():
            found = fit_head(head.cpu(), learning, held_out, rng)
        head.to(source.device)
        return found

    def scores(self) -> HeldOutScores:
        """Scores of the samples held out, over a few windows."""
        tally, losses, pairs = Tally(), [], []

        def predict(batch: Batch) -> Prediction:
            found: Prediction = self.network(batch, self._source.transformer)
            core = batch.core
            loss = imputation_loss(found.logits, core.alleles, core.scored, core.sites.frequency, self._loss)
            losses.append(loss.total * (len(core.tokens) / (2 * len(self._held_out.samples))))
            return found

        data = self._data
        chosen = spread(len(data), _HELD_OUT_WINDOWS)
        with self._computing():
            for window in chosen:
                masked = ~self._source.typed[data.windows[window].sites]
                measured = self._held_out.measure(window, masked, predict, self._batch)
                tally.add(measured)
                pairs.append(Pairs(measured.haplotypes, measured.truth, measured.diploid))
        return HeldOutScores(float(torch.stack(losses).sum()) / len(chosen), tally.scores(), pairs)

    def weights(self) -> dict[str, Tensor]:
        """The network's weights, fp32 on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}

    def _batch(self, queries: QueryBatch) -> Batch:
        return receive(self._collate(queries, 0))

    def _batches(self, number: int) -> Prefetcher:
        return Prefetcher(lambda place: self._collate(self._sampler.queries(place), 0), 0, number, _AHEAD)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Context of the network's computations, whose results are the same for any number of threads."""
        device = self._source.device.type
        with undivided(), torch.autocast(device, torch.bfloat16, enabled=self._source.bf16):
            yield
