"""Fit of the confidence head to what imputation sees: panel samples, each copied from the rest of the panel.

The optimiser's steps see windows, the haplotypes nearest to a query, and one batch after another. The loop of
imputation copies long stretches from all haplotypes, and gives the head's inputs of hundreds of samples in seconds.
Only the head learns from them, to a plateau (docs/log.md). Samples held out decide whether the fitted head is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from embrag_ds.copying.along import CopyAlong, Stretch
from embrag_ds.copying.model import CopyingModel
from embrag_ds.copying.stretch import most_stretch_sites
from embrag_ds.correction.network import network_part
from embrag_ds.correction.tiles import TransformerTiles
from embrag_ds.data.panel import counted_haplotypes
from embrag_ds.data.sampler import exclusion_table
from embrag_ds.data.windows import DataConfig, Window, WindowedPanel, spread
from embrag_ds.export import ExportedModel
from embrag_ds.model.confidence import ODDS, ConfidenceHead
from embrag_ds.progress import Progress

logger = logging.getLogger(__name__)

_STRETCH_SITES = 1 << 14
_FLANK_SITES = 1 << 12
MOST_STRETCHES = 3
_MOST_ROWS = 1_200_000
"""Rows to learn from: of many samples a part of each, which teaches more than all of a few (docs/log.md)."""
_LEAST_SAMPLES = 64
_MOST_SECONDS = 10.0
"""Of two cores, for the samples to learn from."""
# Seconds of a state, and of a weight at a site, measured on two cores of a server from 2022.
_PER_STATE_S = 1.3e-9
_PER_WEIGHT_S = 4e-11
_AT_ONCE = 32  # samples, of which each has frequencies of its own
_MOST_SITES = {0.0: 1 << 15, 0.01: 1 << 12, 0.05: 1 << 9}
"""Sites that are learned from in all, of a minor-allele frequency from this one to the next.

The rarest matter most, and a common one has rows for every haplotype.
"""
_MOST_BATCH, _LEAST_BATCH = 4096, 256
_BATCHES = 64
"""Batches of a pass, where there are enough rows for batches of the least size and too few for the largest."""
_PASSES, _MOST_ROUNDS = 6, 8
"""Passes of a round, and rounds at most."""
_LEAST_GAIN = 1e-3
"""Part of the loss of the samples held out that a round must take off for another one to follow."""
_UNLIKELY, _KEPT = 0.01, 0.25
"""Of genotypes where copying gives the minor allele less than the first, a share: most are those, and teach little."""
_RATE = 4e-3
_BETAS = (0.9, 0.99)
_ROWS_AT_ONCE = 1 << 16
_LEAST = 1e-7  # nearer to 1 there is no float32 but one


@dataclass(frozen=True)
class Rows:
    """Inputs of the confidence head at n genotypes, ``features`` float32 [n, 12], and what they should say.

    ``residual`` float32 [n] is the transformer's correction of the minor allele's log-odds. ``carries`` float32 [n] is
    1 where the haplotype has that allele, else 0.
    """

    features: np.ndarray
    residual: np.ndarray
    carries: np.ndarray

    def __len__(self) -> int:
        return len(self.carries)

    def at(self, chosen: np.ndarray) -> Rows:
        """The rows with these numbers."""
        return Rows(*(each[chosen] for each in self.arrays))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Its arrays, in order."""
        return self.features, self.residual, self.carries


@dataclass(frozen=True)
class Thinning:
    """A draw from rows by ``rng``: ``share`` of those with a likely minor allele, and a quarter of that of others."""

    share: float
    rng: np.random.Generator

    @staticmethod
    def to_most(rows: Rows, samples: float, rng: np.random.Generator) -> Thinning:
        """One that leaves about as many rows as are learned from, of ``samples`` times as many as these ``rows``."""
        number = samples * float(np.where(_likely(rows), 1.0, _KEPT).sum())
        return Thinning(min(1.0, _MOST_ROWS / max(1.0, number)), rng)

    def of(self, rows: Rows) -> Rows:
        """The rows that are drawn."""
        kept = np.where(_likely(rows), self.share, _KEPT * self.share)
        return rows.at(np.flatnonzero(self.rng.random(len(rows)) < kept))


def _likely(rows: Rows) -> np.ndarray:
    """Rows where copying gives the minor allele a probability of :data:`_UNLIKELY` or more, bool [n]."""
    likely: np.ndarray = rows.features[:, 0] * ODDS >= math.log(_UNLIKELY / (1 - _UNLIKELY))
    return likely


