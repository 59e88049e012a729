"""``embrag`` in a process of its own, as its console script starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import LAUNCHER

Embrag = Callable[..., subprocess.CompletedProcess[str]]

ENTRY = "from embrag_ds.cli.main import main; main()"
HIDING = """
import sys

class Hiding:
    # Finds what another finder finds, but for some packages: to all who ask, these are not installed.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


@pytest.fixture(scope="session")
def embrag(root: Path, cache_dir: Path) -> Embrag:
    """Run ``embrag`` with these arguments; packages named by ``without`` are not to be found, and ``code`` replaces
    the console script's."""

    def run(
        *arguments: object, without: tuple[str, ...] = (), code: str = ENTRY, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache_dir)}
        script = HIDING.format(hidden=without) + code if without else code
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=environment,
            timeout=180,
        )

    return run
