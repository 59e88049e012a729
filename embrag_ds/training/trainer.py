"""Training loop: steps, log lines, validation, checkpoints and export."""

from __future__ import annotations

import gc
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed

from embrag_ds.adaptation.held_out import mean_r2
from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs, windowed
from embrag_ds.data.sampler import QueryBatch, TrainingSampler, exclusion_table, split_samples
from embrag_ds.engine.agreement import Agreement
from embrag_ds.engine.distributed import DistributedContext, adapt_to_machine, compute_deterministically, compute_type
from embrag_ds.engine.masters import gathered_state
from embrag_ds.engine.saving import NotFinite, first_not_finite
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE, ExportedModel, write_export
from embrag_ds.model.losses import Losses
from embrag_ds.ops.cuda import require_kernels
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.collate import receive
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.runs import alive
from embrag_ds.runs.folder import CHECKPOINTS
from embrag_ds.runs.identity import identity_of
from embrag_ds.runs.record import METRICS, RunRecord
from embrag_ds.runs.stop import LAUNCHER_PATIENCE_S, Stopped, StopSignals
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline
from embrag_ds.runtime.workers import InOrder, chosen_workers, start_server
from embrag_ds.training.checkpoint import Checkpoints, TrainState, seed_step
from embrag_ds.training.finite import Attempt, GradientWatch, Spoilt, raise_culprits
from embrag_ds.training.interval import Interval
from embrag_ds.training.monitors import Monitors, placed
from embrag_ds.training.network import network_in_engine
from embrag_ds.training.panel_limits import fit_micro_batch, settled_batch, warn_of_fewer_neighbours
from embrag_ds.training.report import Report
from embrag_ds.training.summary import summary
from embrag_ds.training.throughput import Throughput
from embrag_ds.training.validation import Validator, described_scores

logger = logging.getLogger(__name__)

