"""Imputation along stretches of a chromosome on a CPU: each is copied once, by a loop without torch.

A model that copies haplotypes needs nothing else without its transformer (:mod:`embrag_ds.copying.along`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from embrag_ds.copying.along import CopyAlong, Stretch
from embrag_ds.copying.model import CopyingModel
from embrag_ds.copying.stretch import MOST_STRETCH_BYTES, most_stretch_sites
from embrag_ds.correction.tiles import TransformerTiles
from embrag_ds.data.sampler import exclusion_table
from embrag_ds.data.targets import Targets
from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import DataConfig, Window, WindowedPanel
from embrag_ds.export import ExportedModel
from embrag_ds.progress import Progress

_MOST_STRETCH_SITES = 1 << 15
_MOST_TABLE_BYTES = 1 << 31
_TABLES = 4
_BYTES_OF_A_STATE = 64
_TRANSFORMED_AT_ONCE = 512
_PANEL_SAMPLES_AT_ONCE = 32  # of which each has frequencies of its own
_PASSES_OF_TRANSFORMER = 2  # of a loop's, by its time

Precision = Literal["bf16", "fp32"]
"""Of a network's matrix products."""
Way = Literal["windows", "loop", "whole"]
"""How haplotypes are copied: in windows from the nearest, or along stretches from all, by a CPU's loop or on a GPU."""


def with_stretches(
    settings: DataConfig, haplotypes: int, targets: Targets, way: Way, memory: float = math.inf
) -> DataConfig:
    """Settings with stretches in place of windows, for a ``way`` that copies them whole.

    The copying model runs along the flanks of every window, so fewer and longer ones are faster. Memory limits them.
    On a CPU each of these stays below 256 MiB: sequences of the core, one for each of the panel's ``haplotypes`` and
    block of sites, and the targets' dosages. With the transformer, what it reads takes 16 bytes for a site and a sample
    of a block, 256 MiB for 512 of them. On a GPU tables of the core's alleles stay below 2 GiB, and the posteriors
    of a sample below half of its ``memory`` in bytes.
    """
    typed = float(targets.typed.mean())
    of_dosages = 8 * len(targets.samples)
    if way == "loop":
        most = min(most_stretch_sites(typed, haplotypes), MOST_STRETCH_BYTES / of_dosages)
    else:
        of_posteriors = posterior_bytes(typed, haplotypes)
        with_flanks = memory / 2 / of_posteriors if of_posteriors else math.inf
        tables = _MOST_TABLE_BYTES / (_TABLES * haplotypes)
        most = min(MOST_STRETCH_BYTES / of_dosages, tables, max(0, with_flanks - 2 * settings.flank_sites))
    return replace(settings, window_sites=max(settings.window_sites, min(_MOST_STRETCH_SITES, int(most))))


def posterior_bytes(typed: float, haplotypes: int) -> float:
    """Bytes that a sample's posteriors at so many typed sites take on a GPU, with what they are made from."""
    return 2 * _BYTES_OF_A_STATE * typed * haplotypes


def progress_of(windows: list[Window], samples: int) -> Progress:
    """Progress of computing these windows' cores for so many samples."""
    sites = sum(each.core_stop - each.core_start for each in windows)
    return Progress("imputing", sites * samples)


class Stretches:
    """A model's dosages by the loop, one stretch of ``data`` and ``block`` samples of the ``targets`` at a time.

    ``numbers`` int64 [N] are those of the targets in the panel, -1 for those outside. By default a block has all
    samples, so that threads do not wait for each other, 512 with the transformer, and 32 where some are in the panel.
    The residual of the ``transformer`` is added where it is given.
    """

    def __init__(
        self,
        model: ExportedModel,
        data: WindowedPanel,
        targets: Targets,
        numbers: np.ndarray,
        block: int | None,
        transformer: TransformerTiles | None,
    ):
        self._data = data
        self._targets = targets
        self._numbers = numbers
        self._transformer = transformer
        default = len(numbers) if transformer is None else _TRANSFORMED_AT_ONCE
        self._block = block or (_PANEL_SAMPLES_AT_ONCE if (numbers >= 0).any() else default)
        copying = CopyingModel(model.arrays, model.config.model.good_turing)
        self._copy = CopyAlong(copying, data, exclusion_table(data.reference.panel.samples, None))

    def windows(self, chosen: list[Window]) -> Iterator[tuple[Window, np.ndarray]]:
        """Iterate over ``chosen`` stretches and the ALT probabilities float32 [2N, L] in their cores."""
        typed = [each for each in chosen if self._targets.typed[each.sites].any()]
        passes = 1 if self._transformer is None else 1 + _PASSES_OF_TRANSFORMER
        with progress_of(typed, passes * len(self._numbers)) as progress:
            for window in chosen:
                yield window, self._stretch(window, progress)

    def _stretch(self, window: Window, progress: Progress) -> np.ndarray:
        """ALT probabilities float32 [2N, L] in the core of a stretch."""
        targets, numbers = self._targets, self._numbers
        frequency = self._data.reference.allele_frequency[window.core_sites]
        probability = np.empty((2 * len(numbers), len(frequency)), dtype=np.float32)
        typed = targets.typed[window.sites]
        if not typed.any():
            probability[:] = frequency
            return probability
        stretch = self._copy.stretch(window.index, typed)
        typed_sites = slice(*np.searchsorted(targets.sites, [window.start, window.stop]))
        for start in range(0, len(numbers), self._block):
            block = slice(start, min(start + self._block, len(numbers)))
            rows = slice(2 * block.start, 2 * block.stop)
            alleles = np.ascontiguousarray(targets.typed_alleles(typed_sites, block).T)
            missing = targets.missing_alleles(window.sites, block)
            if missing is not None:
                alleles[missing[:, typed]] = MASK
            self._copied(stretch, alleles, numbers[block], probability[rows], progress)
            if missing is not None:
                probability[rows][missing[:, typed].all(axis=1)] = frequency
        return probability

    def _copied(
        self, stretch: Stretch, alleles: np.ndarray, numbers: np.ndarray, out: np.ndarray, progress: Progress
    ) -> None:
        """Fill ``out`` with the dosages of a block of samples, and count in ``progress`` those that are begun."""

        def counter(sites: int) -> Callable[[int], None]:
            counted = 0

            def count(haplotypes: int) -> None:
                nonlocal counted
                begun = min(haplotypes // 2, len(numbers))
                if begun > counted:
                    progress.advance(sites * (begun - counted))
                    counted = begun

            return count

        count = counter(out.shape[1])
        given = stretch, alleles, numbers, out
        if self._transformer is None:
            self._copy.probability(*given, watch=count)
            count(2 * len(numbers))
            return
        copied = self._copy.copied(*given, watch=count)
        count(2 * len(numbers))
        self._transformer.add_along(
            out, copied, stretch, self._data, alleles, lambda sites: counter(_PASSES_OF_TRANSFORMER * sites)
        )
