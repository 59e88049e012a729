"""Tokens of the haplotype alphabet, and the legend of the letters in array shapes.

A shape such as [B, K, L] has one letter for each dimension:

============  ==================================================================
letter        meaning
============  ==================================================================
``B``         haplotypes in a micro-batch; ``B = 2 N``, sample ``i`` owns rows
              ``2 i`` and ``2 i + 1``
``C``         chains of the copying model; a multiple of B, chain ``c`` is about
              haplotype ``c % B``
``D``         model width (``model.dims``)
``E``         samples, or haplotypes, that a query must not retrieve
``G``         minor-allele-frequency bins in ``evaluation/``; blocks of sites in
              ``ops/dosage.py``
``H``         reference haplotypes; ``H = 2 x reference samples``
``K``         retrieved neighbours (reference haplotypes) per query haplotype
``L``         sites in a window, or in its core (differs from window to window;
              never padded)
``N``         samples in a micro-batch, a panel or a file; in ``ops/``, typed
              sites around the core
``P``         populations
``R``         haplotypes to embed; bootstrap resamples in ``evaluation/``
``S``         sites in a panel or a file
``T``         typed sites
``V``         vocabulary size, :data:`VOCAB`
``W``         bytes in a bit-packed row; ``W = ceil(haplotypes / 8)``
============  ==================================================================

Small letters such as ``n`` count a selection.

Alleles are ``uint8`` with 0 = REF and 1 = ALT, so that an allele is its own token. :data:`MASK` stands for a masked
site; :data:`MISSING` is reserved.
"""

REF = 0
ALT = 1
MASK = 2
MISSING = 3
VOCAB = 4
