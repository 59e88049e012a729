"""Two cheap imputation methods that any model must beat."""

from __future__ import annotations

import numpy as np

from embrag_ds.data.tokens import ALT, REF


def allele_frequency_dosage(panel_af: np.ndarray, people: int) -> np.ndarray:
    """Dosage [S, N] float32 of people of whom nothing is known: twice the panel's ALT frequency [S]."""
    return np.repeat(2.0 * np.asarray(panel_af, dtype=np.float32)[:, None], people, axis=1)


def nearest_haplotype_dosage(
    panel_alleles: np.ndarray,
    target_alleles: np.ndarray,
    typed_index: np.ndarray,
    block: int = 32,
    context: int = 16,
) -> np.ndarray:
    """Dosage [S, N] float32 copied from the nearest panel haplotype of each stretch of one contig.

    ``panel_alleles`` [S, H] uint8, ``target_alleles`` [T, 2N] uint8 (missing alleles count for
    nothing), ``typed_index`` [T] increasing rows of the panel. For each block of consecutive typed
    sites, every target haplotype copies, at all sites of the block's stretch, the panel haplotype
    with the smallest Hamming distance over the block and ``context`` typed sites on either side
    (the lowest index on ties). Stretches meet half way, by site index, between the last typed
    site of a block and the first of the next.

    Peak memory beside the inputs: 4 x 2N x H bytes of scores and 4 x S x N bytes of result.
    """
    sites = len(panel_alleles)
    haplotypes = target_alleles.shape[1]
    typed = len(typed_index)
    panel_signs = _signs(panel_alleles[typed_index])
    target_signs = _signs(target_alleles)
    dosage = np.empty((sites, haplotypes // 2), dtype=np.float32)
    begin = 0
    # A contig without a typed site is one stretch, where all haplotypes are equally near.
    for first in range(0, max(typed, 1), block):
        last = first + block
        end = int(typed_index[last - 1] + typed_index[last] + 1) // 2 if last < typed else sites
        compared = slice(max(first - context, 0), last + context)
        # A sum of +-1 over the compared sites: exact in float32, larger where fewer alleles differ.
        agreement = target_signs[compared].T @ panel_signs[compared]
        nearest = agreement.argmax(axis=1)
        copied = panel_alleles[begin:end][:, nearest]
        dosage[begin:end] = copied[:, 0::2].astype(np.float32) + copied[:, 1::2]
        begin = end
    return dosage


def _signs(alleles: np.ndarray) -> np.ndarray:
    """REF as -1, ALT as +1 and anything else as 0, float32."""
    return (alleles == ALT).astype(np.float32) - (alleles == REF).astype(np.float32)
