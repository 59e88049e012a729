"""Windows: stretches of consecutive sites on one contig, the unit of retrieval and of a micro-batch.

A :class:`WindowedPanel` is a reference set cut into windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from embrag_ds.data.masking import MaskSites
from embrag_ds.data.panel import FEW, RARE, Panel, PanelSubset, map_packed
from embrag_ds.errors import UserError, require
from embrag_ds.files import read_lines, read_position
from embrag_ds.ops.bits import unpack_samples
from embrag_ds.settings import strict_settings
from embrag_ds.variants.sites import SiteTable


@dataclass(frozen=True)
class Window:
    """Window of the panel's sites [start, stop), of which the core [core_start, core_stop) is predicted.

    The flanks outside the core serve retrieval and the copying model only. A match that extends far beyond the core is
    stronger evidence than one that ends within it.
    """

    index: int
    start: int
    stop: int
    core_start: int
    core_stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def sites(self) -> slice:
        """The window as a slice of the panel."""
        return slice(self.start, self.stop)

    @property
    def core(self) -> slice:
        """The core as a slice of the window."""
        return slice(self.core_start - self.start, self.core_stop - self.start)

    @property
    def core_sites(self) -> slice:
        """The core as a slice of the panel."""
        return slice(self.core_start, self.core_stop)


def make_windows(sites: SiteTable, window_sites: int, overlap_sites: int, flank_sites: int) -> list[Window]:
    """Cover every contig with windows whose cores have at most ``window_sites`` sites and overlap by ``overlap_sites``.

    The cores of a contig are equally long, to one site, so that none is a small remainder. No window crosses a contig's
    end, and none is padded. ``flank_sites`` sites are added on both sides where the contig has them.
    """
    windows: list[Window] = []
    for first, last in sites.contig_runs():
        for begin, end in cut_evenly(last - first, window_sites, overlap_sites):
            windows.append(_flanked(len(windows), (first + begin, first + end), (first, last), flank_sites))
    return windows


def cut_evenly(length: int, most: int, overlap: int) -> list[tuple[int, int]]:
    """Begin and end of the fewest runs of at most ``most`` sites that cover ``length`` sites and overlap.

    They are equally long, to one site.
    """
    count = max(1, -(-(length - overlap) // (most - overlap)))
    starts = np.linspace(0, max(0, length - overlap), count + 1).round().astype(int).tolist()
    return [(begin, min(length, end + overlap)) for begin, end in pairwise(starts)]


def cut_tiles(length: int, most: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Runs of :func:`cut_evenly`: begin and end of each, and of the sites that it is for, those it is deeper in."""
    runs, half = cut_evenly(length, most, overlap), overlap // 2
    bounds = [0, *(start + half for start, _ in runs[1:]), length]
    return [(*run, *own) for run, own in zip(runs, pairwise(bounds), strict=True)]


def _flanked(index: int, core: tuple[int, int], contig: tuple[int, int], flank_sites: int) -> Window:
    start, stop = max(contig[0], core[0] - flank_sites), min(contig[1], core[1] + flank_sites)
    return Window(index, start, stop, *core)


