"""Collator with retrieval: builds a batch on the device from queries, with their nearest reference haplotypes.

It masks the queries, takes the site weights of the batch's generation, searches, and fetches the neighbours' alleles.
It runs in the rank's own process, never in a DataLoader worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.sampler import QueryBatch
from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import MOST_PLACES, WindowedPanel, most_places, places
from embrag_ds.errors import UserError
from embrag_ds.ops.dosage import Neighbours, WindowAlleles
from embrag_ds.ops.li_stephens import Near, mismatches
from embrag_ds.retrieval.batch import Batch, CoreFrame, Retrieved, SiteTensors, WindowFrame
from embrag_ds.retrieval.codebooks import CodebookSource, WindowCodebook
from embrag_ds.retrieval.device_panel import DevicePanel
from embrag_ds.retrieval.frequency import frequencies_without, good_turing_correction
from embrag_ds.retrieval.search import barred
from embrag_ds.retrieval.store import Query, Store
from embrag_ds.runtime.streams import SideStream, Staging, hand_over, mark_current
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline


class RetrievalCollator:
    """Builder of a :class:`Batch` on the device from a :class:`~embrag_ds.data.sampler.QueryBatch` on the CPU.

    On a CUDA device, copies and search run on a side stream. The consumer must call :func:`receive`, which makes its
    current stream wait for them. An instance serves one thread.
    """

    def __init__(
        self,
        data: WindowedPanel,
        device: torch.device,
        *,
        panel: DevicePanel,
        store: Store | None,
        source: CodebookSource | None,
        k: int,
        exclusions: np.ndarray,
        samples: int,
        slots: int = 1,
        live: bool = False,
        token_k: int = 0,
        whole: bool = False,
        timeline: Timeline = NO_TIMELINE,
    ):
        """Allocate staging for batches of at most ``samples`` samples, with ``slots`` slots used in turn.

        ``store`` and ``source`` are None in mode ``none``. ``k`` is the number of neighbours, lowered to what every
        query can have. ``exclusions`` int64 [panel samples, E] lists the samples that each must not retrieve, as
        :func:`embrag_ds.data.sampler.exclusion_table` gives them. ``live`` leaves the codebook to the model. The
        nearest ``token_k`` neighbours are also given as tokens. With ``whole`` the store gives all haplotypes as
        neighbours, of queries that are all typed at the same sites. Raises UserError if the reference set is too small.
        """
        self._data = data
        self._device = device
        self._panel = panel
        self._store = store
        self._source = source
        self._live = live
        self._token_k = token_k
        self._whole = whole
        self._timeline = timeline
        reference = data.reference
        self._most_places = most_places(len(reference)) if whole else MOST_PLACES
        # As many as remain for the query with the most exclusions, so that all rows have K neighbours.
        self.k = min(k, len(reference) - 2 * exclusions.shape[1])
        if store is not None and self.k < 1:
            raise UserError(
                f"{reference.panel.path}: {len(reference)} reference haplotypes are too few to retrieve from; give a "
                "panel of more samples"
            )
        self._excluded = _excluded_haplotypes(exclusions, reference.sample_of)
        # These copies block. So what was queued before, a snapshot's weights too, is finished for the side stream.
        self._population_of = torch.from_numpy(reference.population_of).to(device)
        self._haploid = reference.panel.ploidy is not None
        self._counted = torch.from_numpy(reference.counted(slice(0, 1))).to(device)
        self._population_sizes = torch.from_numpy(reference.population_sizes[:, :1]).to(device)
        self._turing = torch.from_numpy(reference.good_turing_odds).to(device)
        longest = max(map(len, data.windows))
        core = max(window.core_stop - window.core_start for window in data.windows)
        self.staging = Staging(device, slots, self._slot_bytes(samples, longest, core), timeline)
        self._side = SideStream(device, urgent=True)
        self._latest: tuple[int, WindowAlleles | None] = (-1, None)

    def _slot_bytes(self, samples: int, sites: int, core: int) -> int:
        """Largest staging memory of a batch in bytes: alleles, masks, typed sites, features, exclusions, panel rows."""
        populations = len(self._data.reference.populations.names)
        needed = samples * sites * (2 + 1 + 2 + 8 + 8) + 8 * samples * (self._excluded.shape[1] + 2)
        needed += sites * (8 + 4 * (2 + populations))
        if self._haploid:
            needed += 4 * core * (len(self._data.reference) + populations)
        needed += self._panel.staged_bytes(sites) + self._panel.staged_bytes(core)
        return needed + 16 * 256  # alignment

    @property
    def backend(self) -> str:
        """Name of the search backend; ``none`` without retrieval."""
        return "none" if self._store is None else self._store.backend

    @torch.no_grad()
    def __call__(self, queries: QueryBatch, step: int) -> Batch:
        """Build the batch of ``queries`` with the generation in use at training step ``step``.

        On a CUDA device the batch is still being computed when this returns: pass it to :func:`receive`.
        """
        moved = self.staging.bytes_moved
        # Live weights are those after the optimiser's last step, which the current stream may not have taken yet.
        trained = mark_current(self._device) if self._live else None
        # Distances are exact whatever the network computes in: in bf16 they would rank other haplotypes first.
        with torch.autocast(self._device.type, enabled=False), self._side as side:
            with self._timeline.phase("collate"):
                batch = self._build(queries, step, trained)
            moved = self.staging.bytes_moved - moved + batch.bytes_moved
            return replace(batch, bytes_moved=moved, ready=side.event())

    def _build(self, queries: QueryBatch, step: int, trained: Any) -> Batch:
        window = self._data.windows[queries.window]
        put = self.staging.put
        self.staging.begin()
        alleles = put(queries.alleles).to(torch.int64)
        masked = put(queries.masked).repeat_interleave(2, dim=0)
        if queries.missing is not None:
            # Masked for this haplotype only: `typed` below stays the same for all, so that they share their search.
            masked |= put(queries.missing)
        tokens = alleles.masked_fill(masked, MASK)
        typed, count = _typed_sites(queries.masked)
        near, near_count = _near(queries.masked, count, window.core)
        features = self._data.features(queries.window)
        excluded = put(self._excluded[queries.samples])
        reference = self._core_alleles(queries.window)
        counted, sizes = self._counted, self._population_sizes
        if self._haploid:  # they differ from site to site
            here = self._data.windows[queries.window].core_sites
            counted = put(self._data.reference.counted(here))
            sizes = put(np.ascontiguousarray(self._data.reference.population_sizes[:, here]))
        frequencies = frequencies_without(
            excluded,
            reference.by_haplotype,
            self._population_of,
            counted,
            put(np.ascontiguousarray(features.counts[:, window.core])),
            sizes,
        )
        good_turing = good_turing_correction(frequencies, self._turing)
        passes = frequencies.minor_allele_count >= self._data.reference.panel.minimum_allele_count
        sites = SiteTensors(put(features.position), put(features.frequency))
        place, number, place_cm = places(features.position, self._most_places)
        frame = WindowFrame(
            number=queries.window,
            core=window.core,
            sites=sites,
            typed=put(typed).repeat_interleave(2, dim=0),
            typed_count=put(count).repeat_interleave(2, dim=0),
            near=Near(put(near).repeat_interleave(2), near_count, int(near.min()), int(near.max()) + near_count),
            place=put(place[typed]).repeat_interleave(2, dim=0),
            places=number,
            place_cm=place_cm,
        )
        core = CoreFrame(
            sites=SiteTensors(sites.position[window.core], sites.frequency[window.core]),
            tokens=tokens[:, window.core],
            masked=masked[:, window.core],
            alleles=alleles[:, window.core],
            scored=masked[:, window.core] & passes.repeat_interleave(2, dim=0),
            frequency=frequencies.overall.repeat_interleave(2, dim=0),
            population_frequency=frequencies.population.repeat_interleave(2, dim=0),
            good_turing=good_turing.repeat_interleave(2, dim=0),
        )
        retrieved, fetched = None, 0
        if self._store is not None and self._source is not None:
            # On the CPU, because on a GPU the size of the result would force a synchronisation.
            observed = np.flatnonzero(~queries.masked.all(0))
            if not observed.size:
                observed = np.zeros(1, dtype=np.int64)  # nothing is observed: search one site, of weight 0
            query = Query(
                window=queries.window,
                tokens=tokens,
                observed=observed,
                observed_on_device=put(observed),
                alleles=self._panel.alleles(queries.window, observed, self.staging),
                excluded=excluded.repeat_interleave(2, dim=0),
                typed_per_haplotype=float(count.mean()),
            )
            self._side.wait_for_main(trained)
            code = self._source.code(queries.window, step)
            cuts = _common_cuts(queries.masked[:, window.core])
            retrieved = self._retrieve(query, frame, code, self._store, reference, cuts)
            fetched = 0 if code.codebook is None else code.codebook.nbytes + code.weights.nbytes
        self.staging.end()
        return Batch(core, frame, retrieved, bytes_moved=fetched, ready=None)

    def _core_alleles(self, window: int) -> WindowAlleles:
        """Reference alleles of a window's core, kept for the next batch, which in imputation has the same window."""
        number, found = self._latest
        if found is None or number != window:
            core = self._data.windows[window].core
            found = WindowAlleles(self._panel.alleles(window, np.arange(core.start, core.stop), self.staging))
            self._latest = window, found
        return found

    def _retrieve(
        self,
        query: Query,
        frame: WindowFrame,
        code: WindowCodebook,
        store: Store,
        reference: WindowAlleles,
        cuts: np.ndarray | None,
    ) -> Retrieved:
        with self._timeline.phase("search"):
            ids = store.search(query, code, self.k)
        # Index of each typed site among the observed ones; that of the padding is arbitrary.
        place = torch.searchsorted(query.observed_on_device, frame.typed).clamp_max_(len(query.observed) - 1)
        observed = query.tokens.gather(1, frame.typed)
        mismatch = mismatches(query.alleles, place, ids, observed, frame.typed_count)
        own = None
        if self._whole:
            own = barred(query.excluded, ids.shape[1])
            # They have no prior. If they matched, nothing would bound their backward probabilities.
            mismatch |= own[:, None]
        return Retrieved(
            ids=ids,
            alleles=self._alleles_of(ids, reference, cuts),
            mismatch=mismatch,
            population=self._population_of[ids],
            codebook=None if self._live else code.codebook,
            embeddings=store.embeddings(query.window, ids, code.generation),
            tokens=reference.by_haplotype[ids[:, : self._token_k]].long() if self._token_k else None,
            generation=code.generation.number,
            snapshot_step=code.generation.snapshot_step,
            barred=own,
        )

    def _alleles_of(self, ids: Tensor, reference: WindowAlleles, cuts: np.ndarray | None) -> Neighbours:
        if not self._whole:
            return reference.of(ids, cuts)
        assert cuts is not None, "the queries are typed at different sites"
        return reference.shared(cuts)


