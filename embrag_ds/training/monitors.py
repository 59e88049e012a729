"""DeepSpeed's monitors (TensorBoard, CSV files, W&B, Comet): packages, folders, and curves that go on over a resume.

A curve holds every step once, also after a run was killed and has gone on from a checkpoint. In TensorBoard's files and
CSV files, what the run has left behind is removed, and what it keeps comes from ``metrics.jsonl``. W&B and Comet take
no step back: there every start of a run is a run of its own, unless their variables say otherwise.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import deepspeed

from embrag_ds.errors import UserError
from embrag_ds.files import write_text
from embrag_ds.runs.record import read_metrics, scalars

logger = logging.getLogger(__name__)

PACKAGES = {
    "tensorboard": ("tensorboard", "embrag_ds[tensorboard]"),
    "wandb": ("wandb", "embrag_ds[wandb]"),
    "comet": ("comet_ml", "comet_ml>=3.41"),
}
"""Section -> the package that the monitor imports, and what to install for it; CSV files need none."""
_IN_FILES = ("tensorboard", "csv_monitor")
_VALIDATION = "validation"


def require_packages(settings: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` for an enabled monitor whose package is missing; ``source`` names the settings' file."""
    for section, (package, wanted) in PACKAGES.items():
        if _enabled(settings, section) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{source}: {section}.enabled: the package {package} is not installed; pip install '{wanted}', "
                f"or set {section}.enabled to false"
            )


def placed(settings: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """DeepSpeed's settings, in which monitors without an ``output_path`` write into the run folder."""
    settings = dict(settings)
    for section in _IN_FILES:
        if _enabled(settings, section) and not settings[section].get("output_path"):
            settings[section] = {"job_name": section, **settings[section], "output_path": str(run_dir)}
    return settings


def _enabled(settings: dict[str, Any], section: str) -> bool:
    given = settings.get(section)
    return isinstance(given, dict) and given.get("enabled") is True


@contextmanager
def starts_said() -> Iterator[None]:
    """Raise the failure of a monitor that starts inside ``with`` as a one-line :class:`UserError`; others pass."""
    try:
        yield
    except Exception as fault:
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(fault.__traceback__)]
        monitors = [name for name in modules if name.startswith("deepspeed.monitor.")]
        if not monitors or monitors[-1] == "deepspeed.monitor.monitor":
            raise
        section = monitors[-1].rpartition(".")[2]
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise UserError(
            f"{section}.enabled: the monitor does not start ({reason}); mend that, or set {section}.enabled to false"
        ) from fault


class Monitors:
    """The monitors that DeepSpeed has built for an engine. Only rank 0 has any; elsewhere nothing is written.

    DeepSpeed's own curves are switched off. Their axis counts samples, and a run has one axis: steps. Their learning
    rate is among our numbers.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, is_new: bool):
        """``is_new`` says that the run begins for the first time.

        Raises :class:`UserError` if there are curves in its folders already: two runs in one cannot be told apart.
        """
        self._built = engine.monitor
        self._on = bool(self._built.enabled)
        self._built.enabled = False
        tables, board = self._built.csv_monitor, self._built.tb_monitor
        if is_new and tables is not None and any(Path(tables.log_dir).glob("*.csv")):
            raise _taken("csv_monitor", tables.log_dir)
        if is_new and board is not None and len(_event_files(board.summary_writer.log_dir)) > 1:  # one is ours
            raise _taken("tensorboard", board.summary_writer.log_dir)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Pass on the numbers of a metrics line. If a disk is full, a warning says where the curves end."""
        if not self._on:
            return
        try:
            self._built.write_events([(f"{kind}/{name}", value, step) for name, value in scalars(values)])
        except OSError as fault:
            self._on = False
            logger.warning("the monitors' curves end at step %d: cannot write them (%s)", step, fault.strerror or fault)

    def go_on(self, step: int, validated: int, metrics: Path) -> None:
        """Let curves go on after ``step``, where a checkpoint was loaded; ``validated`` is the step last validated.

        ``metrics`` is the run's ``metrics.jsonl``. Raises :class:`UserError` if a file cannot be written.
        """
        tables, board = self._built.csv_monitor, self._built.tb_monitor
        if not self._on or (tables is None and board is None):
            return
        try:
            if tables is not None:
                tables.filenames = [_cut(path, step) for path in sorted(Path(tables.log_dir).glob("*.csv"))]
            if board is not None:
                board.summary_writer = _purged_from(step, board.summary_writer)
        except OSError as fault:
            name = fault.filename or "the monitors' files"
            raise UserError(f"{name}: cannot write it ({fault.strerror}); free some space in its folder") from fault
        # A validation comes after its step's checkpoint, so it may have to be done again.
        for line in read_metrics(metrics) if metrics.exists() else []:
            if line["step"] == step and (line["kind"] != _VALIDATION or validated == step):
                again = [(f"{line['kind']}/{name}", value, step) for name, value in scalars(_numbers_of(line))]
                for monitor in (tables, board):
                    if monitor is not None:
                        monitor.write_events(again)


def _event_files(folder: str) -> list[Path]:
    return list(Path(folder).glob("events.out.tfevents.*"))


def _taken(section: str, folder: str) -> UserError:
    return UserError(
        f"{folder}: holds the curves of another run; give {section}.job_name another value, or leave out "
        f"{section}.output_path, and they are written into the run folder"
    )


def _numbers_of(line: dict[str, Any]) -> dict[str, Any]:
    """Values of a metrics line, without what :class:`~embrag_ds.runs.record.RunRecord` adds to them."""
    return {name: value for name, value in line.items() if name not in ("step", "time", "seconds", "total_seconds")}


def _cut(path: Path, step: int) -> str:
    """Remove a table's rows from ``step`` on, and a row that was cut short; returns the name that DeepSpeed keeps."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    header, *rows = list(csv.reader(io.StringIO(whole))) or [["step"]]
    kept = [row for row in rows if len(row) == 2 and row[0].isdigit() and int(row[0]) < step]
    text = io.StringIO()
    csv.writer(text).writerows([header, *kept])
    write_text(path, text.getvalue())
    return path.stem


def _purged_from(step: int, writer: Any) -> Any:
    """A writer of TensorBoard's files in the folder of ``writer``; readers forget what is there from ``step`` on."""
    from torch.utils.tensorboard import SummaryWriter

    writer.close()
    # Files are read in the order of their names, which hold the second that they were made in.
    time.sleep(1 - time.time() % 1)
    return SummaryWriter(log_dir=writer.log_dir, purge_step=step)
