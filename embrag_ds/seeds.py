"""Random numbers: every purpose has streams of its own, one for each seed and key.

A stream comes from numpy's ``SeedSequence(seed, spawn_key=(purpose, *key))``. It hashes a sequence of 32-bit words: the
seed, padded to four words, then one word for each number of the spawn key. So no two of (purpose, seed, key) give
the same sequence, and no stream can be met under another purpose.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from embrag_ds.errors import UserError

SEED_LIMIT = 2**64
"""Seeds are lower. torch takes no more."""
_KEY_LIMIT = 2**32  # one word: a larger number would be two, and could be another key


class Purpose(IntEnum):
    """What random numbers are drawn for, and which key tells the streams of one seed apart.

    The numbers are part of the streams: a new purpose gets a new number, and none is changed or used again.
    """

    SPLIT = 0
    """Training and validation samples; no key."""
    EPOCH_ORDER = 1
    """Order of an epoch's micro-batches; epoch."""
    SAMPLE_GROUPS = 2
    """Samples that share a micro-batch; epoch, window."""
    AUGMENTATION = 3
    """Errors put into a training query; epoch, window, sample."""
    TRAINING_MASKS = 4
    """Epoch, window, scope."""
    VALIDATION_MASKS = 5
    """Number of the mask, window; always under seed 0."""
    INITIAL_WEIGHTS = 6
    """No key."""
    DROPOUT = 7
    """Step, rank."""
    BOOTSTRAP = 8
    """Resampling of samples, or of measurements; no key."""
    SIMULATION = 9
    """Recombination map, alleles and typed sites of the default data; no key."""
    SIMULATED_ERRORS = 10
    """Errors of phasing and calling in the default data; no key."""
    BENCHMARK_PANEL = 11
    """Alleles of a made-up panel; no key."""
    BENCHMARK_QUERIES = 12
    """Samples and masks of a made-up batch; no key."""
    FAULTS = 13
    """Moments at which runs are killed; no key."""
    ARRAY_SITES = 14
    """Sites of a genotyping array that is made up; no key."""
    HEAD_ROWS = 15
    """Order of the rows that a confidence head is fitted to; no key."""


_SIMULATOR: dict[Purpose, tuple[int, ...]] = {Purpose.SIMULATION: (), Purpose.SIMULATED_ERRORS: (3,)}
"""Words after the seed where a data set once published must stay the same. Without a spawn key the sequence has four
words, which no other stream's has, and the simulator's seeds are one word long."""


def generator(purpose: Purpose, seed: int, *key: int) -> np.random.Generator:
    """The random numbers of a purpose, for a seed in [0, 2^64) and a key of numbers in [0, 2^32).

    Raises :class:`UserError` for another seed.
    """
    return np.random.default_rng(_sequence(purpose, seed, key))


def torch_seed(purpose: Purpose, seed: int, *key: int) -> int:
    """A seed in [0, 2^64) for :func:`torch.manual_seed`, under the rules of :func:`generator`.

    torch's generator on the CPU takes only the lower 32 bits of what it is given. All of ``seed`` is in them.
    """
    return int(_sequence(purpose, seed, key).generate_state(1, np.uint64)[0])


def _sequence(purpose: Purpose, seed: int, key: tuple[int, ...]) -> np.random.SeedSequence:
    if not 0 <= seed < SEED_LIMIT:
        raise UserError(f"the seed {seed} does not lie in [0, 2^64); choose another")
    words = [int(each) for each in key]
    assert all(0 <= each < _KEY_LIMIT for each in words), words
    if purpose in _SIMULATOR:
        assert not words and seed < _KEY_LIMIT, (seed, words)
        return np.random.SeedSequence([seed, *_SIMULATOR[purpose]])
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *words))
