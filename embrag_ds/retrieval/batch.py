"""Records of a batch with its retrieved neighbours, as the collator builds it and the network reads it.

For the dimension letters see :mod:`embrag_ds.data.tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from embrag_ds.ops.dosage import Neighbours
from embrag_ds.ops.li_stephens import Near


@dataclass(frozen=True)
class SiteTensors:
    """Site features of a window or core as tensors: the first two of :class:`~embrag_ds.data.windows.SiteFeatures`.

    ``position`` float32 [L] is in cM from the core's centre. ``frequency`` float32 [L] is the ALT frequency, bounded
    away from 0 and 1.
    """

    position: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class Retrieved:
    """Neighbours retrieved for a batch; L counts the sites of the core.

    * ``ids`` int64 [B, K]: haplotypes of the reference set, nearest first (with local retrieval, by rank in the
      chunks).
    * ``alleles``: their alleles in the core.
    * ``mismatch`` bool [B, T, K]: where they differ from the query at its typed sites, in the order of
      :attr:`WindowFrame.typed`; False in the padding.
    * ``population`` int64 [B, K]: their populations.
    * ``codebook`` [L, 2, D]: embeddings of both alleles; None in mode ``token``, and with encoding ``live``, where the
      model computes its own.
    * ``embeddings`` [B, K, L, D]: stored embeddings, from the dense store only.
    * ``tokens`` int64 [B, token_k, L]: alleles of the neighbours that pass through the transformer, in mode ``token``
      only.
    * ``generation`` and ``snapshot_step``: number of the encoding in use, and the step of its snapshot.
    * ``barred`` bool [B, K]: which of them a query must not copy, where all haplotypes are its neighbours; else None.
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
    barred: Tensor | None = None


@dataclass(frozen=True)
class CoreFrame:
    """Data of a batch over the L sites of its window's core, the sites that are predicted.

    * ``sites``: their features.
    * ``tokens`` int64 [B, L]: observed alleles of the query, MASK elsewhere.
    * ``masked`` bool [B, L]: sites whose allele is not observed.
    * ``alleles`` int64 [B, L]: true alleles, undefined at the masked sites of imputation targets.
    * ``scored`` bool [B, L]: masked sites that count in the loss, see below.
    * ``frequency`` float32 [B, L] and ``population_frequency`` float32 [B, P, L]: ALT frequencies, see
      :mod:`embrag_ds.retrieval.frequency`.
    * ``good_turing`` float32 [B, L]: correction of the log-odds of ALT by the panel's allele count spectrum, see
      :attr:`embrag_ds.data.panel.PanelSubset.good_turing_odds`.

    A masked site is scored if, without the excluded samples, the minor allele keeps the panel's minimum allele count. A
    panel without those samples would not list the other sites, so the presence of such a site reveals the query's
    allele.
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
    """Data of a batch over the L sites of its whole window, flanks included.

    * ``number``: number of the window. ``core``: its core, as a slice of the window's sites.
    * ``sites``: features of all its sites.
    * ``typed`` int64 [B, T]: observed sites of each query haplotype, in order, padded with the window's last site.
    * ``typed_count`` int64 [B]: number of observed sites of a row.
    * ``near``: the columns of ``typed`` that hold a row's typed sites in the core and next to it.
    * ``place`` int64 [B, T]: place of each typed site, one of ``places``, each ``place_cm`` long
      (:func:`embrag_ds.data.windows.places`).
    """

    number: int
    core: slice
    sites: SiteTensors
    typed: Tensor
    typed_count: Tensor
    near: Near
    place: Tensor
    places: int
    place_cm: float


@dataclass(frozen=True)
class Batch:
    """Micro-batch on the device: some samples in one window, over its core and over all its sites, with neighbours.

    ``retrieved`` is None in mode ``none``. ``bytes_moved`` is the number of bytes copied from host to device for it.
    ``ready`` is a CUDA event after the work that builds the batch, or None on a CPU; see
    :func:`embrag_ds.retrieval.collate.receive`.
    """

    core: CoreFrame
    window: WindowFrame
    retrieved: Retrieved | None
    bytes_moved: int
    ready: Any
