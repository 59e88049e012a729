"""CUDA kernel for weighted Hamming distances on bit-packed alleles, launched through CuPy.

Alleles stay packed, site by site, as the panel holds them. A thread computes the distances of one query haplotype from
the eight haplotypes of a byte. It XORs the byte of each observed site with the query's allele repeated over eight bits,
and adds the site's weight at every set bit. Masked sites have weight 0 and are skipped. The source is plain C, so that
a test can compile it for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embrag_ds.ops.cuda import kernel

SOURCE = r"""
extern "C" __global__ void mismatch_distances(
    const unsigned char* query,      // [B, T], alleles
    const float* weight,             // [B, T], 0 at the query's masked sites
    const unsigned char* reference,  // [T, W], bit j of byte w is haplotype 8 w + j
    float* distance,                 // [B, H]
    const int tiles, const int sites, const int bytes, const int haplotypes)
{
    const int b = blockIdx.x / tiles;
    const int byte = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (byte >= bytes) return;
    float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    for (int t = 0; t < sites; ++t) {
        const float w = weight[(long long)b * sites + t];
        if (w == 0.f) continue;
        const unsigned spread = query[(long long)b * sites + t] ? 0xFFu : 0u;
        const unsigned differs = reference[(long long)t * bytes + byte] ^ spread;
        #pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += ((differs >> j) & 1u) ? w : 0.f;
    }
    for (int j = 0; j < 8; ++j) {
        const int haplotype = 8 * byte + j;
        if (haplotype < haplotypes) distance[(long long)b * haplotypes + haplotype] = sum[j];
    }
}
"""


def mismatch_distances(tokens: Tensor, weights: Tensor, packed: Tensor, haplotypes: int) -> Tensor:
    """Weighted Hamming distances of query from reference haplotypes, float32 [B, H], on a CUDA device.

    ``tokens`` int64 [B, T] are the queries. ``weights`` float32 [B, T] is what a mismatch at a site adds to a distance,
    0 at masked sites. ``packed`` uint8 [T, ceil(H / 8)] holds the alleles of the ``haplotypes`` reference haplotypes.
    CuPy must be installed.
    """
    queries, sites = tokens.shape
    distance = torch.empty(queries, haplotypes, dtype=torch.float32, device=packed.device)
    given = [(tokens == 1).to(torch.uint8).contiguous(), weights.float().contiguous(), packed.contiguous(), distance]
    width = packed.shape[1]
    kernel(SOURCE, "mismatch_distances").launch_tiled(width, given, (sites, width, haplotypes))
    return distance
