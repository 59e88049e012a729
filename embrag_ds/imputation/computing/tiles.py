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
from embrag_ds.model.site_tiles import SiteTiles, Tile
from embrag_ds.ops.threads import undivided
from embrag_ds.retrieval.batch import SiteTensors
from embrag_ds.retrieval.codebooks import ALLELES


def tiles_of(model: ExportedModel, network: Imputer, device: torch.device) -> SiteTiles:
    """The windows that a model was trained on, as tiles of a stretch."""
    layer = network.embedding
    if model.snapshot is not None:
        layer = layer.twin().requires_grad_(False).to(device)
        layer.load_state_dict(model.snapshot)
    settings = model.config.data
    return SiteTiles(settings.window_sites, settings.overlap_sites, lambda sites: layer.codebook(sites)[:, :ALLELES])


class TransformerTiles:
    """The correction by a model's transformer, added to dosages that were copied without it.

    Blocks of haplotypes are computed at once, each by one thread. So the numbers are the same for any number of
    threads, but which other haplotypes are in a block may change their last digits. With ``bf16`` the matrix products
    are in bf16.
    """

    def __init__(self, model: ExportedModel, bf16: bool):
        self._network = model.network()
        self._tiles = tiles_of(model, self._network, torch.device("cpu"))
        self._blocks = RowBlocks()
        self._bf16 = bf16

    @torch.no_grad()
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
        told of every tile how many sites it was for.
        """
        core = SiteTensors(torch.from_numpy(position), torch.from_numpy(site_frequency))
        with undivided(), torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            for tile in self._tiles.of(core):
                given = _inputs(tile, core, copied, typed, alleles)
                (correction,) = self._blocks(lambda block: (self._network.correction(block),), given)
                correction = correction[:, tile.own]
                alt = torch.from_numpy(probability[:, tile.first : tile.last])
                # Log-odds, because the exponential of a large correction would overflow.
                alt.copy_(torch.where(correction == 0, alt, (torch.logit(alt) + correction).sigmoid()))
                watch(tile.last - tile.first)


def _inputs(tile: Tile, core: SiteTensors, copied: Copied, typed: np.ndarray, alleles: np.ndarray) -> CoreInputs:
    """What the network reads of all haplotypes in a tile."""
    sites = slice(tile.start, tile.stop)
    inside = slice(*np.searchsorted(typed, [tile.start, tile.stop]))
    tokens = np.full((len(alleles), tile.stop - tile.start), MASK, dtype=np.int64)
    tokens[:, typed[inside] - tile.start] = alleles[:, inside]
    expected = torch.from_numpy(copied.expected[:, sites])
    return CoreInputs(
        position=tile.position,
        site_frequency=core.frequency[sites],
        tokens=torch.from_numpy(tokens),
        alleles=torch.from_numpy(tokens),  # only losses read these and what is scored
        scored=torch.from_numpy(tokens),
        frequency=torch.from_numpy(copied.frequency[copied.row_of, sites]),
        population_frequency=expected.unsqueeze(1),  # as if of one population
        good_turing=torch.from_numpy(copied.good_turing[copied.row_of, sites]),
        dosage=torch.from_numpy(copied.dosage[:, sites]),
        ancestry=torch.ones(1, 1, 1).expand(len(tokens), 1, len(tile.position)),
        codebook=tile.codebook,
    )
