"""Training run: from a configuration to an exported model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from embrag_ds import logs
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.errors import UserError
from embrag_ds.runtime.timeline import NO_TIMELINE
from embrag_ds.training import deepspeed_log
from embrag_ds.training.deepspeed_settings import load_training_config
from embrag_ds.training.distributed import DistributedContext, open_inputs_on_all_ranks, start_distributed
from embrag_ds.training.profile import Profile
from embrag_ds.training.trainer import Trainer


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
    for faulty files, settings and arguments.
    """
    if resume and init_from:
        raise UserError("--resume goes on from a checkpoint, --init-from starts anew: give one of them")
    settings = load_training_config(config, overrides)
    with logs.kept_for_run() as run_log, deepspeed_log.written_to(run_log):
        distributed = start_distributed()
        folder = _choose_run_dir(run_dir, Path(config).stem, resume, distributed)
        profiling = Profile(profile, folder, distributed) if profile else nullcontext(NO_TIMELINE)
        inputs = open_inputs_on_all_ranks(files, settings.embrag.data, distributed)
        with profiling as timeline:
            trainer = Trainer(settings, inputs, folder, distributed, resume, init_from, timeline)
            run_log.write_to(folder / distributed.own_file("run.log"))
            trainer.run()
        distributed.close()
    return folder


def _choose_run_dir(given: Path | None, stem: str, resume: bool, distributed: DistributedContext) -> Path:
    """The run folder given, the newest one to resume, or a new one named by the clock of rank 0."""
    if given is not None:
        run_dir = given
    elif resume:
        found = sorted(Path("runs").glob(f"{stem}-*/checkpoints/latest"))
        if not found:
            raise UserError(f"--resume: no run of {stem} with a checkpoint under runs/; name one with --run-dir")
        run_dir = found[-1].parents[1]
    else:
        run_dir = Path("runs") / distributed.agree(f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not resume and (run_dir / "metrics.jsonl").exists():
        raise UserError(f"{run_dir}: holds a run already; add --resume, or choose another --run-dir")
    return run_dir
