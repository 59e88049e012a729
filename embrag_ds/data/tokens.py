"""Tokens of the haplotype alphabet, and the one legend for dimension letters.

============  ==================================================================
letter        meaning
============  ==================================================================
``N``         samples in a micro-batch
``B``         haplotypes in a micro-batch; ``B = 2 N``, sample ``i`` owns rows
              ``2 i`` and ``2 i + 1``
``L``         sites in a window (differs from window to window; never padded)
``S``         sites in a panel
``T``         typed sites
``H``         reference haplotypes; ``H = 2 x reference samples``
``K``         retrieved neighbours (reference haplotypes) per query haplotype
``P``         populations
``D``         model width
``V``         vocabulary size, :data:`VOCAB`
============  ==================================================================

Alleles are ``uint8`` with 0 = REF and 1 = ALT, so that an allele is its own token.
"""

REF = 0
ALT = 1
MASK = 2
MISSING = 3
VOCAB = 4