_LONGEST_SILENCE_S = 10.0
_FIRST_ATTEMPT = Attempt()


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
        attempt: Attempt = _FIRST_ATTEMPT,
        signals: StopSignals | None = None,
        begins_again: bool = False,
    ):
        """``resume`` continues from the newest whole checkpoint in ``run_dir``. ``init_from`` is an exported model
        whose weights training starts from. ``timeline`` measures the steps. ``attempt`` says what earlier attempts have
        found out about values that are not finite. ``signals`` notes requests to stop. ``begins_again`` says that the
        run was begun before, in another process, and has no checkpoint. Raises :class:`UserError` for faulty settings
        and files.
        """
        require_kernels(distributed.device)
        self.embrag = config.embrag
        self.distributed = distributed
        self.run_dir = run_dir
        self.timeline = timeline
        self.signals = signals or StopSignals()
        self.signals.expectation = self._expectation
        if self.embrag.train.deterministic:
            compute_deterministically()
        workers = self.embrag.train.workers
        self.workers = chosen_workers(distributed.device) if workers is None else workers
        if self.workers:
            start_server()  # its imports take seconds, which the engine's building takes, too
        samples, held_out = split_samples(
            len(inputs.panel.samples), self.embrag.data.validation_samples, self.embrag.seed
        )
        settings = _in_force(config.deepspeed, len(samples), distributed)
        self.accumulation = settings.get("gradient_accumulation_steps", 1)
        data = windowed(inputs, self.embrag.data, samples, self.embrag.masking.array_manifest)
        relatives = self.embrag.retrieval.relatives
        exclusions = exclusion_table(inputs.panel.samples, Path(relatives) if relatives else None)
        self.effective = RunConfig(self.embrag, settings)
        self.checkpoints = Checkpoints(
            run_dir / CHECKPOINTS,
            self.effective,
            distributed.on_main(lambda: identity_of(inputs, data, exclusions)),
            distributed,
        )
        found = self.checkpoints.find() if resume else None
        self.state = TrainState() if found is None else found.state
        self.state.left_out = tuple(sorted({*self.state.left_out, *attempt.left_out}))
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
            self.state.left_out,
        )
        lengths = {window.core_stop - window.core_start for window in data.windows}
        shown = placed(settings, run_dir)
        self.engine = network_in_engine(self.embrag, shown, lengths, init_from, distributed.device)
        monitors = Monitors(self.engine, is_new=found is None and not attempt.number and not begins_again)
        throughput = Throughput(self.embrag, self.sampler, distributed.device, compute_type(settings))
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
        record = RunRecord(run_dir, distributed.is_main)
        self.report = Report(
            record, monitors, self.engine, self.sampler, self.reference, throughput, self.embrag, distributed
        )
        if found is not None:
            self.reference.backend = found.backend
            self.checkpoints.load(found, self.engine, self.reference)
            logger.info(f"going on from step {self.state.step} of {self.embrag.train.max_steps}")
        else:
            self.reference.begin_refresh(0)
            self._choose_backend()
        if (run_dir / METRICS).exists():
            record.resume_at(self.state.step, {} if found is None else found.changes)
            monitors.go_on(self.state.step, self.state.validated, run_dir / METRICS)
        # A collator serves one thread: this one prefetches, the other one validates.
        self.collate = self.reference.collator(micro_batch, slots=self.reference.prefetch + 2)
        self._validation_collate = self.reference.collator(micro_batch)
        warn_of_fewer_neighbours(self.embrag, self.collate.k, distributed.is_main)
        self._agreement = Agreement(distributed)
        self._saved_at = time.monotonic()
        self._step_seconds = 0.0
        self._careful_until = attempt.careful_until
        self._watch = (
            GradientWatch(self.engine.module, distributed.device) if self.state.step < self._careful_until else None
        )
        record.describe(
            self.effective,
            {
                "ranks": distributed.ranks,
                "micro_batch_samples": self.engine.train_micro_batch_size_per_gpu(),
                "global_batch_samples": self.engine.train_batch_size(),
                "panel": str(inputs.panel.path),
                "init_from": init_from and str(init_from),
                "search_backend": self.collate.backend,
                "matrix_rate": throughput.matrix_rate,
            },
            distributed.device,
        )
        for line in summary(
            inputs, self.sampler, self.engine, self.reference, [self.collate, self._validation_collate], distributed
        ):
            logger.info(line)
        logger.info(f"run folder: {run_dir}")
        self.validator.warn_of_unscored()

    def _choose_backend(self) -> None:
        """Settle the search backend ``auto``: rank 0 times them, and all ranks take its choice (collective)."""
        if self.reference.backend == "auto":
            first = self.reference.first_search(self.sampler.queries(0))
            if first is not None:
                self.reference.backend = self.distributed.agree(first.fastest() if self.distributed.is_main else "")

    def run(self) -> None:
        """Train to ``max_steps``, or until ``patience`` validations in a row were no better.

        A checkpoint comes before a validation that is due at the same step, and a resumed run makes up for the
        validation. Raises :class:`Stopped` after a signal and its checkpoint, and :class:`Spoilt` or
        :class:`~embrag_ds.training.finite.Culprits` for values that are not finite. Raises :class:`UserError` when too
        many steps in a row were skipped, and when a checkpoint cannot be written.
        """
        train = self.embrag.train
        batches = self.batches()
        try:
            self._validate_if_due()
            interval = self.new_interval(batches)
            while self.state.step < train.max_steps and not self._out_of_patience():
                self.step(batches, interval)
                last = self.state.step == train.max_steps
                if self.state.step % train.log_every == 0 or last:
                    self._log(batches.waited_seconds, interval)
                    interval = self.new_interval(batches)
                elif interval.silent_for() > _LONGEST_SILENCE_S:
                    interval.spoken = time.monotonic()
                    logger.info(f"step {self.state.step}/{train.max_steps}")
                stop, overdue = self._agreed()
                with interval.paused():
                    if last or stop or overdue or train.saves_at(self.state.step):
                        self._save()
                    if stop:
                        self._agreement.close()
                        raise Stopped(stop)
                    with self.timeline.paused():
                        self._validate_if_due()
            self._close()
        finally:
            self.reference.close()
            batches.close()

    def release(self) -> None:
        """Give back the engine's memory; the trainer is of no use afterwards."""
        if self._watch is not None:
            self._watch.close()
        self._agreement.close()
        self.engine.destroy()
        self.signals.expectation = lambda: ""
        del self.engine, self.reference, self.collate, self._validation_collate, self.report, self.validator
        gc.collect()
        if self.distributed.device.type == "cuda":
            torch.cuda.empty_cache()

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
        began = time.monotonic()
        self.reference.begin_refresh(self.state.step)
        self.engine.train()
        seed_step(self.embrag.seed, self.state.step, self.distributed.rank)
        skipped = self.engine.skipped_steps
        for place in range(self.accumulation):
            number = self.state.step * self.accumulation + place
            batch = batches.next()
            with self.timeline.phase("forward"):
                losses: Losses = self.engine(batch, loss=self.embrag.loss)
            with self.timeline.phase("backward"):
                self.engine.backward(losses.total)
            if self._watch is not None:
                bad = self._watch.take(losses)
                raise_culprits(self.state.step, number, bad, self.sampler, self.distributed)
            with self.timeline.phase("step"):
                self.engine.step()
            interval.add(losses, number, len(batch.core.tokens) // 2, batch.bytes_moved)
            self.report.throughput.add(batch.core.tokens)
        self.state.step += 1
        self._count_skipped(self.engine.skipped_steps > skipped)
        if self._watch is not None and self.state.step >= self._careful_until:
            self._watch.close()
            self._watch = None
        self._step_seconds = time.monotonic() - began
        alive.beat(self.state.step)

    def new_interval(self, batches: Prefetcher) -> Interval:
        """An interval that begins now."""
        return Interval.begin(self.distributed.device, self.engine.skipped_steps, batches.waited_seconds)

    def _count_skipped(self, skipped: bool) -> None:
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if skipped else 0
        most = self.embrag.train.most_skipped_steps
        # In fp16 steps are skipped until the loss scale is low enough; DeepSpeed raises an error where it cannot be.
        if self.state.skipped_in_a_row > most and not self.engine.fp16_enabled():
            raise UserError(
                f"step {self.state.step}: no gradient was finite for {self.state.skipped_in_a_row} steps, which were "
                f"skipped, and embrag.train.most_skipped_steps is {most}; lower the learning rate"
            )

    def _agreed(self) -> tuple[int, bool]:
        """Signal to stop for, or 0, and whether a checkpoint is overdue: the same on all ranks (collective)."""
        minutes = self.embrag.train.minutes_between_checkpoints
        due = minutes is not None and self.distributed.is_main and time.monotonic() - self._saved_at > 60 * minutes
        stop, overdue = self._agreement.exchange([self.signals.received, int(due)])
        return stop, bool(overdue)

    def _expectation(self) -> str:
        """Words about a checkpoint that may come too late for DeepSpeed's launcher."""
        needed = self._step_seconds * (1 if self.distributed.ranks == 1 else 2)
        if needed < LAUNCHER_PATIENCE_S - 5:
            return ""
        newest = f"step {self.checkpoints.saved}" if self.checkpoints.saved is not None else "none"
        return (
            f" (in up to {needed:.0f} s, and DeepSpeed's launcher kills {LAUNCHER_PATIENCE_S:.0f} s after its own "
            f"signal; the newest checkpoint so far: {newest})"
        )

    def _log(self, waited_seconds: float, interval: Interval) -> None:
        losses = self.report.reduced(interval)
        if losses.bad:
            self._require_finite(f"the loss of {losses.bad} micro-batches is not finite")
            self.report.name_bad(self.state.step, interval, losses.bad)
        self.report.log(self.state.step, interval, losses, waited_seconds)

    def _require_finite(self, otherwise: str) -> None:
        """Raise :class:`Spoilt` on all ranks, with the text ``otherwise``, if a weight is not finite (collective)."""
        weights = {name: getattr(each, "ds_tensor", each) for name, each in self.engine.module.named_parameters()}
        if any(self.distributed.gather(first_not_finite(weights) is not None)):
            raise Spoilt(self.state.step, otherwise)

    @alive.busy("validation")
    def _validate_if_due(self) -> None:
        step = self.state.step
        if step == 0 or step % self.embrag.train.eval_every or self.state.validated == step:
            return
        self._require_finite("a weight is not finite")
        self.engine.eval()
        logger.info(f"validating on {self.validator}")
        scores = self.validator.scores(self.engine, self.validation_batch, lambda: self._agreed()[0])
        if isinstance(scores, int):
            if self.checkpoints.saved != step:
                self._save()
            self._agreement.close()
            raise Stopped(scores)
        values = {name: asdict(score) for name, score in scores.items()}
        # Of the array masks, because they are what targets have.
        score = mean_r2(each for mask, each in scores.items() if mask.startswith("array"))
        improved = score > self.state.best_score
        self.state.validated = step
        self.state.validations_since_best = 0 if improved else self.state.validations_since_best + 1
        if improved:
            self.state.best_score = score
            self._export()
        self.report.record("validation", step, {**values, "score": score})
        for name, each in scores.items():
            logger.info(f"  validation {name}: {described_scores(each)}")
        if self._out_of_patience() and self.checkpoints.saved != step:
            self._save()

    def validation_batch(self, queries: QueryBatch) -> Batch:
        """Batch of ``queries`` under the generation that was last trained with."""
        return receive(self._validation_collate(queries, max(self.state.step - 1, 0)))

    @alive.busy("saving a checkpoint")
    def _save(self) -> None:
        try:
            self.checkpoints.save(self.engine, self.state, self.reference)
        except NotFinite as fault:
            raise Spoilt(self.state.step, f"{fault} has values that are not finite, so nothing was saved") from fault
        self._saved_at = time.monotonic()

    def _close(self) -> None:
        """Log how the run ended; a run too short for a validation exports the model of its last step."""
        self._agreement.close()
        if self._out_of_patience():
            logger.info(f"stopped early: no better score in {self.state.validations_since_best} validations")
        which = f"of the best validation ({self.state.best_score:.4f})"
        if not math.isfinite(self.state.best_score):
            self._require_finite("a weight is not finite")
            self._export()
            which = "of the last step (no validation was due)"
        logger.info(f"model {which}: {self.run_dir / MODEL_FILE}")

    @alive.busy("exporting the model")
    def _export(self) -> None:
        weights = gathered_state(self.engine)
        snapshot = self.reference.snapshot_weights(self.state.step)
        if self.distributed.is_main:
            write_export(self.run_dir / MODEL_FILE, ExportedModel.of(self.embrag, weights, snapshot))

    def _out_of_patience(self) -> bool:
        patience = self.embrag.train.patience
        return patience is not None and self.state.validations_since_best >= patience


def _in_force(settings: dict[str, Any], samples: int, distributed: DistributedContext) -> dict[str, Any]:
    """DeepSpeed's settings as this machine runs them on ``samples`` training samples; changes are logged."""
    settings, notes = adapt_to_machine(settings)
    for note in notes:
        logger.info(note)
    settings = settled_batch(settings, distributed.ranks)
    return fit_micro_batch(settings, samples, distributed.ranks, distributed.is_main)
