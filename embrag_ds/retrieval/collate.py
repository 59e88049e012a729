"""The retrieval collate: samples in, a batch with its neighbours out.

This is where a batch is built and where retrieval happens: hide, encode the query's weights under the
batch's generation, search, fetch. It runs in the rank's own process, never in a DataLoader worker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.dataset import Samples, WindowedPanel
from embrag_ds.data.tokens import MASK
from embrag_ds.errors import UserError
from embrag_ds.retrieval.cache import ReferenceSource
from embrag_ds.retrieval.store import Query, Store


@dataclass(frozen=True)
class SiteTensors:
    """:class:`~embrag_ds.data.dataset.SiteFeatures` as tensors, float32.

    ``position`` [L] in cM, ``frequency`` [L], ``population_frequency`` [P, L].
    """

    position: Tensor
    frequency: Tensor
    population_frequency: Tensor


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved for a batch; here L counts the core's sites.

    ``ids`` int64 [B, K] number haplotypes of the reference set, nearest first; ``alleles`` uint8
    [B, K, L] are theirs, ``mismatch`` bool [B, T, K] says where they differ from what the query shows
    (in the order of :attr:`Batch.typed`; False in its filled-up part), ``population`` int64 [B, K] names their
    populations. ``codebook`` [L, V, D] encodes them, unless the encoding is ``live`` (None: the model's own).
    ``embeddings`` [B, K, L, D] come only from the dense store. ``generation`` and ``snapshot_step`` say
    how old the encoding is.
    """

    ids: Tensor
    alleles: Tensor
    mismatch: Tensor
    population: Tensor
    codebook: Tensor | None
    embeddings: Tensor | None
    generation: int
    snapshot_step: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device. ``core`` is the place of the predicted sites within the window.

    In the core: ``tokens`` int64 [B, L] is what the query shows, ``hidden`` bool [B, L] where it hides,
    ``alleles`` int64 [B, L] the truth (meaningless at the hidden sites of people to be imputed). In the
    whole window: ``sites`` has the features of its sites, ``typed`` int64 [B, T] lists the sites each
    query shows, in order, ``typed_count`` int64 [B] says how many they are; the rest of a row repeats
    the window's last site. ``retrieved`` is None in mode ``none``.
    """

    window: int
    core: slice
    tokens: Tensor
    hidden: Tensor
    alleles: Tensor
    typed: Tensor
    typed_count: Tensor
    sites: SiteTensors
    retrieved: Retrieved | None


class RetrievalCollator:
    """Turns :class:`~embrag_ds.data.dataset.Samples` into a :class:`Batch`, synchronously."""

    def __init__(
        self,
        data: WindowedPanel,
        device: torch.device,
        *,
        store: Store | None,
        source: ReferenceSource | None,
        k: int,
        exclusions: np.ndarray,
        live: bool = False,
    ):
        """``store`` and ``source`` are None in mode ``none``; ``exclusions`` int64 [N, E] lists, for every
        panel person, the people it must not retrieve (itself first)."""
        self._data = data
        self._device = device
        self._store = store
        self._source = source
        self._live = live
        self._exclusions = exclusions
        reference = data.reference
        # As many as every query can have, whoever is excluded for it.
        self.k = min(k, len(reference) - 2 * exclusions.shape[1])
        if store is not None and self.k < 1:
            raise UserError(
                f"{reference.panel.path}: {len(reference)} reference haplotypes are too few to retrieve from"
            )
        self._person_of = torch.from_numpy(reference.person_of).to(device)
        self._population_of = torch.from_numpy(reference.population_of).to(device)

    def __call__(self, samples: Samples) -> Batch:
        window = self._data.windows[samples.window]
        alleles = torch.from_numpy(samples.alleles).to(self._device, torch.int64)
        hidden = torch.from_numpy(samples.hidden).to(self._device).repeat_interleave(2, dim=0)
        tokens = alleles.masked_fill(hidden, MASK)
        typed, count = _typed_sites(samples.hidden)
        batch = Batch(
            window=samples.window,
            core=window.core,
            tokens=tokens[:, window.core],
            hidden=hidden[:, window.core],
            alleles=alleles[:, window.core],
            typed=torch.from_numpy(typed).to(self._device).repeat_interleave(2, dim=0),
            typed_count=torch.from_numpy(count).to(self._device).repeat_interleave(2, dim=0),
            sites=site_tensors(self._data, samples.window, self._device),
            retrieved=None,
        )
        if self._store is None or self._source is None:
            return batch
        # Found on the CPU: on a GPU the size of the result would force a synchronisation.
        shown = torch.from_numpy(np.flatnonzero(~samples.hidden.all(0))).to(self._device)
        query = Query(samples.window, tokens, shown, self._excluded(samples.people))
        return replace(batch, retrieved=self._retrieve(query, batch, self._store, self._source))

    def _retrieve(self, query: Query, batch: Batch, store: Store, source: ReferenceSource) -> Retrieved:
        code = source.code(query.window)
        found = store.search(query, code, self.k)
        reference = torch.from_numpy(self._data.reference_alleles(query.window)).to(self._device)
        place = torch.arange(batch.typed.shape[1], device=self._device)
        valid = place < batch.typed_count[:, None]
        at_typed = reference[found.ids[:, None, :], batch.typed[:, :, None]]
        differs = at_typed != query.tokens.gather(1, batch.typed)[:, :, None]
        return Retrieved(
            ids=found.ids,
            alleles=reference[:, batch.core][found.ids],
            mismatch=differs & valid[:, :, None],
            population=self._population_of[found.ids],
            codebook=None if self._live else code.codebook,
            embeddings=store.embeddings(query.window, found.ids),
            generation=code.generation,
            snapshot_step=code.step,
        )

    def _excluded(self, people: np.ndarray) -> Tensor:
        """Reference haplotypes barred from each query haplotype, bool [B, H]."""
        barred = np.where(people[:, None] >= 0, self._exclusions[people], -1)
        barred_ids = torch.from_numpy(barred).to(self._device).repeat_interleave(2, dim=0)
        excluded = torch.zeros(len(barred_ids), len(self._person_of), dtype=torch.bool, device=self._device)
        for column in barred_ids.unbind(1):
            excluded |= self._person_of == column[:, None]
        return excluded


def _typed_sites(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sites each person shows, int64 [N, T], rows filled up with the last site, and their number [N]."""
    count = (~hidden).sum(1)
    order = np.argsort(hidden, axis=1, kind="stable")[:, : max(1, int(count.max()))]
    filled = np.arange(order.shape[1]) >= count[:, None]
    return np.where(filled, hidden.shape[1] - 1, order), count


def site_tensors(data: WindowedPanel, window: int, device: torch.device) -> SiteTensors:
    """A window's site features on the device."""
    features = data.features(window)
    return SiteTensors(
        torch.from_numpy(features.position).to(device),
        torch.from_numpy(features.frequency).to(device),
        torch.from_numpy(features.population_frequency).to(device),
    )
