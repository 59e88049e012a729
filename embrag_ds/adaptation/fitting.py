"""Optimiser steps of an adaptation, in one process and without DeepSpeed.

Loss, masks, sampler, retrieval and network are those of training. What differs: the embedding layer stays as it is, so
that its snapshot goes on encoding the panel, and every other weight is drawn back to where it began. The few numbers of
the copying model move first and by larger steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embrag_ds.config import LossConfig
from embrag_ds.model.imputer import Imputer
from embrag_ds.progress import Progress
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.seeds import Purpose, torch_seed

logger = logging.getLogger(__name__)

COPYING = ("pooling", "background")
"""Parts of the network with the few numbers of the copying model."""
FROZEN = ("embedding.",)
"""Weights that stay as they are, by the beginning of their names."""
FROZEN_AMONG_FEW = ("pooling.closeness", "pooling.reach")
"""Weights that stay, too, where most haplotypes are no neighbours.

Neighbours are chosen for being near. Among few of them less of a preference for the nearest is best than among all
haplotypes, which imputation copies (docs/log.md).
"""
_COPYING_RATE, _RESIDUAL_RATE = 0.02, 0.003
"""Learning rates: of the copying model, and of confidence head, fusion, transformer and output."""
_COPYING_FIRST = 0.1
"""Share of the steps after which the others begin to move."""
_WARM_UP_STEPS = 10
_BETAS = (0.9, 0.95)
_PULL = 0.3
"""Pull towards the start, in units of the learning rate."""
_CLIP = 1.0


class Fit:
    """The optimiser of an adaptation: AdamW (Loshchilov and Hutter 2019) whose decay goes to the weights of the start.

    Decay to the start in place of zero is L2-SP (Li et al. 2018, ICML), here decoupled from the gradient.
    """

    def __init__(self, network: Imputer, steps: int, frozen: tuple[str, ...] = FROZEN):
        self._steps = steps
        parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, weight in network.named_parameters():
            part = name.partition(".")[0]
            weight.requires_grad_(not name.startswith(frozen))
            if weight.requires_grad:
                parts[part in COPYING].append(weight)
        self._groups = [parts[True], parts[False]]
        self._starts = [[weight.detach().clone() for weight in group] for group in self._groups]
        groups = [{"params": group} for group in self._groups]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0)

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of the copying model and of the rest: a warm-up, then half a cosine."""
        done = step / self._steps
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        first = _COPYING_FIRST * self._steps
        warm, later = (min(1.0, max(0.0, (step + 1 - since) / _WARM_UP_STEPS)) for since in (0, first))
        return _COPYING_RATE * cosine * warm, _RESIDUAL_RATE * cosine * later

    def step(self, number: int, loss: Tensor) -> None:
        """Take step ``number`` down the gradient of ``loss``, and drop the gradient."""
        loss.backward()
        nn.utils.clip_grad_norm_([weight for group in self._groups for weight in group], _CLIP)
        for group, starts, rate in zip(self._optimizer.param_groups, self._starts, self.rates(number), strict=True):
            group["lr"] = rate
            with torch.no_grad():
                for weight, start in zip(group["params"], starts, strict=True):
                    weight.lerp_(start, _PULL * rate)
        self._optimizer.step()
        self._optimizer.zero_grad()


def fit(
    network: Imputer,
    batches: Prefetcher,
    steps: int,
    loss: LossConfig,
    transformer: bool,
    seed: int,
    frozen: tuple[str, ...] = FROZEN,
) -> None:
    """Take ``steps`` optimiser steps, one batch each; without ``transformer`` its residual is left out.

    Weights whose names begin as one of ``frozen`` stay as they are. Dropout follows from the ``seed`` alone.
    """
    optimiser = Fit(network, steps, frozen)
    with _training(network), Progress("adapting", steps, "steps") as progress:
        for step in range(steps):
            torch.manual_seed(torch_seed(Purpose.DROPOUT, seed, step, 0))
            losses = network(batches.next(), transformer, loss=loss)
            optimiser.step(step, losses.total)
            progress.advance()


@contextmanager
def _training(network: Imputer) -> Iterator[None]:
    """Context in which the network is in training mode, and after which torch draws the numbers it would have."""
    network.train()
    device = network.background.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        network.eval()
