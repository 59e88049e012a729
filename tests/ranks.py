"""Several ranks of one run as plain processes: what the launcher starts, without the launcher's own two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a launcher tells a process its place."""


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of_rank(root: Path, rank: int, ranks: int, port: int) -> dict[str, str]:
    """Environment of one of several ranks, with one thread each."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return inherited | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | {name: str(x) for name, x in place.items()}


def ended_ranks(root: Path, ranks: int, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Run ``python`` with these arguments once for each rank, all at once; a rank that ends does not end others."""
    port = free_port()
    command = [sys.executable, *map(str, arguments)]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment_of_rank(root, rank, ranks, port),
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *texts)
        for process, texts in zip(started, said, strict=True)
    ]


def run_ranks(root: Path, ranks: int, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """:func:`ended_ranks`, of which every one must end well."""
    done = ended_ranks(root, ranks, *arguments)
    assert [each.returncode for each in done] == [0] * ranks, [each.stderr for each in done]
    return done