@dataclass(frozen=True)
class HeadFit:
    """What became of a fit: ``rows`` it learned from, its ``rounds``, and the cross-entropy of the samples held out.

    That is in nats per row, ``before`` the fit and ``after`` its best round, which is ``kept`` if it lowered it.
    """

    rows: int
    rounds: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the fitted head is in use."""
        return self.after < self.before


def stretch_settings(settings: DataConfig, typed: float, haplotypes: int) -> DataConfig:
    """Settings with stretches for windows, for a panel of so many ``haplotypes`` and a share ``typed`` of sites."""
    sites = max(settings.window_sites, min(_STRETCH_SITES, most_stretch_sites(typed, haplotypes)))
    flank = min(_FLANK_SITES, settings.flank_sites)
    return replace(settings, window_sites=sites, overlap_sites=0, flank_sites=flank, windows_file=None)


class PanelRows:
    """Rows of panel samples on the stretches ``data``, at sites that are not ``typed`` bool [S].

    ``model`` is one that copies haplotypes; without its ``transformer`` there is no residual. Every stretch has a typed
    site and one to predict.
    """

    def __init__(self, model: ExportedModel, transformer: bool, data: WindowedPanel, typed: np.ndarray):
        config = model.config
        self._data = data
        self._typed = typed
        copying = CopyingModel(model.arrays, config.model.good_turing)
        self._copy = CopyAlong(copying, data, exclusion_table(data.reference.panel.samples, None))
        self._transformer, self._weights = None, 0
        if transformer:
            self._transformer = TransformerTiles(network_part(*model.parts, config.model), config.data)
            self._weights = config.model.block_weights
        self._noted = self._spread_sites()

    def _spread_sites(self) -> np.ndarray:
        """The sites whose rows are wanted, bool [S]."""
        reference = self._data.reference
        maf = np.minimum(reference.allele_frequency, 1 - reference.allele_frequency)
        inside = np.zeros(len(self._typed), dtype=bool)
        for window in self._data.windows:
            inside[window.core_sites] = True
        inside &= ~self._typed & reference.passes_minimum_count
        noted = np.zeros_like(inside)
        for (low, most), high in zip(_MOST_SITES.items(), [*_MOST_SITES, 1.0][1:], strict=True):
            found = np.flatnonzero(inside & (maf >= low) & (maf < high))
            noted[found[spread(len(found), most)]] = True
        return noted

    @property
    def most_samples(self) -> int:
        """Samples that are imputed in little time; 0 if a transformer takes long."""
        typed = sum(int(self._typed[each.sites].sum()) for each in self._data.windows)
        sites = sum(each.core_stop - each.core_start for each in self._data.windows)
        of_sample = 2 * (typed * len(self._data.reference) * _PER_STATE_S + sites * self._weights * _PER_WEIGHT_S)
        affordable = int(_MOST_SECONDS / of_sample)
        if self._transformer is None:
            return max(_LEAST_SAMPLES, affordable)
        return affordable if affordable >= _LEAST_SAMPLES else 0

    def of(self, samples: np.ndarray, thinning: Thinning | None = None) -> Rows:
        """Rows of ``samples`` int64 [N], by their numbers in the panel, all or thinned; no sample copies itself.

        Left out are those at sites that would not be in the panel without the sample, by its minimum allele count.
        """
        parts: list[Rows] = []
        with Progress("imputing panel samples", len(self._data.windows) * len(samples), "samples") as progress:
            for window in self._data.windows:
                stretch = self._copy.stretch(window.index, self._typed[window.sites])
                for start in range(0, len(samples), _AT_ONCE):
                    some = samples[start : start + _AT_ONCE]
                    found = self._of_stretch(stretch, window, some)
                    parts.append(found if thinning is None else thinning.of(found))
                    progress.advance(len(some))
        return Rows(*(np.concatenate(each) for each in zip(*(each.arrays for each in parts), strict=True)))

    def _of_stretch(self, stretch: Stretch, window: Window, samples: np.ndarray) -> Rows:
        """Rows of some samples on a stretch, which is a window of the data."""
        reference = self._data.reference
        core = np.arange(window.core_start, window.core_stop)
        columns = (2 * samples[:, None] + np.arange(2)).ravel()
        inside = np.isin(samples, reference.samples)
        typed = np.ascontiguousarray(reference.panel.alleles_at(window.start + stretch.rows, columns).T)
        noted = np.ascontiguousarray(self._noted[window.core_sites])
        probability = np.empty((len(columns), len(core)), dtype=np.float32)
        found, copied = self._copy.head_rows(stretch, typed, np.where(inside, samples, -1), noted, probability)
        residual = np.zeros(len(found.sites), dtype=np.float32)
        if self._transformer is not None:
            before = _logit(probability[found.haplotypes, found.sites])
            self._transformer.add_along(probability, copied, stretch, self._data, typed, _unwatched)
            residual = _logit(probability[found.haplotypes, found.sites]) - before
            residual[found.to_ref] *= -1
        chosen = found.minor_count >= reference.panel.minimum_allele_count
        if reference.panel.ploidy is not None:
            counted = counted_haplotypes(reference.panel.ploidy.at(core)[:, samples])
            chosen &= counted[found.sites, found.haplotypes]
        alleles = reference.panel.alleles_at(core, columns)[found.sites, found.haplotypes]
        carries = (alleles != found.to_ref).astype(np.float32)
        return Rows(found.features, residual, carries).at(np.flatnonzero(chosen))


def _unwatched(sites: int) -> Callable[[int], None]:
    """No watch: a few samples take a second."""
    return lambda haplotypes: None


def fit_head(head: ConfidenceHead, learning: Rows, held_out: Rows, rng: np.random.Generator) -> HeadFit:
    """Fit ``head``, on the CPU, to the rows to learn from; it stays as it was if those held out are worse for it.

    Rounds of steps on the cross-entropy of the minor allele follow each other as long as they lower that of the rows
    held out noticeably. The best head is kept.
    """
    before, start = _loss(head, held_out), _weights(head)
    after, best, rounds, gains = math.inf, start, 0, True
    while gains and rounds < _MOST_ROUNDS:
        rounds += 1
        _learn(head, learning, rng, rounds)
        loss = _loss(head, held_out)
        gains = loss < (1 - _LEAST_GAIN) * after
        if loss < after:
            after, best = loss, _weights(head)
    found = HeadFit(len(learning), rounds, before, after)
    head.load_state_dict(best if found.kept else start)
    logger.info(
        "confidence head fitted to %s genotypes: cross-entropy of the samples held out %.5f -> %.5f; %s",
        f"{found.rows:,}",
        found.before,
        found.after,
        "kept" if found.kept else "that is no better, so it stays as it was",
    )
    return found


def _weights(head: ConfidenceHead) -> dict[str, Tensor]:
    """The head's weights, which stay as they are."""
    return {name: value.clone() for name, value in head.state_dict().items()}