def receive(batch: Batch) -> Batch:
    """Make a batch usable on the current stream, and return it.

    The stream waits for the work that builds the batch, and the allocator keeps the batch's memory until the stream has
    used it. Without effect on a CPU.
    """
    hand_over(_tensors(batch), batch.ready)
    return batch


def _tensors(part: object) -> Iterator[Tensor]:
    """All tensors in a dataclass and in the dataclasses within it."""
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _excluded_haplotypes(exclusions: np.ndarray, sample_of: np.ndarray) -> np.ndarray:
    """Reference haplotypes that each panel sample must not retrieve, int64 [panel samples + 1, 2 E], padded with H.

    ``exclusions`` int64 [panel samples, E]; ``sample_of`` int64 [H] is the panel sample of each reference haplotype.
    The last row, for samples outside the panel (-1), is all padding.
    """
    padding = len(sample_of)
    rows = np.full((len(exclusions) + 1, 2), padding, dtype=np.int64)
    haplotypes = np.arange(padding)
    # The two haplotypes of a sample are adjacent in the reference set.
    rows[sample_of[0::2]] = np.stack([haplotypes[0::2], haplotypes[1::2]], axis=1)
    barred = rows[exclusions].reshape(len(exclusions), -1)  # -1 selects the last row, which is padding
    return np.concatenate([barred, np.full((1, barred.shape[1]), padding, dtype=np.int64)])


