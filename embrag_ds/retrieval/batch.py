"""A batch with its neighbours, as the collate builds it and the network reads it: records only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from embrag_ds.ops.dosage import Neighbours


@dataclass(frozen=True)
class SiteTensors:
    """:class:`~embrag_ds.data.windows.SiteFeatures` as tensors, float32.

    ``position`` [L] in cM, ``frequency`` [L] as the embedding layer sees it.
    """

    position: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved for a batch; here L counts the core's sites.

    ``ids`` int64 [B, K] number haplotypes of the reference set, nearest first; ``alleles`` are theirs,
    ``mismatch`` bool [B, T, K] says where they differ from what the query shows (in the order of
    :attr:`WindowFrame.typed`; False in its filled-up part), ``population`` int64 [B, K] names their populations.
    ``codebook`` [L, 2, D] encodes them, unless the encoding is ``live`` (None: the model's own). ``embeddings``
    [B, K, L, D] come only from the dense store. ``tokens`` int64 [B, k, L], only in mode ``token``, are the alleles
    of those that go through the transformer. ``generation`` and ``snapshot_step`` say how old the encoding is.
    """

    ids: Tensor
    alleles: Neighbours
    mismatch: Tensor
    population: Tensor
    codebook: Tensor | None
    embeddings: Tensor | None
    tokens: Tensor | None
    generation: int
    snapshot_step: int


@dataclass(frozen=True)
class CoreFrame:
    """What a batch holds over the L sites of its window's core, which are predicted.

    ``sites`` are their features. ``tokens`` int64 [B, L] is what the query shows, ``masked`` bool [B, L] where it
    hides, ``alleles`` int64 [B, L] the truth (meaningless at the masked sites of samples to be imputed). ``frequency``
    [B, L] and ``population_frequency`` [B, P, L], float32, are those of ALT among the samples whom the query may
    retrieve (see :mod:`embrag_ds.retrieval.frequency`); ``scored`` bool [B, L] are the masked sites with as many
    copies left among them as the rarest site of the panel has. At the others the loss does not count: such a
    site would not be in a panel without the query, so that it is here says that the query has the allele.
    ``good_turing`` float32 [B, L] is what the panel's spectrum adds to the log-odds of ALT
    (:attr:`embrag_ds.data.panel.PanelSubset.good_turing_odds`).
    """

    sites: SiteTensors
    tokens: Tensor
    masked: Tensor
    alleles: Tensor
    scored: Tensor
    frequency: Tensor
    population_frequency: Tensor
    good_turing: Tensor


@dataclass(frozen=True)
class WindowFrame:
    """What a batch holds over the L sites of its whole window, flanks included.

    ``number`` is the window's, ``core`` the place of its core. ``sites`` are the features of all its sites, ``typed``
    int64 [B, T] lists the sites each query shows, in order, ``typed_count`` int64 [B] says how many they are; the rest
    of a row repeats the window's last site; ``near`` are the places in those rows of all typed sites that lie in the
    core or next to it.
    """

    number: int
    core: slice
    sites: SiteTensors
    typed: Tensor
    typed_count: Tensor
    near: slice


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device: one window of some samples, in two frames, and what was retrieved for it.

    ``retrieved`` is None in mode ``none``. ``bytes_moved`` counts what went from host to device for it. ``ready``
    marks, on a CUDA device, the end of what builds the batch (:func:`embrag_ds.retrieval.collate.receive`).
    """

    core: CoreFrame
    window: WindowFrame
    retrieved: Retrieved | None
    bytes_moved: int
    ready: Any
