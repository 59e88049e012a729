"""Target samples at the panel's sites, with their alleles packed on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from embrag_ds.data.panel import Panel, skipped_records
from embrag_ds.data.tokens import REF
from embrag_ds.errors import UserError
from embrag_ds.ops.bits import unpack_host
from embrag_ds.variants.sites import Harmonised, harmonise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """Target samples matched to the panel's sites.

    ``typed`` bool [S] marks the panel sites at which the targets are typed. ``packed`` holds the target file's alleles
    as :class:`Panel` does, usually memory-mapped. ``match`` maps the target's sites to the panel's.
    """

    samples: tuple[str, ...]
    typed: np.ndarray
    packed: np.ndarray
    match: Harmonised

    def alleles(self, span: slice, samples: slice) -> np.ndarray:
        """Alleles of some samples at the panel's sites ``span``, uint8 [2N, L]; REF at untyped sites."""
        first, last = np.searchsorted(self.match.panel_index, [span.start, span.stop])
        typed = self.typed_alleles(slice(first, last), samples)
        found = np.full((typed.shape[1], span.stop - span.start), REF, dtype=np.uint8)
        found[:, self.match.panel_index[first:last] - span.start] = typed.T
        return found

    def typed_alleles(self, sites: slice, samples: slice) -> np.ndarray:
        """Alleles of some samples at some of the typed sites (numbers 0 to T - 1), uint8 [T, 2N]."""
        bits = unpack_host(self.packed[self.match.target_index[sites]], 2 * samples.start, 2 * samples.stop)
        return bits ^ self.match.swapped[sites, None]


def harmonise_targets(target: Panel, panel: Panel, allow_overlap: bool) -> Targets:
    """Match the targets' sites to the panel's; no later step drops sites.

    Raises :class:`UserError` if no site matches, or if a target sample is in the panel and ``allow_overlap`` is False.
    """
    shared = sorted(set(target.samples) & set(panel.samples))
    if shared and not allow_overlap:
        raise UserError(
            f"{target.path}: {len(shared)} samples are also in the panel {panel.path}, the first is {shared[0]}; "
            "remove them from one of the two, or add --allow-overlap (they then never retrieve themselves)"
        )
    match = harmonise(target.sites, panel.sites, str(target.path), str(panel.path))
    logger.info("target %s: %d samples; %s", target.path, len(target.samples), match.report())
    if skipped := skipped_records(target.skipped):
        logger.info("%s: %s", target.path, skipped)
    typed = np.zeros(len(panel.sites), dtype=bool)
    typed[match.panel_index] = True
    return Targets(target.samples, typed, target.packed, match)
