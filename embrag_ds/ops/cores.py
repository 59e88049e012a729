"""Number of threads, or of processes in their place, that this process may use."""

from __future__ import annotations

import os


def told_or_available() -> int:
    """What ``OMP_NUM_THREADS`` says, which ``--threads`` sets; else the number of cores that this process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))
