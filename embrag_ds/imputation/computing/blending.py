"""Windows to sites: overlapping windows are blended and written as soon as no later window can change them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from embrag_ds.data.targets import Targets
from embrag_ds.data.windows import Window, WindowedPanel, blend_weights
from embrag_ds.imputation.extent import Extent
from embrag_ds.imputation.shares import Border, Share
from embrag_ds.runs.alive import beat
from embrag_ds.variants.output import ImputedRecords

logger = logging.getLogger(__name__)

_BYTES_AT_ONCE = 1 << 22
"""Of typed alleles, one byte for each haplotype and site."""


class Imputing(Protocol):
    """What computes windows: :class:`embrag_ds.imputation.engine.Imputation`."""

    data: WindowedPanel
    targets: Targets

    def windows(self, chosen: list[Window] | None = None) -> Iterator[tuple[Window, np.ndarray]]:
        """Iterate over windows and the ALT probabilities float32 [2N, L] in their cores."""


class Exchange(Protocol):
    """What hands dosages float32 [2N, n] at the border of two ranks from the right one to the left one."""

    def lend(self, border: Border, dosage: np.ndarray) -> None:
        """Give the left rank this one's part of the dosages."""

    def borrow(self, border: Border) -> np.ndarray:
        """The right rank's part, which it computes first."""

    def check(self) -> None:
        """Raise the fault of another rank, if one has failed."""


def write_blended(
    imputation: Imputing,
    writer: ImputedRecords,
    where: Extent,
    share: Share | None = None,
    exchange: Exchange | None = None,
) -> None:
    """Impute, blend the windows where they overlap, and write the panel's sites ``where``, or a rank's ``share``.

    The two windows at the border of two shares are each computed by one rank, and blended by the left one of the two.
    """
    targets = imputation.targets
    all_windows = imputation.data.windows
    share = Share(where.windows(all_windows)) if share is None else share
    windows, weights = share.windows, blend_weights(all_windows)
    wanted = where.places(len(imputation.data.reference.panel.sites))
    everyone = slice(0, len(targets.samples))
    pending = np.zeros((2 * len(targets.samples), 0), dtype=np.float32)
    settled = share.begin
    # Writing begins when the first of them are ready, and their memory is used again.
    at_once = max(1, _BYTES_AT_ONCE // (2 * len(targets.samples)))
    for number, (window, probability) in enumerate(imputation.windows(windows)):
        beat()
        if exchange is not None:
            exchange.check()
        # ``pending`` holds the blended part of the windows so far, from site ``settled`` on.
        shared = np.flatnonzero(weights[window.index] != 1)
        probability[:, shared] *= weights[window.index][shared].astype(np.float32)
        begin = window.core_start
        if number == 0 and share.before is not None and exchange is not None:
            exchange.lend(share.before, probability[:, : share.before.sites])
            probability, begin = probability[:, share.before.sites :], share.begin
        grown = _added(pending, probability, begin - settled)
        last = number + 1 == len(windows)
        until = window.core_stop if last else min(window.core_stop, windows[number + 1].core_start)
        if last and share.after is not None and exchange is not None:
            grown = _added(grown, exchange.borrow(share.after), share.after.first - settled)
            until = share.end
        # Of these sites, those asked for are consecutive: at most the first or last ones are not.
        inside = np.flatnonzero(np.diff(wanted[settled : until + 1]))
        if len(inside):
            for start in range(int(inside[0]), int(inside[-1]) + 1, at_once):
                stop = min(start + at_once, int(inside[-1]) + 1)
                span = slice(settled + start, settled + stop)
                haploid = targets.haploid(span)
                dosage = grown[:, start:stop]
                writer.write(
                    int(wanted[span.start]),
                    dosage if haploid is None else _one_haplotype(dosage, haploid),
                    targets.typed[span],
                    targets.alleles(span, everyone),
                    targets.missing_alleles(span, everyone),
                    haploid,
                )
        pending = grown[:, until - settled :]
        settled = until if last or pending.shape[1] else windows[number + 1].core_start
        logger.debug("imputed window %d/%d, %d/%d sites", number + 1, len(windows), wanted[until], wanted[-1])


def _added(pending: np.ndarray, more: np.ndarray, place: int) -> np.ndarray:
    """Dosages ``pending``, float32 [2N, n], with ``more`` of them added from their site ``place`` on."""
    if not pending.shape[1] and not place:
        return more
    grown = np.zeros((len(pending), max(pending.shape[1], place + more.shape[1])), dtype=np.float32)
    grown[:, : pending.shape[1]] = pending
    grown[:, place : place + more.shape[1]] += more
    return grown


def _one_haplotype(dosage: np.ndarray, haploid: np.ndarray) -> np.ndarray:
    """Dosages float32 [2N, L] with the mean of both rows in place of each where a sample is ``haploid``, bool [N, L].

    The rows have the same alleles there, but others beyond the end of a pseudoautosomal region.
    """
    mean = (dosage[0::2] + dosage[1::2]) / 2
    return np.where(np.repeat(haploid, 2, axis=0), np.repeat(mean, 2, axis=0), dosage)
