"""Records that the loop along a stretch reads and fills (:mod:`embrag_ds.copying.loops`).

Letters beside those of :mod:`embrag_ds.data.tokens`: G blocks of sites, J terms of the recombination prior.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PanelPart(NamedTuple):
    """A panel's part of a stretch, as :func:`embrag_ds.copying.loops.copy_along` reads it.

    Typed sites are those of the whole stretch. Sites and their blocks are those of its core. Interval i lies between
    typed sites i - 1 and i; a typed site belongs to the interval that it ends.

    * ``packed`` uint8 [ceil(T / 8), H]: alleles at typed sites, that of site t in bit t % 8 of row t // 8. ``turned``
      uint64 [H, ceil(T / 64)] are the same by haplotype, that of site t in bit t % 64 of word t // 64.
    * ``patterns`` uint8 [ceil(T / 8), 256]: the distinct values of each row of ``packed``; ``pattern_count`` int64
      [ceil(T / 8)] says how many there are.
    * ``position`` float32 [T] in cM; ``place`` int64 [T] of each typed site; ``population`` int64 [H].
    * ``intervals`` int64 [T + 2]: blocks of interval i are ``intervals[i]`` to ``intervals[i + 1]``.
    * ``bounds`` int64 [G + 1], ``sequence`` uint16 or uint32 [G, H]: sites and sequences of blocks, as in
      :class:`~embrag_ds.ops.dosage.Numbered`. ``sequences`` int64 [G + 1] counts those of the blocks before;
      ``most_sequences`` is the number in the richest block.
    * ``minor_start`` int64 [all sequences + 1], ``minor_sites`` uint8: sites of a block where a sequence carries the
      minor allele.
    * ``share`` float32 [L]: weight of the right typed site; ``minor_is_ref`` bool [L].
    * ``nearest``, ``gap`` float32 [L]: features of the confidence head.
    """

    packed: np.ndarray
    turned: np.ndarray
    patterns: np.ndarray
    pattern_count: np.ndarray
    position: np.ndarray
    place: np.ndarray
    population: np.ndarray
    intervals: np.ndarray
    bounds: np.ndarray
    sequence: np.ndarray
    sequences: np.ndarray
    most_sequences: int
    minor_start: np.ndarray
    minor_sites: np.ndarray
    share: np.ndarray
    minor_is_ref: np.ndarray
    nearest: np.ndarray
    gap: np.ndarray


class Rates(NamedTuple):
    """A model's numbers for a stretch, as :func:`embrag_ds.copying.loops.copy_along` reads them.

    * ``ratio`` float32 [2, T]: emission factor of a mismatch, in the slow and the fast model.
    * ``jump`` float32 [2, T]: probability of a recombination before each typed site.
    * ``strength`` float32 [J] per typed site in a hundred, ``reach`` float32 [J], the weight of the next place, and
      ``typed_at`` float32 [J, places], the weight of all typed sites: the recombination prior.
    * ``keep``, ``background``, ``least`` float32: least probability relative to the mean one, weight of the expected
      frequency, least probability of the minor allele with evidence.
    """

    ratio: np.ndarray
    jump: np.ndarray
    strength: np.ndarray
    reach: np.ndarray
    typed_at: np.ndarray
    keep: np.float32
    background: np.float32
    least: np.float32


class Frequencies(NamedTuple):
    """What depends on allele frequencies: a row for all targets outside the panel, and one for each inside.

    ``by_population`` float32 [rows, P, L] of the minor allele; ``slow`` float32 [rows, L], the weight of the slow
    model; ``turing`` float32 [rows, L], factor of the minor allele's odds; ``log_frequency`` float32 [rows, L], a
    feature of the confidence head; ``flipped`` bool [rows, L], where another allele is the minor one than in the panel.
    """

    by_population: np.ndarray
    slow: np.ndarray
    turing: np.ndarray
    log_frequency: np.ndarray
    flipped: np.ndarray


class Head(NamedTuple):
    """Weights of the confidence head, float32: ``first`` [width, 12], ``second`` [width, width], ``last`` [width].

    Each has its bias, and ``density`` is a feature that is the same at all sites.
    """

    first: np.ndarray
    first_bias: np.ndarray
    second: np.ndarray
    second_bias: np.ndarray
    last: np.ndarray
    last_bias: np.float32
    density: np.float32


class Kept(NamedTuple):
    """A worker's arrays of what is kept at two typed sites, a half each, by place in the list of chosen haplotypes.

    What a target takes to its next piece has a lane for each of four: ``length``, ``root``, ``uncertainty``,
    ``ancestry``, ``moved``, ``moved_rows`` and ``number_moved`` have four rows of these shapes.

    * ``flags`` uint8 [2, H, or the next multiple of 64]: whether a haplotype is not negligible.
    * ``shares``, ``fasts``, ``lengths`` float32 [2, H]: their probability by the slow model, by the fast one, and match
      length times the first.
    * ``length``, ``root``, ``uncertainty`` float32 [2]: mean match length, sum of the probabilities' square roots, and
      minus the logarithm of the sum of their squares, by the slow model.
    * ``ancestry`` float32 [2, P]: probability of each population by the slow model.
    * ``some`` uint8 [as flags], ``either`` int32 [H + 8]: haplotypes that are kept in one half or the other, and
      ``both`` float32 [H, 8]: what is kept of them in the new half and in the other one, with the first's square root.
    * ``moved`` int32 [H + 8], ``moved_rows`` float32 [H, 3], ``number_moved`` int64 [1]: haplotypes that are kept at
      the first typed site of the piece behind. ``where`` int32 [H]: places of the chosen haplotypes.
    """

    flags: np.ndarray
    shares: np.ndarray
    fasts: np.ndarray
    lengths: np.ndarray
    length: np.ndarray
    root: np.ndarray
    uncertainty: np.ndarray
    ancestry: np.ndarray
    some: np.ndarray
    either: np.ndarray
    both: np.ndarray
    moved: np.ndarray
    moved_rows: np.ndarray
    where: np.ndarray
    number_moved: np.ndarray


class Scratch(NamedTuple):
    """A worker's arrays for the sites of a block.

    * ``sums`` float32 [2 sequences, 8]: two parts of ``both`` summed by sequence, one after the other.
    * ``marked`` uint8 [sequences], ``touched`` int64 [sequences + 1]: the sequences with a sum.
    * ``by_site`` float32 [64, 8]: the same, summed over a site's carriers of the minor allele; ``pending`` uint8 [64]:
      sites of a block with a carrier or a likely minor allele; ``expected`` float32 [64]: that allele's frequency.
    """

    sums: np.ndarray
    marked: np.ndarray
    touched: np.ndarray
    by_site: np.ndarray
    pending: np.ndarray
    expected: np.ndarray


class Waiting(NamedTuple):
    """Sites of a haplotype that wait for the confidence head, at most 64.

    All but the layers have a lane for each of four targets, before these shapes.

    * ``number`` int64 [1]: how many; ``sites`` int64 [64], ``to_ref`` bool [64]: which, and whether their minor allele
      is REF; ``odds`` float32 [64]: its log-odds.
    * ``features`` float32 [12, 64]; ``first``, ``second`` float32 [width, 64], ``total`` float32 [64]: of the layers.
    """

    number: np.ndarray
    sites: np.ndarray
    to_ref: np.ndarray
    odds: np.ndarray
    features: np.ndarray
    first: np.ndarray
    second: np.ndarray
    total: np.ndarray


class Found(NamedTuple):
    """What the loop finds of target haplotypes; of one of them, all but ``noted`` are without their first axis.

    * ``probability`` float32 [B, L] of ALT; ``copied`` float32 [B, 2, L] or [B, 2, 0], the dosage before any correction
      and the expected frequency of ALT.
    * ``noted`` bool [L], or [0] for none: the n sites where the inputs of the confidence head are noted. Of a target
      they are ``number`` int64 [B, 1], with their ``sites`` int32 [B, n], ``to_ref`` bool [B, n] where the minor allele
      is REF, and the head's ``features`` float32 [B, n, 12].
    """

    probability: np.ndarray
    copied: np.ndarray
    noted: np.ndarray
    number: np.ndarray
    sites: np.ndarray
    to_ref: np.ndarray
    features: np.ndarray


class States(NamedTuple):
    """A worker's arrays of all H haplotypes, as states of both models for four targets, a lane each.

    A row of states has 8 columns: four lanes of the slow model, then those of the fast one.

    * ``prior`` float32 [G, H, 4]; ``highest`` float32 [H, 4] is the highest of those of a piece. ``running`` float32
      [H] and ``bits`` int32 [H] are scratch for them.
    * Forward states, float32 [.., H, 8]: ``sections`` before the first site of every section, ``saved`` before every
      piece of one section and behind the last, ``between`` two runs of a piece, ``joint`` behind the last typed site
      next to the core. ``behind`` are backward states, at a piece's first site and behind it.
    * ``own``, ``known`` uint8 [4, ceil(T / 64) * 8]: ALT and typed alleles of each target, packed as the panel's.
    * Of the steps to every typed site, float32 [T, 8]. Forward states are multiplied by ``came``, later by ``scale``,
      and then sum to ``total``. Backward states are multiplied by ``went``, to which ``left`` is added, and sum to
      ``next`` with priors and emissions. ``paths`` is what the products of both states sum to.
    * Sums by pattern, float32 [512, 8] of states and [512, 4] of priors, twice 256 rows of which one in turn is added
      to: ``forward_sums``, ``forward_priors``, ``backward_sums``, ``backward_priors``.
    * Of the patterns of a piece: ``by_state``, ``gain``, ``added`` float32 [8, 256], ``by_prior`` float32 [4, 256],
      ``mask`` uint8 [4, 256], where each differs from the target, and ``factors`` float32 [256, 16], ``gain`` and
      ``added`` once more.
    """

    prior: np.ndarray
    highest: np.ndarray
    running: np.ndarray
    bits: np.ndarray
    sections: np.ndarray
    saved: np.ndarray
    between: np.ndarray
    joint: np.ndarray
    behind: np.ndarray
    own: np.ndarray
    known: np.ndarray
    came: np.ndarray
    scale: np.ndarray
    total: np.ndarray
    went: np.ndarray
    left: np.ndarray
    next: np.ndarray
    paths: np.ndarray
    forward_sums: np.ndarray
    forward_priors: np.ndarray
    backward_sums: np.ndarray
    backward_priors: np.ndarray
    factors: np.ndarray
    by_state: np.ndarray
    by_prior: np.ndarray
    gain: np.ndarray
    added: np.ndarray
    mask: np.ndarray


class Chosen(NamedTuple):
    """A worker's arrays of the haplotypes that can matter in a piece of eight typed sites.

    * ``flags`` uint8 [H, or the next multiple of 64]: a bit for each of four targets; ``who`` int32 [H + 8]: the
      haplotypes of one of them, increasing.
    * ``least`` float32 [4, 2]: sum of squares of the probabilities, at least; ``limit`` float32 [1, 8]: what is
      negligible. ``bounds`` float32 [256, 32] are four factors of a bound on the probabilities by pattern, for four
      targets and both models. ``steps`` float32 [2, 8, 256], ``ends`` [2, 256] and ``most`` [4, 256] are scratch for
      them.
    * ``came``, ``behind`` float32 [2, H]: their forward states before the piece and their backward states behind it;
      ``differs`` uint8 [H]; ``prior`` float32 [8, H], and ``row`` int64 [8] of it for every typed site.
    * ``begin`` float32 [9, H], ``end`` float32 [H], in cM: the last mismatch up to each typed site, the last row before
      the piece, and the first mismatch from a typed site on.
    * ``before``, ``after``, ``seen`` uint16 [4, H]: of the haplotypes chosen so far, the typed sites of the last
      mismatch before a piece and of the first one from ``seen`` on.
    * ``joint`` float32 [8, 2, H]: probabilities; ``squares`` float32 [8, 2]: sums of squares of the
      probabilities.
    """

    flags: np.ndarray
    who: np.ndarray
    least: np.ndarray
    limit: np.ndarray
    bounds: np.ndarray
    steps: np.ndarray
    ends: np.ndarray
    most: np.ndarray
    came: np.ndarray
    behind: np.ndarray
    differs: np.ndarray
    prior: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    before: np.ndarray
    after: np.ndarray
    seen: np.ndarray
    joint: np.ndarray
    squares: np.ndarray
