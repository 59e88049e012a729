"""Training run: from a configuration to an exported model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from embrag_ds import logs
from embrag_ds.config import EmbragConfig
from embrag_ds.data.cache import require_cache
from embrag_ds.data.inputs import PanelFiles, cache_directory
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE
from embrag_ds.preflight import require_distinct, require_folder, require_readable
from embrag_ds.runtime.timeline import NO_TIMELINE
from embrag_ds.training import deepspeed_log
from embrag_ds.training.deepspeed_settings import load_training_config
from embrag_ds.training.distributed import DistributedContext, open_inputs_on_all_ranks, start_distributed
from embrag_ds.training.profile import Profile
from embrag_ds.training.run_record import CONFIG, METRICS, VERSIONS
from embrag_ds.training.trainer import Trainer

RUN_LOG = "run.log"
"""Name of a run's log in its folder; other ranks than 0 add theirs."""


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
        _check_files(config, files, settings.embrag, folder, resume, init_from)
        profiling = Profile(profile, folder, distributed) if profile else nullcontext(NO_TIMELINE)
        inputs = open_inputs_on_all_ranks(files, settings.embrag.data, distributed)
        with profiling as timeline:
            trainer = Trainer(settings, inputs, folder, distributed, resume, init_from, timeline)
            run_log.write_to(folder / distributed.own_file(RUN_LOG))
            trainer.run()
        distributed.close()
    return folder


def _check_files(
    config: Path | str, files: PanelFiles, settings: EmbragConfig, folder: Path, resume: bool, init_from: Path | None
) -> None:
    """Raise :class:`UserError` for inputs that cannot be read, or that the run would replace, and for its folder."""
    named = {
        "embrag.data.windows_file": settings.data.windows_file,
        "embrag.masking.array_manifest": settings.masking.array_manifest,
        "embrag.retrieval.relatives": settings.retrieval.relatives,
    }
    data = {**files.by_option(), **{key: Path(path) for key, path in named.items() if path is not None}}
    # A run may go on with the settings that it wrote.
    records = (RUN_LOG, METRICS, VERSIONS, *(() if resume else (CONFIG,)))
    made = {"--run-dir": [folder / name for name in (MODEL_FILE, *records)]}
    require_distinct(made, {**data, "--deepspeed_config": Path(config), "--init-from": init_from})
    require_readable(data)
    if files.panel is not None and files.panel.is_fifo():
        raise UserError(f"{files.panel}: training reads the panel more than once, and this is a pipe; give a file")
    require_folder(folder)
    require_cache(cache_directory(settings.data))


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
    if not resume and (run_dir / METRICS).exists():
        raise UserError(f"{run_dir}: holds a run already; add --resume, or choose another --run-dir")
    return run_dir
