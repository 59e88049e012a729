"""The embedding layer: per site, so a haplotype's embedding is a choice among V vectors at each site.

    e_l(t) = token[t] + s_l * effect[t] + site_l

``site_l`` and the modulation ``s_l`` depend on the site alone (its allele frequency and its place in
the window, in cM). Without ``s_l`` the distance of two haplotypes would be their plain Hamming distance
whatever was learned; with it every site has a learned weight. No parameter belongs to a particular site,
so the layer applies to any region and panel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from embrag_ds.data.tokens import ALT, REF, VOCAB
from embrag_ds.retrieval.batch import SiteTensors

_FREQUENCY_OCTAVES = 6
_SHORTEST_CM, _LONGEST_CM, _WAVELENGTHS = 0.01, 20.0, 12
FREQUENCY_FEATURES = 4 * _FREQUENCY_OCTAVES + 2
POSITION_FEATURES = 2 * _WAVELENGTHS


def frequency_features(frequency: Tensor) -> Tensor:
    """Fourier features of allele frequencies [...] -> [..., FREQUENCY_FEATURES], float32.

    Two scales: the arcsine of the square root (which stabilises a binomial's variance) and the
    logarithm of the minor-allele frequency (which tells 0.1 % from 1 %), Tancik et al. 2020.
    """
    frequency = frequency.float().clamp(1e-6, 1 - 1e-6)  # the square root has no slope at 0
    arcsine = torch.asin(frequency.sqrt()) * (2 / math.pi)
    logarithm = -torch.log10(torch.minimum(frequency, 1 - frequency)) / 6
    octaves = math.pi * 2.0 ** torch.arange(_FREQUENCY_OCTAVES, device=frequency.device)
    angles = torch.cat([arcsine[..., None] * octaves, logarithm[..., None] * octaves], dim=-1)
    raw = torch.stack([arcsine, logarithm], dim=-1)
    return torch.cat([angles.sin(), angles.cos(), raw], dim=-1)


def position_features(position: Tensor) -> Tensor:
    """Sines and cosines of positions [L] in cM over a geometric ladder of wavelengths,
    [L, POSITION_FEATURES], float32."""
    ladder = torch.logspace(math.log10(_SHORTEST_CM), math.log10(_LONGEST_CM), _WAVELENGTHS, device=position.device)
    angles = position.float()[:, None] * (2 * math.pi / ladder)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class HaplotypeEmbedding(nn.Module):
    """Token, learned position, allele-frequency features and a modulated allele effect."""

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
        """Embed ``tokens`` int64 [R, L] of a window: [R, L, D]."""
        frequency, position = self._features(sites)
        site = self.frequency(frequency) + self.position(position)
        modulation = self.modulation(torch.cat([frequency, position], dim=-1))
        return self.token(tokens) + modulation * self.effect(tokens) + site

    def twin(self) -> HaplotypeEmbedding:
        """A layer of the same shape with weights of its own."""
        return HaplotypeEmbedding(self.dims)

    def codebook(self, sites: SiteTensors) -> Tensor:
        """C [L, V, D]: every token embedded at every site of a window."""
        tokens = torch.arange(VOCAB, device=sites.position.device)
        return self(tokens[:, None].expand(VOCAB, len(sites.position)), sites).transpose(0, 1)

    def site_weights(self, sites: SiteTensors) -> Tensor:
        """w_l = ||e_l(ALT) - e_l(REF)||^2, float32 [L], without a codebook: what is the same for both falls out."""
        alleles = torch.arange(REF, ALT + 1, device=sites.position.device)  # a list would be copied, and waited for
        token, effect = (torch.diff(each(alleles), dim=0) for each in (self.token, self.effect))
        modulation = self.modulation(torch.cat(self._features(sites), dim=-1))
        return (token + modulation * effect).float().square().sum(-1)

    def _features(self, sites: SiteTensors) -> tuple[Tensor, Tensor]:
        kind = self.token.weight.dtype
        return frequency_features(sites.frequency).to(kind), position_features(sites.position).to(kind)


def gather_embeddings(codebook: Tensor, tokens: Tensor) -> Tensor:
    """Embeddings of ``tokens`` int64 [..., L] from a codebook [L, V, D]: [..., L, D]."""
    sites = torch.arange(codebook.shape[0], device=tokens.device)
    return nn.functional.embedding(tokens + sites * codebook.shape[1], codebook.flatten(0, 1))
