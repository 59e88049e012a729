"""The retrieval collate: queries in, a batch with its neighbours out.

This is where a batch is built and where retrieval happens: hide, encode the query's weights under the
batch's generation, search, fetch. It runs in the rank's own process, never in a DataLoader worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.sampler import QueryBatch
from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.ops.dosage import WindowAlleles
from embrag_ds.ops.li_stephens import mismatches
from embrag_ds.retrieval.batch import Batch, CoreFrame, Retrieved, SiteTensors, WindowFrame
from embrag_ds.retrieval.codebooks import CodebookSource, WindowCodebook
from embrag_ds.retrieval.device_panel import DevicePanel
from embrag_ds.retrieval.frequency import frequencies_without
from embrag_ds.retrieval.store import Query, Store
from embrag_ds.runtime.streams import SideStream, Staging, hand_over
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline


class RetrievalCollator:
    """Turns :class:`~embrag_ds.data.sampler.QueryBatch` into a :class:`Batch`.

    Copies and search run on a side stream; the batch is handed to the stream that is current when it is
    *received* (:func:`receive`), which on a CPU, or without a thread in between, changes nothing. An instance
    serves one thread.
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
        timeline: Timeline = NO_TIMELINE,
    ):
        """``store`` and ``source`` are None in mode ``none``; ``exclusions`` int64 [N, E] lists, for
        every panel sample, the samples it must not retrieve (itself first). A batch holds at most ``samples``
        samples; ``slots`` of staging are used in turn. ``token_k`` of the neighbours are given as tokens, too."""
        self._data = data
        self._device = device
        self._panel = panel
        self._store = store
        self._source = source
        self._live = live
        self._token_k = token_k
        self._timeline = timeline
        reference = data.reference
        # As many as every query can have, whoever is excluded for it.
        self.k = min(k, len(reference) - 2 * exclusions.shape[1])
        if store is not None and self.k < 1:
            raise UserError(
                f"{reference.panel.path}: {len(reference)} reference haplotypes are too few to retrieve from"
            )
        self._excluded = _excluded_haplotypes(exclusions, reference.sample_of)
        self._population_of = torch.from_numpy(reference.population_of).to(device)
        self._population_sizes = torch.from_numpy(reference.population_sizes).to(device)
        self._turing = torch.from_numpy(reference.good_turing_odds).to(device)
        longest = max(map(len, data.windows))
        core = max(window.core_stop - window.core_start for window in data.windows)
        self.staging = Staging(device, slots, self._slot_bytes(samples, longest, core), timeline)
        self._side = SideStream(device, urgent=True)
        self._latest: tuple[int, WindowAlleles | None] = (-1, None)

    def _slot_bytes(self, samples: int, sites: int, core: int) -> int:
        """The most a batch stages: alleles, masks, typed sites, features, exclusions, panel rows."""
        populations = len(self._data.reference.populations.names)
        needed = samples * sites * (2 + 1 + 8) + 8 * samples * (self._excluded.shape[1] + 1)
        needed += sites * (8 + 4 * (2 + populations))
        needed += self._panel.staged_bytes(sites) + self._panel.staged_bytes(core)
        return needed + 16 * 256  # alignment

    @property
    def backend(self) -> str:
        """What searches."""
        return "none" if self._store is None else self._store.backend

    @torch.no_grad()
    def __call__(self, queries: QueryBatch, step: int) -> Batch:
        """The batch of ``queries`` under the generation that ``step`` uses."""
        moved = self.staging.bytes_moved
        with self._side as side:
            with self._timeline.phase("collate"):
                batch = self._build(queries, step)
            moved = self.staging.bytes_moved - moved + batch.bytes_moved
            return replace(batch, bytes_moved=moved, ready=side.event())

    def _build(self, queries: QueryBatch, step: int) -> Batch:
        window = self._data.windows[queries.window]
        put = self.staging.put
        self.staging.begin()
        alleles = put(queries.alleles).to(torch.int64)
        masked = put(queries.masked).repeat_interleave(2, dim=0)
        tokens = alleles.masked_fill(masked, MASK)
        typed, count = _typed_sites(queries.masked)
        features = self._data.features(queries.window)
        excluded = put(self._excluded[queries.samples])
        reference = self._core_alleles(queries.window)
        frequencies = frequencies_without(
            excluded,
            reference.by_haplotype,
            self._population_of,
            put(np.ascontiguousarray(features.counts[:, window.core])),
            self._population_sizes,
        )
        good_turing = self._turing[frequencies.minor_allele_count.long().clamp_max(len(self._turing) - 1)]
        good_turing = torch.where(frequencies.overall > 0.5, -good_turing, good_turing)
        passes = frequencies.minor_allele_count >= self._data.reference.panel.minimum_allele_count
        sites = SiteTensors(put(features.position), put(features.frequency))
        frame = WindowFrame(
            number=queries.window,
            core=window.core,
            sites=sites,
            typed=put(typed).repeat_interleave(2, dim=0),
            typed_count=put(count).repeat_interleave(2, dim=0),
            near=_near(queries.masked, window.core),
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
            # Found on the CPU: on a GPU the size of the result would force a synchronisation.
            observed = np.flatnonzero(~queries.masked.all(0))
            if not observed.size:
                observed = np.zeros(1, dtype=np.int64)  # nothing to go by: a site of weight 0
            query = Query(
                window=queries.window,
                tokens=tokens,
                observed=observed,
                observed_on_device=put(observed),
                alleles=self._panel.alleles(queries.window, observed, self.staging),
                excluded=excluded.repeat_interleave(2, dim=0),
                typed_per_haplotype=float(count.mean()),
            )
            code = self._source.code(queries.window, step)
            cuts = _common_cuts(queries.masked[:, window.core])
            retrieved = self._retrieve(query, frame, code, self._store, reference, cuts)
            fetched = 0 if code.codebook is None else code.codebook.nbytes + code.weights.nbytes
        self.staging.end()
        return Batch(core, frame, retrieved, bytes_moved=fetched, ready=None)

    def _core_alleles(self, window: int) -> WindowAlleles:
        """Of the core; blocks of samples to be imputed come window by window."""
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
        # Where each typed site lies among the observed ones; what fills a row up lies anywhere.
        place = torch.searchsorted(query.observed_on_device, frame.typed).clamp_max_(len(query.observed) - 1)
        observed = query.tokens.gather(1, frame.typed)
        return Retrieved(
            ids=ids,
            alleles=reference.of(ids, cuts),
            mismatch=mismatches(query.alleles, place, ids, observed, frame.typed_count),
            population=self._population_of[ids],
            codebook=None if self._live else code.codebook,
            embeddings=store.embeddings(query.window, ids, code.generation),
            tokens=reference.by_haplotype[ids[:, : self._token_k]].long() if self._token_k else None,
            generation=code.generation.number,
            snapshot_step=code.generation.snapshot_step,
        )


def receive(batch: Batch) -> Batch:
    """Take over a batch on the current stream: wait for what builds it, and keep its memory until it is used."""
    hand_over(_tensors(batch), batch.ready)
    return batch


def _tensors(part: object) -> Iterator[Tensor]:
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _excluded_haplotypes(exclusions: np.ndarray, sample_of: np.ndarray) -> np.ndarray:
    """Reference haplotypes that each panel sample must not find, int64 [N + 1, 2 E], filled up with H.

    The last row, for samples that are not in the panel (-1), names none.
    """
    nobody = len(sample_of)
    rows = np.full((len(exclusions) + 1, 2), nobody, dtype=np.int64)
    places = np.arange(nobody)
    # A sample's two haplotypes are neighbours.
    rows[sample_of[0::2]] = np.stack([places[0::2], places[1::2]], axis=1)
    barred = rows[exclusions].reshape(len(exclusions), -1)  # -1 picks the last row, nobody's
    return np.concatenate([barred, np.full((1, barred.shape[1]), nobody, dtype=np.int64)])


def _typed_sites(masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sites each sample shows, int64 [N, T], rows filled up with the last site, and their number [N]."""
    count = (~masked).sum(1)
    order = np.argsort(masked, axis=1, kind="stable")[:, : max(1, int(count.max()))]
    filled = np.arange(order.shape[1]) >= count[:, None]
    return np.where(filled, masked.shape[1] - 1, order), count


def _near(masked: np.ndarray, core: slice) -> slice:
    """Of every sample's typed sites, in order: the places from the last before the core to the first beyond it."""
    before = (~masked[:, : core.start]).sum(1)
    until = (~masked[:, : core.stop]).sum(1)
    last = np.maximum((~masked).sum(1) - 1, 0)
    return slice(max(0, int(before.min()) - 1), int(np.minimum(until, last).max()) + 1)


def _common_cuts(masked: np.ndarray) -> np.ndarray | None:
    """The sites that follow a typed one, if all samples of ``masked`` [N, L] are typed at the same."""
    return None if (masked != masked[:1]).any() else np.flatnonzero(~masked[0]) + 1


def site_tensors(data: WindowedPanel, window: int, device: torch.device) -> SiteTensors:
    """A window's site features on the device."""
    features = data.features(window)
    return SiteTensors(*(torch.from_numpy(each).to(device) for each in (features.position, features.frequency)))