def read_windows(path: Path, sites: SiteTable, flank_sites: int) -> list[Window]:
    """Read windows from a file with the core as ``contig start end`` per line, in base pairs, 1-based and inclusive.

    Windows without a site of the panel are left out. Raises :class:`UserError` for a malformed line, an unknown contig,
    windows that are not sorted as the panel is, and sites in more than two windows.
    """
    codes = {name: code for code, name in enumerate(sites.contigs)}
    runs = {int(sites.contig[first]): (first, last) for first, last in sites.contig_runs()}
    windows: list[Window] = []
    for number, line in enumerate(read_lines(path, "windows"), start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        try:
            contig, begin, end = fields[0], read_position(fields[1]), read_position(fields[2])
        except (IndexError, ValueError):
            raise UserError(f"{path}: line {number}: expected contig, start and end in base pairs") from None
        if contig not in codes:
            raise UserError(f"{path}: line {number}: contig {contig} is not in the panel")
        if end < begin:
            raise UserError(f"{path}: line {number}: end {end} lies before start {begin}")
        first, last = runs.get(codes[contig], (0, 0))
        start = first + int(np.searchsorted(sites.pos[first:last], begin, side="left"))
        stop = first + int(np.searchsorted(sites.pos[first:last], end, side="right"))
        if stop == start:
            continue
        if windows and (start < windows[-1].core_start or stop <= windows[-1].core_stop):
            raise UserError(f"{path}: line {number}: windows must be sorted, and none inside another")
        if len(windows) > 1 and start < windows[-2].core_stop:
            raise UserError(f"{path}: line {number}: at most two windows may overlap at a site")
        windows.append(_flanked(len(windows), (start, stop), (first, last), flank_sites))
    if not windows:
        raise UserError(f"{path}: no window holds a site of the panel")
    return windows


def spread(number: int, most: int) -> list[int]:
    """At most ``most`` of ``number`` consecutive windows, spread evenly from the first to the last."""
    chosen: list[int] = np.linspace(0, number - 1, min(most, number)).round().astype(int).tolist()
    return chosen


def uncovered(windows: list[Window], size: int) -> int:
    """Number of sites, of ``size``, that lie in no core."""
    covered = np.zeros(size, dtype=bool)
    for window in windows:
        covered[window.core_sites] = True
    return int(size - covered.sum())


def blend_weights(windows: list[Window]) -> list[np.ndarray]:
    """Weights that blend overlapping windows: per window, float64 over its core; they sum to 1 at every covered site.

    Weights rise and fall linearly over an overlap. At most two cores may share a site, as :func:`make_windows` and
    :func:`read_windows` ensure.
    """
    weights = [np.ones(window.core_stop - window.core_start) for window in windows]
    for left, right in pairwise(windows):
        shared = left.core_stop - right.core_start
        if shared <= 0:
            continue
        ramp = np.arange(1, shared + 1) / (shared + 1)
        weights[left.index][-shared:] = 1 - ramp
        weights[right.index][:shared] = ramp
    return weights


@strict_settings
class DataConfig:
    """Settings of windows, held-out samples and the cache."""

    window_sites: int = 1024
    """[sites] The longest core of a window, the part that is predicted; at least 2. A contig's cores are equally long.
    """
    overlap_sites: int = 128
    """[sites] Shared by consecutive cores, where imputed values are blended; at most a third of ``window_sites``."""
    flank_sites: int = 1024
    """[sites] Flank on either side of a core, which retrieval and copying see, too."""
    windows_file: str | None = None
    """File with the windows' cores (``contig start end`` a line, base pairs, 1-based, inclusive) in place of
    ``window_sites``.
    """
    map_scale: float = 1.0
    """[factor] Of all genetic distances, from 1e-6 to 1e6. A model that adapts to a panel finds it, and keeps it."""
    validation_samples: int = 48
    """[samples] Panel samples held out of training for validation; at most a tenth of the panel."""
    cache_dir: str | None = None
    """Folder of packed panels and of the default data set; null: ``$XDG_CACHE_HOME/embrag_ds`` or
    ``~/.cache/embrag_ds``.
    """

    def __post_init__(self) -> None:
        require(self.window_sites >= 2, "data.window_sites", "must be at least 2")
        require(
            0 <= self.overlap_sites <= self.window_sites // 3,
            "data.overlap_sites",
            f"must lie between 0 and a third of window_sites ({self.window_sites // 3})",
        )
        require(self.flank_sites >= 0, "data.flank_sites", "must not be negative")
        require(1e-6 <= self.map_scale <= 1e6, "data.map_scale", "must lie between 1e-6 and 1e6")
        require(self.validation_samples >= 1, "data.validation_samples", "must be at least 1")

    def windows(self, panel: Panel) -> list[Window]:
        """Windows of a panel under these settings; raises :class:`UserError` if the file of windows is faulty."""
        if self.windows_file is not None:
            return read_windows(Path(self.windows_file), panel.sites, self.flank_sites)
        return make_windows(panel.sites, self.window_sites, self.overlap_sites, self.flank_sites)


PLACE_CM = 0.2
"""Length of a place, cM: recombination priors are the same within it. Finer ones impute no better (docs/log.md)."""
MOST_PLACES = 128
"""Places of a window in training, whose memory they take; those of a longer window than 25.6 cM are longer, too."""
_MOST_PLACE_BYTES = 1 << 27


def most_places(haplotypes: int) -> int:
    """Places of a stretch with all ``haplotypes`` as states: their priors, with what they are made from, fit 128 MiB.

    At least :data:`MOST_PLACES`.
    """
    return max(MOST_PLACES, _MOST_PLACE_BYTES // (8 * haplotypes))


def places(position: np.ndarray, most: int) -> tuple[np.ndarray, int, float]:
    """Cut a window into places: that of each site, int64 [L], their number G, and their length in cM.

    ``position`` [L] is in cM, increasing. A place has :data:`PLACE_CM`, or more where there would be over ``most``.
    """
    along = position - position[0]
    length = max(PLACE_CM, float(along[-1]) / most)
    place = np.minimum((along / length).astype(np.int64), most - 1)
    return place, int(place[-1]) + 1, length


@dataclass(frozen=True)
class SiteFeatures:
    """Features of a window's sites for the network, float32 on the CPU.

    ``position`` [L] is the distance from the core's centre in cM. ``frequency`` [L] is the ALT frequency in the
    reference set, clipped at the limit of rarity. Below it one sample more or less would change the frequency
    noticeably (:mod:`embrag_ds.retrieval.frequency`). ``counts`` [P, L] are the ALT copies in every population.
    """

    position: np.ndarray
    frequency: np.ndarray
    counts: np.ndarray


class QuerySource:
    """What queries are drawn from: alleles of the panel's samples and properties of the sites, window by window.

    It holds no reference set, and its pickle only the name of a cached panel's file of alleles: another process maps
    the file again, and shares its memory.
    """

    def __init__(self, data: WindowedPanel):
        frequency = data.reference.allele_frequency
        self.windows = data.windows
        self.position_cm = data.position_cm
        self._packed = data.reference.panel.packed
        self._pos = data.reference.panel.sites.pos
        self._maf = np.minimum(frequency, 1 - frequency)
        self._manifest = data.manifest

    def __len__(self) -> int:
        return len(self.windows)

    def mask_sites(self, window: int) -> MaskSites:
        """Properties of a window's sites that masks depend on."""
        span = self.windows[window].sites
        manifest = None if self._manifest is None else self._manifest[span]
        return MaskSites(self._pos[span], self._maf[span], manifest)

    def samples_alleles(self, window: int, samples: np.ndarray) -> np.ndarray:
        """Alleles of panel samples (indices int64 [N]) in a window, uint8 [B, L]."""
        return unpack_samples(self._packed[self.windows[window].sites], samples)

    def __getstate__(self) -> dict[str, Any]:
        packed = self._packed
        return vars(self) | {"_packed": (packed.filename, packed.shape) if isinstance(packed, np.memmap) else packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self._packed, tuple):
            self._packed = map_packed(*self._packed)


class WindowedPanel:
    """A reference set cut into windows: alleles, site features and properties for masks of each window."""

    def __init__(
        self,
        reference: PanelSubset,
        windows: list[Window],
        position_cm: np.ndarray,
        manifest: np.ndarray | None = None,
    ):
        """``position_cm`` float64 [S] is in cM; ``manifest`` bool [S] marks the sites of an array."""
        self.reference = reference
        self.windows = windows
        self.position_cm = position_cm
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self.windows)

    def features(self, window: int) -> SiteFeatures:
        """Site features of a window, given by its number."""
        span = slice(self.windows[window].start, self.windows[window].stop)
        position = self.position_cm[span]
        core = position[self.windows[window].core]
        centre = (core[0] + core[-1]) / 2
        rare = min(0.5, max(RARE, FEW / len(self.reference)))
        return SiteFeatures(
            (position - centre).astype(np.float32),
            self.reference.allele_frequency[span].clip(rare, 1 - rare),
            np.ascontiguousarray(self.reference.population_counts[:, span]),
        )

    @cached_property
    def query_source(self) -> QuerySource:
        """What queries are drawn from, without the reference set."""
        return QuerySource(self)

    def mask_sites(self, window: int) -> MaskSites:
        """Properties of a window's sites that masks depend on."""
        return self.query_source.mask_sites(window)

    def samples_alleles(self, window: int, samples: np.ndarray) -> np.ndarray:
        """Alleles of panel samples (indices int64 [N]) in a window, uint8 [B, L]."""
        return self.query_source.samples_alleles(window, samples)

    def reference_alleles(self, window: int) -> np.ndarray:
        """Alleles of the reference haplotypes in a window, uint8 [H, L]."""
        return self.reference.alleles(self.windows[window].start, self.windows[window].stop)
