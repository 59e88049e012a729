"""What is counted between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed

from embrag_ds.model.losses import Losses


@dataclass
class Interval:
    """Sums between two log lines.

    ``losses`` float32 [4] stay on the device until a line is written: total, haplotype and genotype loss of the
    micro-batches with finite losses, and the number of the others. ``first_bad`` int64 [] is the number of this rank's
    first such micro-batch, or -1. ``skipped_before`` (steps) and ``waited_before`` (seconds) are the run's totals at
    the interval's start. Times are those of ``time.monotonic``, in seconds.
    """

    losses: torch.Tensor
    first_bad: torch.Tensor
    micro_batches: int = 0
    samples: int = 0
    skipped_before: int = 0
    waited_before: float = 0.0
    bytes_moved: int = 0
    started: float = field(default_factory=time.monotonic)
    spoken: float = field(default_factory=time.monotonic)

    @staticmethod
    def begin(device: torch.device, skipped: int, waited: float) -> Interval:
        """An interval that begins now."""
        never = torch.full((), -1, dtype=torch.int64, device=device)
        return Interval(torch.zeros(4, device=device), never, skipped_before=skipped, waited_before=waited)

    def add(self, losses: Losses, number: int, samples: int, bytes_moved: int) -> None:
        """Add micro-batch ``number`` of this rank."""
        of_batch = torch.stack(losses).detach().float()
        finite = of_batch.isfinite().all()
        self.losses[:3] += torch.where(finite, of_batch, 0.0)
        self.losses[3] += ~finite
        self.first_bad = torch.where(finite | (self.first_bad >= 0), self.first_bad, number)
        self.micro_batches += 1
        self.samples += samples
        self.bytes_moved += bytes_moved

    def speed(self, accumulation: int, ranks: int, waited_seconds: float) -> dict[str, float]:
        """Numbers of a log line about time and data, summed over ``ranks``.

        Each took ``accumulation`` micro-batches a step. ``waited_seconds`` is the run's total wait for batches.
        """
        seconds = time.monotonic() - self.started
        steps = self.micro_batches // accumulation
        waited = waited_seconds - self.waited_before
        return {
            "samples_per_second": self.samples * ranks / seconds,
            "step_ms": 1000 * seconds / steps,
            "retrieval_wait_ms": 1000 * waited / steps,
            "retrieval_wait_share": waited / seconds,
            "bytes_moved": self.bytes_moved / steps,
        }

    def silent_for(self) -> float:
        """Seconds since the last line about progress."""
        return time.monotonic() - self.spoken

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside ``with`` out of the interval."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began
