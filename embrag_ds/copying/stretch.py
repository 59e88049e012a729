"""Stretches: what a panel, a model and the targets' typed sites give to the loop along a chromosome, made once for all.

Letters beside those of :mod:`embrag_ds.data.tokens`: G blocks of sites, J terms of the recombination prior.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from embrag_ds.copying.head import FEATURES
from embrag_ds.copying.records import Head, PanelPart, Rates
from embrag_ds.copying.sequences import count_minor, list_minor
from embrag_ds.data.windows import SiteFeatures, most_places, places
from embrag_ds.model.confidence import LEAST_PROBABILITY, log_cm
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.poolings.copying import LEAST_TYPED_NEAR, NEGLIGIBLE, CopyingPooling
from embrag_ds.ops.dosage import Numbered
from embrag_ds.ops.li_stephens import bounded


def panel_part(
    core: Callable[[slice], np.ndarray],
    typed: np.ndarray,
    rows: np.ndarray,
    position: np.ndarray,
    first: int,
    common: np.ndarray,
    population: np.ndarray,
) -> PanelPart:
    """A panel's part of a stretch.

    ``core`` gives packed alleles uint8 [n, ceil(H / 8)] of some sites of the core, which begins at the stretch's site
    ``first``. ``typed`` uint8 [T, H] are those of the typed sites ``rows`` int64 [T] of the stretch. ``position``
    float32 [sites] is in cM, ``common`` bool [L] marks sites whose ALT has a frequency above a half, and ``population``
    is int64 [H].
    """
    sites, haplotypes = len(common), typed.shape[1]
    cuts = rows[(rows >= first) & (rows < first + sites - 1)] + 1 - first
    blocks = Numbered.made(core, sites, haplotypes, cuts)
    intervals = np.searchsorted(np.searchsorted(rows, first + blocks.bounds[:-1]), np.arange(len(rows) + 2))
    turned = np.array(
        [
            (common[start:stop].astype(np.uint64) << np.arange(stop - start, dtype=np.uint64)).sum(dtype=np.uint64)
            for start, stop in pairwise(blocks.bounds)
        ],
        dtype=np.uint64,
    )
    sequences = np.concatenate([[0], np.cumsum(blocks.count)])
    start = np.zeros(sequences[-1] + 1, dtype=np.int64)
    count_minor(blocks.words, blocks.count, turned, sequences, start[1:])
    start = start.cumsum()
    minor = np.empty(start[-1], dtype=np.uint8)
    list_minor(blocks.words, blocks.count, turned, blocks.bounds, sequences, start, minor)
    left, right = flanking(rows, first, sites)
    here, before = position[first : first + sites], position[rows[left]]
    after = position[rows[right]]
    gap = after - before
    nearest = np.minimum(np.abs(here - before), np.abs(after - here))
    share = np.where(gap > 0, (here - before) / np.maximum(gap, 1e-12), 0).clip(0, 1).astype(np.float32)
    return PanelPart(
        packed=np.ascontiguousarray(np.packbits(typed, axis=0, bitorder="little")),  # or the loop is compiled twice
        position=position[rows],
        place=places(position, most_places(haplotypes))[0][rows],
        population=population,
        intervals=intervals,
        bounds=blocks.bounds,
        # Half the memory to read where it is enough, which it nearly always is.
        sequence=blocks.sequence.astype(np.uint16) if blocks.count.max() <= 1 << 16 else blocks.sequence,
        sequences=sequences,
        most_sequences=int(blocks.count.max()),
        minor_start=start,
        minor_sites=minor,
        share=share,
        minor_is_ref=common,
        nearest=log_cm(torch.from_numpy(nearest)).numpy(),
        gap=log_cm(torch.from_numpy(np.abs(gap))).numpy(),
    )


def flanking(rows: np.ndarray, first: int, sites: int) -> tuple[np.ndarray, np.ndarray]:
    """Typed sites that flank each site of a core, both int64 [L]; beyond the outermost, both are that one."""
    right = np.searchsorted(rows, np.arange(first, first + sites))
    last = len(rows) - 1
    return np.minimum(np.maximum(right - 1, 0), last), np.minimum(right, last)


def density(rows: np.ndarray, position: np.ndarray) -> float:
    """Typed sites per cM of a stretch, in units of 100."""
    length = max(float(position[-1] - position[0]), 1e-6)
    return len(rows) / (length * CopyingPooling.TYPICAL_DENSITY)


@torch.no_grad()
def model_rates(network: Imputer, features: SiteFeatures, rows: np.ndarray, haplotypes: int) -> Rates:
    """A model's numbers for a stretch with these site features, typed at ``rows`` int64 [T], with H ``haplotypes``."""
    pooling = network.pooling
    assert isinstance(pooling, CopyingPooling)
    position = torch.from_numpy(features.position)
    weight = network.embedding.site_weights(torch.from_numpy(features.frequency[rows]))
    weight = weight / weight.mean()
    gap = torch.diff(position[rows], prepend=position[rows[:1]])
    per_cm = torch.tensor([density(rows, features.position)])
    nats, recombination = bounded(*pooling.rates(gap[None], per_cm, weight[None]))
    place, number, place_cm = places(features.position, most_places(haplotypes))
    strength, decay = pooling.prior_terms(place_cm)
    typed = torch.from_numpy(np.bincount(place[rows], minlength=number).astype(np.float32))
    typed_at = torch.stack([_weighed(typed, float(each)) for each in decay]).clamp_min(LEAST_TYPED_NEAR)
    return Rates(
        ratio=torch.exp(-nats[:, 0]).numpy(),
        jump=recombination[:, 0].numpy(),
        strength=(100 * strength).numpy(),
        reach=decay.numpy(),
        typed_at=typed_at.numpy(),
        keep=np.float32(NEGLIGIBLE),
        background=np.float32(torch.sigmoid(network.background.float()).item()),
        least=np.float32(LEAST_PROBABILITY),
    )


def _weighed(values: Tensor, decay: float) -> Tensor:
    """Sum of ``values`` [G] around each place, those g places away times ``decay`` to the power of g."""
    before, after = values.double().clone(), values.double().clone()
    for place in range(1, len(values)):
        before[place] += decay * before[place - 1]
        after[-1 - place] += decay * after[-place]
    return (before + after - values).float()


@torch.no_grad()
def head_weights(network: Imputer, per_cm: float) -> Head:
    """Weights of a network's confidence head for a density of typed sites; without a head, those of no correction."""
    feature = np.float32(np.log(per_cm) / 2)
    if network.confidence is None:
        nothing = np.zeros((FEATURES, 1), dtype=np.float32)
        return Head(nothing, nothing[0], nothing[:1], nothing[0], nothing[0], np.float32(0), feature)
    first, second, last = (each for each in network.confidence.layers if isinstance(each, nn.Linear))
    weights, biases = (
        [getattr(each, name).float().cpu().numpy() for each in (first, second, last)] for name in ("weight", "bias")
    )
    return Head(
        np.ascontiguousarray(weights[0].T),
        biases[0],
        np.ascontiguousarray(weights[1].T),
        biases[1],
        weights[2][0].copy(),
        np.float32(biases[2][0]),
        feature,
    )