def _learn(head: ConfidenceHead, rows: Rows, rng: np.random.Generator, number: int) -> None:
    """Take the steps of a round, of this ``number``: by Adam (Kingma and Ba 2015), with half a cosine."""
    given = tuple(map(torch.from_numpy, rows.arrays))
    batch = min(len(rows), max(_LEAST_BATCH, min(_MOST_BATCH, len(rows) // _BATCHES)))
    of_pass = len(rows) // batch
    optimizer = torch.optim.Adam(head.parameters(), lr=_RATE, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _PASSES * of_pass)
    title = f"fitting the confidence head, round {number}"
    with Progress(title, _PASSES * of_pass, "steps") as progress, torch.enable_grad():
        for _ in range(_PASSES):
            order = torch.from_numpy(rng.permutation(len(rows)))
            for chosen in order[: of_pass * batch].split(batch):
                optimizer.zero_grad()
                _cross_entropy(head, *(each[chosen] for each in given)).backward()
                optimizer.step()
                schedule.step()
                progress.advance()


def _cross_entropy(head: ConfidenceHead, features: Tensor, residual: Tensor, carries: Tensor) -> Tensor:
    """Mean cross-entropy of some rows, in nats."""
    return binary_cross_entropy_with_logits(head.minor_odds(features) + residual, carries)


def _loss(head: ConfidenceHead, rows: Rows) -> float:
    """Cross-entropy of all rows in nats, their mean."""
    total = 0.0
    parts = (torch.from_numpy(each).split(_ROWS_AT_ONCE) for each in rows.arrays)
    with torch.no_grad():
        for part in zip(*parts, strict=True):
            total += float(_cross_entropy(head, *part)) * len(part[0])
    return total / len(rows)


def _logit(probability: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities float32, float32 and finite."""
    exact = probability.astype(np.float64).clip(_LEAST, 1 - _LEAST)
    found: np.ndarray = np.log(exact / (1 - exact)).astype(np.float32)
    return found
