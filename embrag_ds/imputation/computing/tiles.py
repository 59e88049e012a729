"""The transformer along stretches that a CPU's loop has copied, in tiles that are the windows of training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from embrag_ds.copying.along import Copied
from embrag_ds.data.tokens import MASK
from embrag_ds.export import ExportedModel
from embrag_ds.model.compiled import CoreInputs
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.row_blocks import RowBlocks
from embrag_ds.model.site_tiles import SiteTiles
from embrag_ds.ops.threads import undivided
from embrag_ds.retrieval.codebooks import ALLELES

_ROWS = 16


def tiles_of(model: ExportedModel, network: Imputer, device: torch.device) -> SiteTiles:
    """The windows that a model was trained on, as tiles of a stretch."""
    layer = network.embedding
    if model.snapshot is not None:
        layer = layer.twin().requires_grad_(False).to(device)
        layer.load_state_dict(model.snapshot)
    settings = model.config.data
    return SiteTiles(settings.window_sites, settings.overlap_sites, lambda sites: layer.codebook(sites)[:, :ALLELES])


class TransformerTiles:
    """The residual of a model's transformer, added to dosages that were copied without it.

    Blocks of 16 haplotypes are computed at once, each by one thread, so the numbers are the same for any number of
    threads. With ``bf16`` the matrix products are in bf16.
    """

    def __init__(self, model: ExportedModel, bf16: bool):
        self._network = model.network()
        self._network.site_tiles = tiles_of(model, self._network, torch.device("cpu"))
        self._blocks = RowBlocks()
        self._bf16 = bf16

    def add(
        self,
        probability: np.ndarray,
        copied: Copied,
        position: np.ndarray,
        site_frequency: np.ndarray,
        typed: np.ndarray,
        alleles: np.ndarray,
        watch: Callable[[int], None],
    ) -> None:
        """Correct ``probability`` float32 [2N, L] of ALT in place, in a core with sites of these features float32 [L].

        ``alleles`` uint8 [2N, t] are those at the core's sites ``typed`` int64 [t], MASK where missing. ``watch`` is
        told of every block of haplotypes how many it has.
        """

        def correct(first: int) -> None:
            rows = slice(first, first + _ROWS)
            tokens = np.full(probability[rows].shape, MASK, dtype=np.int64)
            tokens[:, typed] = alleles[rows]
            of_rows = copied.row_of[rows]
            dosage, expected = copied.dosage[rows], copied.expected[rows]
            given = CoreInputs(
                position=torch.from_numpy(position),
                site_frequency=torch.from_numpy(site_frequency),
                tokens=torch.from_numpy(tokens),
                alleles=torch.from_numpy(tokens),  # which only a loss would read, as what is scored
                scored=torch.from_numpy(tokens),
                frequency=torch.from_numpy(copied.frequency[of_rows]),
                population_frequency=torch.from_numpy(expected).unsqueeze(1),  # as if of one population
                good_turing=torch.from_numpy(copied.good_turing[of_rows]),
                dosage=torch.from_numpy(dosage),
                ancestry=torch.ones(len(tokens), 1, len(position)),
            )
            with torch.no_grad():
                residual = self._network.correction(given)
            alt = torch.from_numpy(probability[rows])
            alt.copy_(torch.where(residual == 0, alt, (torch.logit(alt) + residual).sigmoid()))
            watch(len(tokens))

        with undivided(), torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            self._blocks.each(correct, range(0, len(probability), _ROWS))
