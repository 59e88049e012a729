"""Allele tokens, and the legend of dimension letters that all docstrings use.

============  ==================================================================
letter        meaning
============  ==================================================================
``N``         samples: of a micro-batch, a panel or a file
``B``         haplotypes in a micro-batch; ``B = 2 N``, sample ``i`` owns rows
              ``2 i`` and ``2 i + 1``
``L``         sites in a window (differs from window to window; never padded)
``S``         sites in a panel or a file
``T``         typed sites
``n``         rows of one call: a block of sites, or the points of a map
``H``         reference haplotypes; ``H = 2 x reference samples``
``K``         retrieved neighbours (reference haplotypes) per query haplotype
``E``         samples that a sample must not retrieve, itself included
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
