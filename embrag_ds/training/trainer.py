"""Training loop: steps, log lines, validation, checkpoints and export."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed

from embrag_ds.adaptation.held_out import mean_r2
from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs, windowed
from embrag_ds.data.panel import skipped_records
from embrag_ds.data.sampler import QueryBatch, TrainingSampler, exclusion_table, split_samples
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE, read_export, start_from, write_export
from embrag_ds.model.attention import prefer_fastest_attention
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.losses import Losses
from embrag_ds.ops.cuda import require_kernels
from embrag_ds.ops.li_stephens import copying_backend
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.collate import receive
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline
from embrag_ds.runtime.workers import InOrder, chosen_workers, start_server
from embrag_ds.seeds import Purpose, torch_seed
from embrag_ds.training.checkpoint import TrainState, load_checkpoint, save_checkpoint, seed_step
from embrag_ds.training.distributed import (
    DistributedContext,
    adapt_to_machine,
    compute_deterministically,
    compute_type,
    initialize_engine,
)
from embrag_ds.training.masters import gathered_state, set_masters
from embrag_ds.training.run_record import RunRecord
from embrag_ds.training.validation import Validator

logger = logging.getLogger(__name__)

_LONGEST_SILENCE_S = 10.0


@dataclass
class Interval:
    """Sums between two log lines.

    ``losses`` float32 [3] (total, haplotype, genotype) stay on the device until a line is written. ``skipped_before``
    (steps) and ``waited_before`` (seconds) are the run's totals at the interval's start. Times are those of
    ``time.monotonic``, in seconds.
    """

    losses: torch.Tensor
    micro_batches: int = 0
    samples: int = 0
    skipped_before: int = 0
    waited_before: float = 0.0
    bytes_moved: int = 0
    started: float = field(default_factory=time.monotonic)
    spoken: float = field(default_factory=time.monotonic)

    def silent_for(self) -> float:
        """Seconds since the last line about progress."""
        return time.monotonic() - self.spoken

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside ``with`` out of the interval."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began


class Trainer:
    """Trainer of an :class:`Imputer` on a panel: construct it, then call :meth:`run` (both are collective)."""

    def __init__(
        self,
        config: RunConfig,
        inputs: PanelInputs,
        run_dir: Path,
        distributed: DistributedContext,
        resume: bool,
        init_from: Path | None = None,
        timeline: Timeline = NO_TIMELINE,
    ):
        """``resume`` continues from the newest checkpoint in ``run_dir``. ``init_from`` is an exported model whose
        weights training starts from. ``timeline`` measures the steps. Raises :class:`UserError` for faulty settings and
        files.
        """
        require_kernels(distributed.device)
        self.config = config
        self.embrag = config.embrag
        self.distributed = distributed
        self.run_dir = run_dir
        self.timeline = timeline
        if self.embrag.train.deterministic:
            compute_deterministically()
        workers = self.embrag.train.workers
        self.workers = chosen_workers(distributed.device) if workers is None else workers
        if self.workers:
            start_server()  # its imports take seconds, which the engine's building takes, too
        settings, notes = adapt_to_machine(config.deepspeed)
        for note in notes:
            logger.info(note)
        self.accumulation = settings.get("gradient_accumulation_steps", 1)

        samples, held_out = split_samples(
            len(inputs.panel.samples), self.embrag.data.validation_samples, self.embrag.seed
        )
        data = windowed(inputs, self.embrag.data, samples, self.embrag.masking.array_manifest)
        micro_batch = settings["train_micro_batch_size_per_gpu"]
        self.sampler = TrainingSampler(
            data,
            self.embrag.masking,
            self.embrag.seed,
            micro_batch,
            distributed.rank,
            distributed.ranks,
            self.accumulation,
            self.embrag.augmentation,
        )
        relatives = self.embrag.retrieval.relatives
        exclusions = exclusion_table(inputs.panel.samples, Path(relatives) if relatives else None)

        torch.manual_seed(torch_seed(Purpose.INITIAL_WEIGHTS, self.embrag.seed))
        model = Imputer(self.embrag.model)
        export = None if init_from is None else read_export(init_from)
        if export is not None and init_from is not None:
            start_from(model, self.embrag, export, init_from)
        _freeze(model, self.embrag.train.frozen)
        lengths = {window.core_stop - window.core_start for window in data.windows}
        self.engine = initialize_engine(
            model, settings, self.embrag.train.compile, self.embrag.train.recompute_projections, lengths
        )
        shape = self.embrag.model
        rows = 2 * micro_batch * (1 + (self.embrag.retrieval.token_k if self.embrag.retrieval.mode == "token" else 0))
        prefer_fastest_attention(
            (rows, max(lengths), shape.heads, shape.dims // shape.heads),
            compute_type(settings),
            distributed.device,
            compiled=bool(self.embrag.train.compile),
        )
        if export is not None:
            set_masters(self.engine, export.weights)
        self.reference = Reference(
            self.embrag.retrieval,
            data,
            self.engine.module.embedding,
            distributed.device,
            exclusions,
            self.sampler.steps_per_epoch,
            timeline,
            gather=deepspeed.zero.GatheredParameters,
        )
        self.validator = Validator(data, self.embrag.validation, held_out, micro_batch, distributed)
        self.record = RunRecord(run_dir, distributed)
        self.state = TrainState()
        if resume:
            self.state = load_checkpoint(run_dir / "checkpoints", self.engine, self.reference, self.embrag, distributed)
        else:
            self.reference.begin_refresh(0)
            self._choose_backend()
        # A collator serves one thread: this one prefetches, the other one validates.
        self.collate = self.reference.collator(micro_batch, slots=self.reference.prefetch + 2)
        self._validation_collate = self.reference.collator(micro_batch)

        effective = RunConfig(self.embrag, settings)
        if resume:
            self.record.forget_after(self.state.step)
        self.record.describe(
            effective,
            self.engine,
            {
                "panel": str(inputs.panel.path),
                "init_from": init_from and str(init_from),
                "search_backend": self.collate.backend,
            },
        )
        self._log_summary(inputs, len(samples), len(held_out))
        self.validator.warn_of_unscored()

    def _choose_backend(self) -> None:
        """Settle the search backend ``auto``: rank 0 times them, and all ranks take its choice (collective)."""
        if self.reference.backend == "auto":
            first = self.reference.first_search(self.sampler.queries(0))
            if first is not None:
                self.reference.backend = self.distributed.agree(first.fastest() if self.distributed.is_main else "")

    def run(self) -> None:
        """Train to ``max_steps``, or until ``patience`` validations in a row were no better.

        Raises :class:`UserError` when the loss or, but in fp16, every gradient since the last log line is not finite.
        """
        train = self.embrag.train
        batches = self.batches()
        try:
            interval = self.new_interval(batches)
            while self.state.step < train.max_steps and not self._out_of_patience():
                self.step(batches, interval)
                last = self.state.step == train.max_steps
                if self.state.step % train.log_every == 0 or last:
                    self._log(batches, interval)
                    interval = self.new_interval(batches)
                elif interval.silent_for() > _LONGEST_SILENCE_S:
                    interval.spoken = time.monotonic()
                    logger.info(f"step {self.state.step}/{train.max_steps}")
                if self.state.step % train.eval_every == 0:
                    with interval.paused(), self.timeline.paused():
                        self._validate()
                if self.state.step % train.checkpoint_every == 0 or last or self._out_of_patience():
                    with interval.paused():
                        self._save()
            self._close()
        finally:
            self.reference.close()
            batches.close()

    def batches(self) -> Prefetcher:
        """The run's remaining micro-batches, each under the generation of its step."""
        first, stop = (step * self.accumulation for step in (self.state.step, self.embrag.train.max_steps))
        drawn = InOrder(self.sampler, first, stop, self.workers)

        def build(number: int) -> Batch:
            return self.collate(drawn.take(number), number // self.accumulation)

        return Prefetcher(build, first, stop, self.reference.prefetch, finish=drawn.close)

    def step(self, batches: Prefetcher, interval: Interval) -> None:
        """Take one optimiser step of ``accumulation`` micro-batches, one window each, and add it to ``interval``.

        A refresh of the reference cache that is due is begun first.
        """
        self.reference.begin_refresh(self.state.step)
        self.engine.train()
        seed_step(self.embrag.seed, self.state.step, self.distributed.rank)
        for _ in range(self.accumulation):
            batch = batches.next()
            with self.timeline.phase("forward"):
                losses: Losses = self.engine(batch, loss=self.embrag.loss)
            with self.timeline.phase("backward"):
                self.engine.backward(losses.total)
            with self.timeline.phase("step"):
                self.engine.step()
            interval.losses += _stacked(losses)
            interval.micro_batches += 1
            interval.samples += len(batch.core.tokens) // 2
            interval.bytes_moved += batch.bytes_moved
        self.state.step += 1

    def new_interval(self, batches: Prefetcher) -> Interval:
        """An interval that begins now."""
        return Interval(
            losses=torch.zeros(3, device=self.distributed.device),
            skipped_before=self.engine.skipped_steps,
            waited_before=batches.waited_seconds,
        )

    def _log(self, batches: Prefetcher, interval: Interval) -> None:
        torch.distributed.all_reduce(interval.losses)
        total, haplotype, genotype = (interval.losses / (interval.micro_batches * self.distributed.ranks)).tolist()
        if not math.isfinite(total):
            raise UserError(f"step {self.state.step}: the loss is {total}; lower the learning rate")
        seconds = time.monotonic() - interval.started
        steps = interval.micro_batches // self.accumulation
        skipped = self.engine.skipped_steps - interval.skipped_before
        # In fp16 steps are skipped until the loss scale is low enough; DeepSpeed raises an error where it cannot be.
        if skipped == steps and not self.engine.fp16_enabled():
            raise UserError(
                f"step {self.state.step}: no gradient since the last log line was finite; lower the learning rate"
            )
        norm = self.engine.get_global_grad_norm()
        waited = batches.waited_seconds - interval.waited_before
        values: dict[str, Any] = {
            "loss": total,
            "haplotype_loss": haplotype,
            "genotype_loss": genotype,
            "learning_rate": self.engine.get_lr()[0],
            "skipped_steps": skipped,
            "gradient_norm": None if norm is None else float(norm),
            "samples_per_second": interval.samples * self.distributed.ranks / seconds,
            "step_ms": 1000 * seconds / steps,
            "retrieval_wait_ms": 1000 * waited / steps,
            "retrieval_wait_share": waited / seconds,
            "bytes_moved": interval.bytes_moved / steps,
            **self.reference.age(self.state.step - 1),
        }
        self.record.write("train", self.state.step, values, self.engine)
        left = (self.embrag.train.max_steps - self.state.step) * seconds / steps
        age = f"generation {values['generation']} (staleness {values['staleness']})  " if "generation" in values else ""
        logger.info(
            f"step {self.state.step}/{self.embrag.train.max_steps}  loss {total:.4f}  "
            f"{values['samples_per_second']:.0f} samples/s  "
            f"retrieval wait {100 * values['retrieval_wait_share']:.0f} %  {age}{_clock(left)} left"
        )

    def _validate(self) -> None:
        self.engine.eval()
        logger.info(f"validating on {self.validator}")
        scores = self.validator.scores(self.engine, self.validation_batch)
        values = {name: asdict(score) for name, score in scores.items()}
        # Of the array masks, because they are what targets have.
        score = mean_r2(each for mask, each in scores.items() if mask.startswith("array"))
        improved = score > self.state.best_score
        self.state.validations_since_best = 0 if improved else self.state.validations_since_best + 1
        if improved:
            self.state.best_score = score
            self._export()
        self.record.write("validation", self.state.step, {**values, "score": score}, self.engine)
        for name, each in scores.items():
            logger.info(
                f"  validation {name}: r2 {each.r2['all']:.4f} (below 1 % MAF {each.r2['all <1 %']:.4f}), "
                f"retrieval alone {each.prior_r2['all']:.4f} ({each.prior_r2['all <1 %']:.4f}), "
                f"accuracy {each.accuracy:.4f}, calibration error {each.calibration_error:.4f}"
            )

    def validation_batch(self, queries: QueryBatch) -> Batch:
        """Batch of ``queries`` under the generation that was last trained with."""
        return receive(self._validation_collate(queries, max(self.state.step - 1, 0)))

    def _save(self) -> None:
        keep = self.embrag.train.keep_checkpoints
        directory = self.run_dir / "checkpoints"
        save_checkpoint(directory, self.engine, self.state, self.reference, self.embrag, keep, self.distributed)

    def _close(self) -> None:
        """Log how the run ended; a run too short for a validation exports the model of its last step."""
        if self._out_of_patience():
            logger.info(f"stopped early: no better score in {self.state.validations_since_best} validations")
        which = f"of the best validation ({self.state.best_score:.4f})"
        if not math.isfinite(self.state.best_score):
            self._export()
            which = "of the last step (no validation was due)"
        logger.info(f"model {which}: {self.run_dir / MODEL_FILE}")

    def _export(self) -> None:
        weights = gathered_state(self.engine)
        snapshot = self.reference.snapshot_weights(self.state.step)
        if self.distributed.is_main:
            write_export(self.run_dir / MODEL_FILE, weights, snapshot, self.embrag)

    def _out_of_patience(self) -> bool:
        patience = self.embrag.train.patience
        return patience is not None and self.state.validations_since_best >= patience

    def _log_summary(self, inputs: PanelInputs, samples: int, held_out: int) -> None:
        parameters = sum(getattr(each, "ds_numel", each.numel()) for each in self.engine.module.parameters())
        panel, device = inputs.panel, self.distributed.device
        skipped = skipped_records(panel.skipped)
        for line in (
            f"panel {panel.path}: {len(panel.sites)} sites, {len(self.sampler.data)} windows, "
            f"{samples} samples to train on, {held_out} held out, {len(inputs.populations.names)} populations"
            + (f"; {skipped}" if skipped else ""),
            f"model: {parameters / 1e6:.2f} M parameters on {self.distributed.ranks} x {device.type}, "
            f"{self.engine.train_batch_size()} samples a step, {self.sampler.steps_per_epoch} steps an epoch",
            f"retrieval: {self.reference}, {self.collate.backend}, k {self.collate.k}; "
            f"copying model {copying_backend(device)}; "
            f"{self.reference.memory([self.collate, self._validation_collate])}",
            f"run folder: {self.run_dir}",
        ):
            logger.info(line)


def _freeze(model: Imputer, parts: tuple[str, ...]) -> None:
    known = [name for name, _ in model.named_children()]
    for part in parts:
        if part not in known:
            raise UserError(f"embrag.train.frozen: the network has no part {part!r}; it has {', '.join(known)}")
        model.get_submodule(part).requires_grad_(False)


def _stacked(losses: Losses) -> torch.Tensor:
    return torch.stack(losses).detach()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
