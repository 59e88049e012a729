"""Training runs in processes of their own, for the benchmarks that compare finished runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine import free_port

from embrag_ds.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a run's panel, and ``--set``."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all runs; repeatable")
    parser.add_argument("--panel", type=Path, help="default: the embedded one")
    parser.add_argument("--map", type=Path)
    parser.add_argument("--samples", type=Path)


def trained(
    config: Path, run_dir: Path, settings: Mapping[str, Any], options: argparse.Namespace, ranks: int = 1
) -> list[dict[str, Any]]:
    """Train by ``launch/train.py``, a process for each rank, and return the lines of ``metrics.jsonl``.

    ``settings`` override those of ``config`` and of ``options``, which are those of :func:`add_inputs`. What the runs
    print goes to stderr. Raises :class:`UserError` if a rank fails; the other ranks are then ended.
    """
    command = [sys.executable, ROOT / "launch" / "train.py", "--deepspeed_config", config, "--run-dir", run_dir]
    for name in ("panel", "map", "samples"):
        given = getattr(options, name)
        command += [f"--{name}", given] if given else []
    for override in (*options.set, *(f"{key}={_as_text(value)}" for key, value in settings.items())):
        command += ["--set", override]
    words = list(map(str, command))
    places = _places(ranks) if ranks > 1 else [{}]
    processes = [subprocess.Popen(words, stdout=sys.stderr, env={**os.environ, **place}) for place in places]
    try:
        # Rank 0 ends first where it fails by itself; another's failure ends it, too, or leaves it waiting.
        waiting = list(processes)
        while waiting:
            for process in list(waiting):
                try:
                    code = process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                waiting.remove(process)
                if code:
                    raise UserError(f"{config}: the run in {run_dir} failed, see above")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _places(ranks: int) -> list[dict[str, str]]:
    """Environment variables by which the processes of a run on this machine find one another."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
