"""Log lines and metrics of a run's steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed

from embrag_ds.config import EmbragConfig
from embrag_ds.data.sampler import TrainingSampler
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.progress import spoken
from embrag_ds.retrieval.reference import Reference
from embrag_ds.runs.record import RunRecord
from embrag_ds.training.finite import described
from embrag_ds.training.interval import Interval
from embrag_ds.training.monitors import Monitors
from embrag_ds.training.throughput import Throughput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeanLosses:
    """Losses of an interval, the mean over the micro-batches of all ranks that have finite ones; ``bad`` have not."""

    total: float | None
    haplotype: float | None
    genotype: float | None
    bad: int


class Report:
    """Writer of a run's log lines and metrics; what it says of an interval is over all ranks."""

    def __init__(
        self,
        record: RunRecord,
        monitors: Monitors,
        engine: deepspeed.DeepSpeedEngine,
        sampler: TrainingSampler,
        reference: Reference,
        throughput: Throughput,
        config: EmbragConfig,
        distributed: DistributedContext,
    ):
        self.throughput = throughput
        self._record = record
        self._monitors = monitors
        self._engine = engine
        self._sampler = sampler
        self._reference = reference
        self._last_step = config.train.max_steps
        self._distributed = distributed

    def reduced(self, interval: Interval) -> MeanLosses:
        """Losses of an interval over all ranks (collective); waits for the device."""
        torch.distributed.all_reduce(interval.losses)
        total, haplotype, genotype, bad = interval.losses.tolist()
        finite = interval.micro_batches * self._distributed.ranks - round(bad)
        if not finite:
            return MeanLosses(None, None, None, round(bad))
        return MeanLosses(total / finite, haplotype / finite, genotype / finite, round(bad))

    def name_bad(self, step: int, interval: Interval, bad: int) -> None:
        """Name the micro-batches whose loss was not finite, and whose steps DeepSpeed has skipped (collective)."""
        first = int(interval.first_bad)
        words = self._distributed.gather("" if first < 0 else described(self._sampler, first))
        skipped = self._engine.skipped_steps - interval.skipped_before
        logger.warning(
            f"step {step}: micro-batches whose loss was not finite: {bad}; steps skipped: {skipped}; the first: "
            f"{'; '.join(filter(None, words))}"
        )

    def log(self, step: int, interval: Interval, losses: MeanLosses, waited_seconds: float) -> None:
        """Write the line of an interval that ends after ``step`` steps.

        ``waited_seconds`` is the run's total wait for batches.
        """
        norm = self._engine.get_global_grad_norm()
        values: dict[str, Any] = {
            "loss": losses.total,
            "haplotype_loss": losses.haplotype,
            "genotype_loss": losses.genotype,
            "learning_rate": self._engine.get_lr()[0],
            "skipped_steps": self._engine.skipped_steps - interval.skipped_before,
            "gradient_norm": None if norm is None else float(norm),
            **interval.speed(self._sampler.accumulation, self._distributed.ranks, waited_seconds),
            **self._reference.age(step - 1),
        }
        values |= self.throughput.values(step, values["step_ms"])
        self.record("train", step, values)
        left = (self._last_step - step) * values["step_ms"] / 1000
        age = f"generation {values['generation']} (staleness {values['staleness']})  " if "generation" in values else ""
        loss = "not finite" if losses.total is None else f"{losses.total:.4f}"
        logger.info(
            f"step {step}/{self._last_step}  loss {loss}  {values['samples_per_second']:.0f} samples/s  "
            f"retrieval wait {100 * values['retrieval_wait_share']:.0f} %  {age}{spoken(left)} left"
        )

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a line of metrics, and pass its numbers to the monitors that DeepSpeed's settings enable."""
        self._record.write(kind, step, values)
        self._monitors.write(kind, step, values)
