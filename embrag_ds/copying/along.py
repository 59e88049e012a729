"""Imputation along stretches of a chromosome, each copied once, with all reference haplotypes as states, on a CPU.

What a model learned on windows and their nearest haplotypes holds for all haplotypes of a long stretch: the
recombination prior fades with distance, and negligible haplotypes count in neither. Equal windows and haplotypes give
equal dosages (tests/model/test_along.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from embrag_ds.copying import loops
from embrag_ds.copying.frequencies import FrequenciesWithout, frequencies_without, good_turing_correction
from embrag_ds.copying.model import CopyingModel, density, log_rarity
from embrag_ds.copying.records import Found, Frequencies, Head, PanelPart, Rates
from embrag_ds.copying.stretch import panel_part
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.model.numbers import CONFIDENCE_FEATURES
from embrag_ds.ops.threads import thread_count

MOST_TYPED = 1 << 16
"""Typed sites of a stretch, which the loop numbers in 16 bits."""
MOST_SAVED_BYTES = 1 << 25
"""Of a worker's forward states that are saved at once, which should stay in the processor's last cache."""


@dataclass(frozen=True)
class Stretch:
    """What all targets share on a stretch.

    ``rows`` int64 [T] are its typed sites; ``counts`` float32 [P, L] are the ALT copies by population in its core.
    """

    number: int
    rows: np.ndarray
    panel: PanelPart
    rates: Rates
    head: Head
    counts: np.ndarray


class Copied(NamedTuple):
    """What a network reads of target haplotypes that were copied, over the L sites of a core.

    ``values`` float32 [2N, 2, L] are the dosage that is copied from the haplotypes, before any correction, and the ALT
    frequency expected from their ancestry. ``frequency`` float32 [rows, L] is the overall one, ``good_turing`` float32
    [rows, L] the correction of the prior's log-odds, and ``row_of`` int64 [2N] the targets' rows of both.
    """

    values: np.ndarray
    frequency: np.ndarray
    good_turing: np.ndarray
    row_of: np.ndarray


class HeadRows(NamedTuple):
    """Inputs of the confidence head at n sites of target haplotypes, with a minor allele that is likely enough.

    ``features`` float32 [n, 12] are those of :func:`embrag_ds.model.confidence.confidence_features`. ``haplotypes``
    int64 [n] are the targets' rows, ``sites`` int32 [n] those of the core, and ``to_ref`` bool [n] says whether the
    minor allele is REF. ``minor_count`` float32 [n] is its count without the haplotypes not to be copied.
    """

    features: np.ndarray
    haplotypes: np.ndarray
    sites: np.ndarray
    to_ref: np.ndarray
    minor_count: np.ndarray


class CopyAlong:
    """A model up to its transformer, applied to the stretches of a panel one after another.

    ``data`` are a panel's stretches in place of windows. ``exclusions`` int64 [panel samples, E] lists the panel
    samples that each must not copy. As many threads compute as there are when this is made. Each
    saves forward states of ``most_saved`` bytes; if that is too few for all, it computes some anew. Raises
    :class:`UserError` if the panel is too small.
    """

    def __init__(
        self, model: CopyingModel, data: WindowedPanel, exclusions: np.ndarray, most_saved: int = MOST_SAVED_BYTES
    ):
        self._model = model
        self._data = data
        self._exclusions = exclusions
        self._workers = thread_count()
        self._most_saved = most_saved
        reference = data.reference
        if len(reference) <= 2 * exclusions.shape[1]:
            raise UserError(
                f"{reference.panel.path}: {len(reference)} reference haplotypes are too few to copy from; give a panel "
                "of more samples"
            )

    def stretch(self, number: int, typed: np.ndarray) -> Stretch:
        """What all targets share on a stretch, whose sites ``typed`` bool [sites] they are typed at, at least one.

        Raises :class:`UserError` if they are typed at more sites than the loop can number.
        """
        window, reference = self._data.windows[number], self._data.reference
        features = self._data.features(number)
        rows = np.flatnonzero(typed)
        if len(rows) > MOST_TYPED:
            raise UserError(
                f"window {number} has {len(rows)} typed sites with its flanks, and at most {MOST_TYPED} can be copied "
                "at once; give a model of shorter windows or flanks"
            )

        def core(sites: slice) -> np.ndarray:
            return reference.packed_at(window.core_start + np.arange(sites.start, sites.stop))

        common = reference.allele_frequency[window.core_sites] > 0.5
        first = window.core_start - window.start
        part = panel_part(
            core,
            reference.alleles_at(window.start + rows),
            rows,
            features.position,
            first,
            common,
            reference.population_of,
        )
        return Stretch(
            number=number,
            rows=rows,
            panel=part,
            rates=self._model.rates(features, rows, len(reference)),
            head=self._model.head(density(rows, features.position)),
            counts=np.ascontiguousarray(features.counts[:, window.core]),
        )

    def probability(
        self,
        stretch: Stretch,
        alleles: np.ndarray,
        samples: np.ndarray,
        out: np.ndarray | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """ALT probabilities float32 [2N, L] in the core of a stretch.

        ``alleles`` uint8 [2N, T] are those of the targets at the stretch's typed sites, 2 where missing. ``samples``
        int64 [N] are their numbers in the panel, -1 for those outside. The result is ``out``, contiguous, where it is
        given. ``watch`` is told several times a second how many target haplotypes are begun.
        """
        if out is None:
            out = np.empty((len(alleles), len(stretch.panel.share)), dtype=np.float32)
        self._fill(stretch, alleles, samples, _found(out), watch)
        return out

    def copied(
        self,
        stretch: Stretch,
        alleles: np.ndarray,
        samples: np.ndarray,
        out: np.ndarray,
        watch: Callable[[int], None] | None = None,
    ) -> Copied:
        """What a network reads of these targets; fills ``out`` as :meth:`probability` does."""
        found = _found(out, copied=out.shape[1])
        of_rows, turing, row_of = self._fill(stretch, alleles, samples, found, watch)
        return Copied(found.copied, of_rows.overall, turing, row_of)

    def head_rows(
        self, stretch: Stretch, alleles: np.ndarray, samples: np.ndarray, noted: np.ndarray, out: np.ndarray
    ) -> tuple[HeadRows, Copied]:
        """Inputs of the confidence head for these targets, at the sites ``noted`` bool [L] of the core.

        With what a network reads of them; fills ``out`` as :meth:`probability` does.
        """
        found = _found(out, copied=out.shape[1], noted=noted)
        of_rows, turing, row_of = self._fill(stretch, alleles, samples, found, None)
        here = np.arange(int(noted.sum())) < found.number
        haplotypes, sites = np.nonzero(here)[0], found.sites[here]
        count = of_rows.minor_allele_count[row_of[haplotypes], sites]
        rows = HeadRows(found.features[here], haplotypes, sites, found.to_ref[here], count)
        return rows, Copied(found.copied, of_rows.overall, turing, row_of)

    def _fill(
        self,
        stretch: Stretch,
        alleles: np.ndarray,
        samples: np.ndarray,
        found: Found,
        watch: Callable[[int], None] | None,
    ) -> tuple[FrequenciesWithout, np.ndarray, np.ndarray]:
        """Fill the arrays ``found``; returns the targets' frequencies, their correction, and rows by haplotype."""
        excluded, row_of = self._excluded(samples)
        own, of_rows, turing = self._frequencies(stretch, excluded, row_of)
        # Plain and contiguous, because numba compiles a loop anew for any other kind of array.
        given = (tuple(each) for each in (stretch.panel, stretch.rates, own, stretch.head))
        workers = min(self._workers, len(alleles))
        loops.copy_along(workers, *given, alleles, row_of, excluded, self._most_saved, tuple(found), watch=watch)
        return of_rows, turing, row_of

    def _excluded(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Haplotypes not to copy, int64 [2N, 2 E], padded with H, and rows of frequencies int64 [2N]."""
        haplotypes = len(self._data.reference)
        barred = np.full((len(samples), 2 * self._exclusions.shape[1]), haplotypes, dtype=np.int64)
        row_of = np.zeros(len(samples), dtype=np.int64)
        for number, place in enumerate(np.flatnonzero(samples >= 0), start=1):
            own = np.flatnonzero(np.isin(self._data.reference.sample_of, self._exclusions[samples[place]]))
            barred[place, : len(own)] = own
            row_of[place] = number
        return barred.repeat(2, axis=0), row_of.repeat(2)

    def _frequencies(
        self, stretch: Stretch, excluded: np.ndarray, row_of: np.ndarray
    ) -> tuple[Frequencies, FrequenciesWithout, np.ndarray]:
        """What depends on frequencies, those of ALT, and their correction by Good and Turing, float32 [rows, L].

        The first row is that of all targets outside the panel.
        """
        reference, window = self._data.reference, self._data.windows[stretch.number]
        rows = np.full((row_of.max() + 1, excluded.shape[1]), len(reference), dtype=np.int64)
        rows[row_of] = excluded
        here = window.core_sites if reference.panel.ploidy is not None else slice(0, 1)
        left_out = np.unique(rows[rows < len(reference)])
        if not len(left_out):
            left_out = np.zeros(1, dtype=np.int64)  # no row names it
        core = np.arange(window.core_start, window.core_stop)
        found = frequencies_without(
            np.searchsorted(left_out, rows),  # padded with their number
            reference.panel.alleles_at(core, reference.haplotypes[left_out]).T,
            reference.population_of[left_out],
            reference.counted(here)[left_out],
            stretch.counts,
            reference.population_sizes[:, here],
        )
        common, one = stretch.panel.minor_is_ref, np.float32(1)
        turing = np.zeros_like(found.overall)
        if self._model.good_turing:
            turing = good_turing_correction(found, reference.good_turing_odds)
        of_minor = Frequencies(
            np.where(common, one - found.population, found.population),
            self._model.share_of_slow(found.overall),
            np.exp(np.where(common, -turing, turing)),
            log_rarity(found.overall),
            (found.overall > 0.5) != common,
        )
        return of_minor, found, turing


def _found(probability: np.ndarray, copied: int = 0, noted: np.ndarray | None = None) -> Found:
    """Arrays for the loop to fill beside ``probability`` [B, L]: ``copied`` sites, and the ``noted`` sites."""
    targets = len(probability)
    if noted is None:
        noted = np.zeros(0, dtype=np.bool_)
    most = int(noted.sum())
    return Found(
        probability=probability,
        copied=np.empty((targets, 2, copied), dtype=np.float32),
        noted=noted,
        number=np.zeros((targets, 1), dtype=np.int64),
        sites=np.empty((targets, most), dtype=np.int32),
        to_ref=np.empty((targets, most), dtype=np.bool_),
        features=np.empty((targets, most, CONFIDENCE_FEATURES), dtype=np.float32),
    )
