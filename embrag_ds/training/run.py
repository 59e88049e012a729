"""Training run: from a configuration to an exported model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from embrag_ds import logs
from embrag_ds.config import EmbragConfig, RunConfig, named_files
from embrag_ds.data.cache import require_cache
from embrag_ds.data.inputs import PanelFiles, cache_directory
from embrag_ds.engine import deepspeed_log
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import DistributedContext, collective_limit, require_device, start_distributed
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE
from embrag_ds.preflight import require_distinct, require_folder, require_readable
from embrag_ds.runs import alive
from embrag_ds.runs.checkpoints import newest_step
from embrag_ds.runs.folder import CHECKPOINTS, OUTCOME, RunLock, choose, leave_no_trace, never_saved, write_outcome
from embrag_ds.runs.meeting import Meeting, meet
from embrag_ds.runs.record import CONFIG, METRICS, RUN_LOG, VERSIONS
from embrag_ds.runs.stop import Stopped, StopSignals
from embrag_ds.runtime.imports import uncollected
from embrag_ds.runtime.timeline import NO_TIMELINE
from embrag_ds.training.finite import Attempt, Culprits, Spoilt
from embrag_ds.training.monitors import require_packages
from embrag_ds.training.panel_limits import settled_batch
from embrag_ds.training.profile import Profile
from embrag_ds.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(
    config: Path | str,
    files: PanelFiles,
    *,
    overrides: Iterable[str] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    init_from: Path | None = None,
    profile: str | None = None,
) -> Path:
    """Train a model and return the run folder (collective).

    ``config`` is a file, or the name of a shipped configuration; ``overrides`` are ``dotted.key=value``. ``run_dir``
    defaults to a new folder or, with ``resume``, to the newest run of this configuration. ``init_from`` is an exported
    model to start from. ``profile`` is one of :data:`embrag_ds.training.profile.PROFILES`. Raises :class:`UserError`
    for faulty files, settings and arguments, and :class:`~embrag_ds.runs.stop.Stopped` after a signal.
    """
    with logs.kept_for_run() as run_log, deepspeed_log.written_to(run_log), meet(collective_limit(0)) as meeting:
        require_one_start(resume, init_from)
        require_device()
        with uncollected():  # torch's optimisers import its compiler when the first one is made
            settings = load_training_config(config, overrides)
        require_packages(settings.deepspeed, str(config))
        settled_batch(settings.deepspeed, meeting.ranks)  # refused before the panel is opened
        patience_s = settings.embrag.train.patience_s
        folder = folder_of(config, files, settings.embrag, run_dir, resume, init_from, meeting)
        again = resume and meeting.on_main(lambda: never_saved(folder))
        if again:
            logger.warning(f"{folder}: this run has no checkpoint yet, so it begins again")
            resume = False
        with _held(folder, meeting), meeting.sharing(folder, patience_s):
            inputs = meeting.open_inputs(files, settings.embrag.data)
            distributed = start_distributed(patience_s)
            with Profile(profile, folder, distributed) if profile else nullcontext(NO_TIMELINE) as timeline:
                make = partial(
                    Trainer,
                    settings,
                    inputs,
                    folder,
                    distributed,
                    init_from=init_from,
                    timeline=timeline,
                    begins_again=again,
                )
                began = partial(run_log.write_to, folder / distributed.own_file(RUN_LOG))
                try:
                    train_in_attempts(make, settings, folder, distributed, resume, began)
                except Stopped:
                    distributed.close()
                    raise
            distributed.close()
    return folder


def train_in_attempts(
    make: Callable[..., Trainer],
    settings: RunConfig,
    folder: Path,
    distributed: DistributedContext,
    resume: bool,
    began: Callable[[], None] = lambda: None,
) -> None:
    """Train to the end, going back to the last whole checkpoint when the weights were spoilt (collective).

    ``make`` builds a trainer, and ``began`` is called after the first was built. Raises :class:`UserError` when too
    many micro-batches would have to be left out, and :class:`Stopped` after a signal.
    """
    attempt = Attempt()
    signals = StopSignals()
    while True:
        with alive.busy("building the network"):
            trainer = make(resume=resume, attempt=attempt, signals=signals)
        if not attempt.number:
            began()
        with signals:
            try:
                trainer.run()
                return
            except (Spoilt, Culprits) as fault:
                attempt = _next(attempt, fault, settings, distributed.ranks)
                trainer.release()
        resume = distributed.on_main(lambda: newest_step(folder / CHECKPOINTS) > 0)
        where = "the newest whole checkpoint" if resume else "the start"
        logger.warning(f"{attempt.reason}; going on from {where}")


def _next(attempt: Attempt, fault: Spoilt | Culprits, settings: RunConfig, ranks: int) -> Attempt:
    """The attempt that follows one which ended with ``fault``; raises :class:`UserError` if none should."""
    most = settings.embrag.train.most_skipped_steps
    number = attempt.number + 1
    if isinstance(fault, Spoilt):
        if number > 2 * most:
            raise UserError(f"{fault}; this came up again and again, so it is not the data: lower the learning rate")
        reason = f"{fault}: every micro-batch up to there will be looked at"
        return replace(attempt, number=number, careful_until=max(attempt.careful_until, fault.step), reason=reason)
    left_out = tuple(sorted({*attempt.left_out, *fault.numbers}))
    longest = _longest_row(left_out)
    if len(left_out) > most or longest > ranks + 1:
        raise UserError(
            f"{fault}; {len(left_out)} micro-batches of this run were not finite, {longest} of them in a row: lower "
            "the learning rate, or raise embrag.train.most_skipped_steps"
        )
    return replace(attempt, number=number, left_out=left_out, reason=f"{fault}: left out from now on")


def _longest_row(numbers: tuple[int, ...]) -> int:
    """Length of the longest row of consecutive numbers among those, which are sorted."""
    longest = row = 0
    for place, number in enumerate(numbers):
        row = row + 1 if place and number == numbers[place - 1] + 1 else 1
        longest = max(longest, row)
    return longest


@contextmanager
def _held(folder: Path, meeting: Meeting) -> Iterator[None]:
    """Keep other runs out of the folder, and say in ``outcome.json`` how this one ended (collective)."""
    locks: list[RunLock] = []
    meeting.on_main(lambda: locks.append(RunLock(folder)))
    before = newest_step(folder / CHECKPOINTS)

    def note(state: str, restart: bool, reason: str) -> None:
        if meeting.is_main:
            write_outcome(folder, state, restart, reason, newest_step(folder / CHECKPOINTS))

    def note_fault(state: str, restart: bool, reason: str) -> None:
        try:
            note(state, restart, reason)
        except UserError as another:  # the fault itself must be seen
            logger.warning(str(another))

    note("running", True, "it has not ended")
    try:
        yield
    except Stopped as stopped:
        note_fault("stopped", True, str(stopped))
        raise
    except UserError as fault:
        note_fault("failed", False, str(fault))
        if meeting.is_main:
            leave_no_trace(folder)
        raise
    except KeyboardInterrupt:
        note_fault("interrupted", True, "SIGINT")
        raise
    except BaseException as fault:
        # A node may have been lost. But a run that fails again without having got anywhere should not start for ever.
        got_on = newest_step(folder / CHECKPOINTS) > before
        note_fault("failed", got_on, f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}")
        raise
    else:
        note("finished", False, "training has ended")
    finally:
        for lock in locks:
            lock.release()


def require_one_start(resume: bool, init_from: Path | None) -> None:
    """Raise :class:`UserError` if a run is both to go on and to start anew."""
    if resume and init_from:
        raise UserError("--resume goes on from a checkpoint, --init-from starts anew: give one of them")


def folder_of(
    config: Path | str,
    files: PanelFiles,
    settings: EmbragConfig,
    run_dir: Path | None,
    resume: bool,
    init_from: Path | None,
    meeting: Meeting,
) -> Path:
    """The run folder that all ranks take, with the run's files checked (collective); raises :class:`UserError`."""
    folder = Path(meeting.on_main(lambda: str(choose(run_dir, Path(config).stem, resume))))
    _check_files(config, files, settings, folder, resume, init_from)
    return folder


def _check_files(
    config: Path | str, files: PanelFiles, settings: EmbragConfig, folder: Path, resume: bool, init_from: Path | None
) -> None:
    """Raise :class:`UserError` for inputs that cannot be read, or that the run would replace, and for its folder."""
    data = {**files.by_option(), **named_files(settings)}
    # A run may go on with the settings that it wrote.
    records = (RUN_LOG, METRICS, VERSIONS, OUTCOME, *(() if resume else (CONFIG,)))
    made = {"--run-dir": [folder / name for name in (MODEL_FILE, *records)]}
    require_distinct(made, {**data, "--deepspeed_config": Path(config), "--init-from": init_from})
    require_readable(data)
    if files.panel is not None and files.panel.is_fifo():
        raise UserError(f"{files.panel}: training reads the panel more than once, and this is a pipe; give a file")
    require_folder(folder)
    require_cache(cache_directory(settings.data))
