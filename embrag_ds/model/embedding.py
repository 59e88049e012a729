"""Embedding layer of haplotypes: an embedding of each site's token, independent of the other sites.

The embedding of token t at site l::

    e_l(t) = token[t] + s_l * effect[t] + site_l

``site_l`` is a function of the site's ALT frequency and its position in the window, in cM. The modulation ``s_l`` is a
function of that position and of the minor allele's frequency. With ``s_l``, every site has a learned weight in the
distance of two haplotypes, whichever of its alleles is called REF. Without it, that distance would be proportional to
the Hamming distance. No parameter belongs to a particular site, so the layer applies to any region and panel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from embrag_ds.data.tokens import ALT, REF, VOCAB
from embrag_ds.model.numbers import (
    FREQUENCY_FEATURES,
    FREQUENCY_OCTAVES,
    LEAST_FREQUENCY,
    LONGEST_WAVE_CM,
    POSITION_FEATURES,
    SHORTEST_WAVE_CM,
    WAVELENGTHS,
)
from embrag_ds.model.recompute import computed_again
from embrag_ds.retrieval.batch import SiteTensors


def frequency_features(frequency: Tensor) -> Tensor:
    """Fourier features (Tancik et al. 2020) of allele frequencies [...], float32 [..., FREQUENCY_FEATURES].

    They are taken on two scales. The arcsine of the square root stabilises the variance of a binomial; the logarithm of
    the minor allele frequency separates 0.1 % from 1 %.
    """
    frequency = frequency.float().clamp(
        LEAST_FREQUENCY, 1 - LEAST_FREQUENCY
    )  # the square root has no finite gradient at 0
    arcsine = torch.asin(frequency.sqrt()) * (2 / math.pi)
    logarithm = -torch.log10(_minor(frequency)) / 6
    octaves = math.pi * 2.0 ** torch.arange(FREQUENCY_OCTAVES, device=frequency.device)
    angles = torch.cat([arcsine[..., None] * octaves, logarithm[..., None] * octaves], dim=-1)
    raw = torch.stack([arcsine, logarithm], dim=-1)
    return torch.cat([angles.sin(), angles.cos(), raw], dim=-1)


def position_features(position: Tensor) -> Tensor:
    """Sines and cosines of positions [L] in cM, float32 [L, POSITION_FEATURES].

    The wavelengths form a geometric sequence from 0.01 to 20 cM.
    """
    ladder = torch.logspace(
        math.log10(SHORTEST_WAVE_CM), math.log10(LONGEST_WAVE_CM), WAVELENGTHS, device=position.device
    )
    angles = position.float()[:, None] * (2 * math.pi / ladder)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class HaplotypeEmbedding(nn.Module):
    """Embedding layer of width D = ``dims``; see the module's formula."""

    def __init__(self, dims: int):
        super().__init__()
        self.dims = dims
        self.token = nn.Embedding(VOCAB, dims)
        self.effect = nn.Embedding(VOCAB, dims)
        self.frequency = nn.Linear(FREQUENCY_FEATURES, dims)
        self.position = nn.Linear(POSITION_FEATURES, dims, bias=False)
        self.modulation = nn.Linear(FREQUENCY_FEATURES + POSITION_FEATURES, dims)
        nn.init.normal_(self.token.weight, std=dims**-0.5)
        nn.init.normal_(self.effect.weight, std=dims**-0.5)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.ones_(self.modulation.bias)

    def forward(self, tokens: Tensor, sites: SiteTensors) -> Tensor:
        """Embed ``tokens`` int64 [R, L] at the L ``sites``: [R, L, D]."""
        kind = self.token.weight.dtype
        both = torch.stack([sites.frequency, _minor(sites.frequency)])
        frequency, minor = frequency_features(both).to(kind)  # half the launches of two calls
        position = position_features(sites.position).to(kind)
        site = self.frequency(frequency) + self.position(position)
        modulation = self.modulation(torch.cat([minor, position], dim=-1))
        return self.token(tokens) + modulation * self.effect(tokens) + site

    def twin(self) -> HaplotypeEmbedding:
        """New layer of the same shape, with freshly initialised weights."""
        return HaplotypeEmbedding(self.dims)

    def codebook(self, sites: SiteTensors) -> Tensor:
        """Codebook [L, V, D]: the embedding of every token at each of the ``sites``."""
        tokens = torch.arange(VOCAB, device=sites.position.device)
        return self(tokens[:, None].expand(VOCAB, len(sites.position)), sites).transpose(0, 1)

    def site_weights(self, frequency: Tensor) -> Tensor:
        """Weight of a mismatch at sites of ALT ``frequency`` float32 [L], ``w_l = ||e_l(ALT) - e_l(REF)||^2``.

        Float32 [L], as at the core's centre, so that a site has the same weight in any window. It is computed without a
        codebook, because ``site_l`` cancels in the difference. For the backward pass only the sites' features are
        stored.
        """
        at_centre = position_features(torch.zeros_like(frequency))
        features = torch.cat([frequency_features(_minor(frequency)), at_centre], dim=-1)
        return computed_again(self._site_weights, features.to(self.token.weight.dtype))

    def _site_weights(self, features: Tensor) -> Tensor:
        """:meth:`site_weights` from ``features`` [L, FREQUENCY_FEATURES + POSITION_FEATURES] of ``s_l``."""
        alleles = torch.arange(REF, ALT + 1, device=features.device)  # copying a list would synchronise a GPU
        token, effect = (torch.diff(each(alleles), dim=0) for each in (self.token, self.effect))
        return (token + self.modulation(features) * effect).float().square().sum(-1)


def _minor(frequency: Tensor) -> Tensor:
    """Frequency of the minor allele, from that of ALT."""
    return torch.minimum(frequency, 1 - frequency)


def gather_embeddings(codebook: Tensor, tokens: Tensor) -> Tensor:
    """Gather the embeddings [..., L, D] of ``tokens`` int64 [..., L] from a ``codebook`` [L, V, D]."""
    sites = torch.arange(codebook.shape[0], device=tokens.device)
    return nn.functional.embedding(tokens + sites * codebook.shape[1], codebook.flatten(0, 1))
