"""Values that are not finite: noticed without a wait, traced to a micro-batch, and kept out of what is saved.

Whether a loss was finite is counted on the device, and read with each log line (:mod:`embrag_ds.training.interval`).
Where DeepSpeed has skipped the step, nothing is lost. Where it has not, the weights are spoilt: then :class:`Spoilt`
ends the attempt, and the run goes back to its last whole checkpoint. From there to the step at which the fault was
noticed, every micro-batch is looked at, with a wait. The one at fault raises :class:`Culprits`, and a last attempt
leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embrag_ds.data.sampler import TrainingSampler
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.model.losses import Losses

_SAMPLES_NAMED = 8


@dataclass(frozen=True)
class Attempt:
    """What earlier attempts of a run in this process have found: its ``number`` from 0, micro-batches to leave out, the
    step until which every micro-batch is looked at, and why it became necessary.
    """

    number: int = 0
    left_out: tuple[int, ...] = ()
    careful_until: int = 0
    reason: str = ""


@dataclass
class Spoilt(Exception):
    """The weights have values that are not finite, as was noticed after ``step`` steps, in what ``what`` says."""

    step: int
    what: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.what}"


@dataclass
class Culprits(Exception):
    """Micro-batches whose loss or gradients are not finite: their numbers over all ranks, and words for each."""

    step: int
    numbers: list[int]
    words: list[str]

    def __str__(self) -> str:
        return f"step {self.step + 1}: the loss or a gradient is not finite for {'; '.join(self.words)}"


class GradientWatch:
    """Hooks on a network's parameters that note on the device whether any gradient is not finite.

    Gradients are seen as the backward pass makes them, before they are added up over micro-batches and ranks.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._handles = [parameter.register_hook(self._look) for parameter in trained]

    def _look(self, gradient: Tensor) -> None:
        self._bad |= ~gradient.isfinite().all()

    def take(self, losses: Losses) -> bool:
        """Whether the micro-batch whose backward pass has just run was at fault; waits for the device."""
        bad = bool(self._bad | ~torch.stack(losses).isfinite().all())
        self._bad.zero_()
        return bad

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def described(sampler: TrainingSampler, micro_batch: int) -> str:
    """A micro-batch of this rank in words: window with its place on the genome, samples, rank."""
    queries = sampler.queries(micro_batch)
    place = sampler.data.windows[queries.window]
    panel = sampler.data.reference.panel
    first, last = (panel.sites.where(row) for row in (place.core_start, place.core_stop - 1))
    names = [panel.samples[sample] for sample in queries.samples.tolist()]
    more = f" and {len(names) - _SAMPLES_NAMED} more" if len(names) > _SAMPLES_NAMED else ""
    samples = ", ".join(names[:_SAMPLES_NAMED]) + more
    return f"window {queries.window} ({first} to {last}), samples {samples}, rank {sampler.rank}"


def raise_culprits(
    step: int, micro_batch: int, bad: bool, sampler: TrainingSampler, distributed: DistributedContext
) -> None:
    """Raise :class:`Culprits` on every rank if this rank's ``micro_batch``, or another's, was ``bad`` (collective)."""
    own = (sampler.number(micro_batch), described(sampler, micro_batch)) if bad else None
    found = [each for each in distributed.gather(own) if each is not None]
    if found:
        raise Culprits(step, [number for number, _ in found], [words for _, words in found])
