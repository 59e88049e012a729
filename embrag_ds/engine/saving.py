"""Writing of checkpoints: all of one appears under its name, or nothing does, whatever happens to a rank meanwhile.

The ranks write into a folder under a temporary name, and each checks and hashes what it has written. Rank 0 then adds
the manifest, renames the folder, and has ``latest`` name it. A process that is killed on the way leaves a folder under
a temporary name, which the next save removes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.engine.masters import parameters_of
from embrag_ds.errors import UserError
from embrag_ds.files import flush, make_folder, write_text
from embrag_ds.preflight import require_space
from embrag_ds.runs.checkpoints import LATEST, TEMPORARY, newest_first, size_of, write_manifest
from embrag_ds.seals import Seal, sealed_file

logger = logging.getLogger(__name__)

_LEAST_BYTES, _LIKELY_BYTES = 4, 16
"""Of a first checkpoint for each parameter: the weights alone; weights, masters and two moments in fp32."""


class NotFinite(Exception):
    """Weights or optimiser states have values that are not finite; nothing was saved. Raised on all ranks."""


class Recorder(TorchCheckpointEngine):
    """Writer of checkpoint files for DeepSpeed's engine, which notes what it wrote and what went wrong.

    It never raises: DeepSpeed's ranks meet in barriers while they save, and one that raised would leave the others
    waiting. ``seal`` has the files written since :meth:`begin`. ``fault`` is the first reason why one could not be
    written, and ``not_finite`` the first tensor that must not be.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.begin(Path())

    def begin(self, folder: Path) -> None:
        """Forget what was noted; files are written into ``folder`` from now on."""
        self._folder = folder
        self.seal: Seal = {}
        self.fault: str | None = None
        self.not_finite: str | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file and have it on the disk, unless something has gone wrong already."""
        self.not_finite = self.not_finite or first_not_finite(state_dict)
        if self.not_finite is None:
            self.attempt(partial(self._write, state_dict, Path(path)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(partial(os.makedirs, path, exist_ok=exist_ok))

    def attempt(self, work: Callable[[], object]) -> None:
        """Do ``work`` unless something has gone wrong already, and note it if this does."""
        if self.fault is not None:
            return
        try:
            work()
        except (OSError, RuntimeError) as fault:
            # torch wraps what the file raised, or says something of its zip writer in many lines.
            cause = fault.__cause__ or fault.__context__ or fault
            reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:200]
            self.fault = reason or type(cause).__name__

    def _write(self, state: dict[str, Any], path: Path) -> None:
        with path.open("wb") as stream:
            torch.save(state, stream, _use_new_zipfile_serialization=self.zipfile_serialization)
        flush(path)
        self.seal[path.relative_to(self._folder).as_posix()] = sealed_file(path)


def record_saves(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let ``engine`` write its checkpoints through a :class:`Recorder`."""
    recorder = Recorder(engine._config)
    engine.checkpoint_engine = recorder
    copy_script = engine._copy_recovery_script
    engine._copy_recovery_script = lambda folder: recorder.attempt(partial(copy_script, folder))


def first_not_finite(value: Any, name: str = "") -> str | None:
    """Name of the first tensor in a tree of dicts and lists that has values which are not finite; None if all are."""
    if isinstance(value, Tensor):
        faulty = value.is_floating_point() and not bool(value.isfinite().all())
        return name if faulty else None
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    else:
        items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (first_not_finite(each, f"{name}.{key}" if name else str(key)) for key, each in items)
    return next((each for each in found if each is not None), None)


def save_sealed(
    directory: Path,
    step: int,
    engine: deepspeed.DeepSpeedEngine,
    client: dict[str, Any],
    facts: dict[str, Any],
    keep: int,
    distributed: DistributedContext,
) -> None:
    """Save ``directory/step<N>`` with the client state ``client`` and, in its manifest, ``facts`` (collective).

    All but the newest ``keep`` whole checkpoints are removed afterwards. Raises :class:`NotFinite`, and
    :class:`UserError` where there is no room; the checkpoints before stay in both cases.
    """
    temporary = directory / f"{TEMPORARY}step{step}"
    distributed.on_main(partial(_make_room, directory, temporary, step, parameters_of(engine)))
    recorder: Recorder = engine.checkpoint_engine
    recorder.begin(temporary)
    engine.save_checkpoint(str(directory), tag=temporary.name, client_state=client, save_latest=False)
    told = distributed.gather((recorder.seal, recorder.fault, recorder.not_finite))
    seal: Seal = {}
    for of_rank, _, _ in told:
        seal |= of_rank
    faults = [(rank, fault) for rank, (_, fault, _) in enumerate(told) if fault is not None]
    not_finite = [(rank, name) for rank, (_, _, name) in enumerate(told) if name is not None]
    if faults or not_finite:
        distributed.on_main(partial(shutil.rmtree, temporary, ignore_errors=True))
    if not_finite:
        rank, name = not_finite[0]
        raise NotFinite(f"{name} on rank {rank}")
    if faults:
        rank, reason = faults[0]
        distributed.on_main(partial(_refuse, directory, step, rank, reason))
    distributed.on_main(partial(_finish, directory, temporary, step, {**facts, "files": seal}, keep))


def _make_room(directory: Path, temporary: Path, step: int, parameters: int) -> None:
    make_folder(directory)
    for leftover in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    before = newest_first(directory)
    size = size_of(before[0]) if before else 0
    require_space(directory / f"step{step}", size or _LEAST_BYTES * parameters, size or _LIKELY_BYTES * parameters)
    make_folder(temporary)


def _refuse(directory: Path, step: int, rank: int, reason: str) -> None:
    before = newest_first(directory)
    newest = f"the newest checkpoint is {before[0].name}" if before else "there is no checkpoint yet"
    raise UserError(
        f"{directory / f'step{step}'}: rank {rank} cannot write it ({reason}); {newest}; free some space in "
        f"{directory} and go on with --resume"
    )


def _finish(directory: Path, temporary: Path, step: int, facts: dict[str, Any], keep: int) -> None:
    """Give a checkpoint, whose files are all written, its manifest and its name, and remove old ones."""
    for name, entry in facts["files"].items():
        found = (temporary / name).stat().st_size if (temporary / name).exists() else None
        if found != entry["bytes"]:
            raise UserError(
                f"{temporary / name}: another rank wrote it, and rank 0 does not see it; give a --run-dir that all "
                "machines share"
            )
    target = directory / f"step{step}"
    try:
        write_manifest(temporary, {"step": step, **facts})
        flush(temporary)
        if target.exists():  # a run that has gone back writes its steps again
            target.rename(directory / f"{TEMPORARY}old-{target.name}")
        temporary.rename(target)
        flush(directory)
    except OSError as fault:
        raise UserError(f"{target}: cannot write it ({fault.strerror}); free some space in {directory}") from fault
    write_text(directory / LATEST, target.name)
    for old in (*newest_first(directory)[keep:], *directory.glob(f"{TEMPORARY}*")):
        shutil.rmtree(old, ignore_errors=True)
