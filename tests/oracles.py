"""Slow, obvious versions of what the package computes, for several test files."""

from __future__ import annotations

import numpy as np


def slow_posterior(emission: np.ndarray, recombination: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Forward-backward [T, K] float64 of one haplotype, with the whole transition matrix written out.

    ``prior`` [T, K] is that of each site, or [K] that of all.
    """
    sites, states = emission.shape
    prior = np.broadcast_to(prior, emission.shape)

    def transition(site: int, source: int, to: int) -> float:
        return (1 - recombination[site]) * (source == to) + recombination[site] * prior[site, to]

    forward = np.zeros((sites, states))
    backward = np.ones((sites, states))
    for state in range(states):
        forward[0, state] = emission[0, state] * prior[0, state]
    for site in range(1, sites):
        for to in range(states):
            arriving = sum(forward[site - 1, source] * transition(site, source, to) for source in range(states))
            forward[site, to] = arriving * emission[site, to]
        forward[site] /= forward[site].sum()
    for site in range(sites - 2, -1, -1):
        for source in range(states):
            backward[site, source] = sum(
                transition(site + 1, source, to) * emission[site + 1, to] * backward[site + 1, to]
                for to in range(states)
            )
        backward[site] /= backward[site].sum()
    both = forward * backward
    return both / both.sum(1, keepdims=True)