def _typed_sites(masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed sites of each sample, int64 [N, T], padded with the window's last site, and their number int64 [N].

    ``masked`` is bool [N, L].
    """
    observed = ~masked
    count = _observed_before(masked, masked.shape[1])
    typed = np.full((len(masked), max(1, int(count.max()))), masked.shape[1] - 1)
    for row, number, here in zip(typed, count.tolist(), observed, strict=True):
        row[:number] = np.flatnonzero(here)
    return typed, count


def _observed_before(masked: np.ndarray, stop: int) -> np.ndarray:
    """Number of each sample's observed sites among the first ``stop``, int64 [N]; ``masked`` is bool [N, L]."""
    # Row by row, because numpy counts along an axis many times slower.
    return stop - np.array([np.count_nonzero(row[:stop]) for row in masked])


def _near(masked: np.ndarray, count: np.ndarray, core: slice) -> tuple[np.ndarray, int]:
    """First of the typed sites near the core of each sample, int64 [N], and their number, which is the same for all.

    They cover the last typed site before the core to the first beyond it. ``masked`` is bool [N, L], and ``count``
    int64 [N] the number of typed sites. The sites are columns of :attr:`WindowFrame.typed`. Samples with fewer such
    sites get others after or before these as well.
    """
    before, until = (_observed_before(masked, stop) for stop in (core.start, core.stop))
    first = np.maximum(before - 1, 0)
    last = np.minimum(until, np.maximum(count - 1, 0))
    number = int((last - first).max()) + 1
    return np.minimum(first, max(1, int(count.max())) - number), number


def _common_cuts(masked: np.ndarray) -> np.ndarray | None:
    """Sites that directly follow a typed site, int64; None if the samples of ``masked`` [N, L] differ in these."""
    return None if (masked != masked[:1]).any() else np.flatnonzero(~masked[0]) + 1


def site_tensors(data: WindowedPanel, window: int, device: torch.device) -> SiteTensors:
    """Site features of all sites of a window, copied to ``device`` on the current stream; the host does not wait."""
    features = data.features(window)
    arrays = [torch.from_numpy(each) for each in (features.position, features.frequency)]
    if device.type == "cuda":
        arrays = [each.pin_memory() for each in arrays]
    return SiteTensors(*(each.to(device, non_blocking=True) for each in arrays))
