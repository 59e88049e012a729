"""Python processes that are started to do a part of the work with this package."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from typing import Any

_COMMAND = "from {module} import serve; serve()"


def started(module: str, request: object = None, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python process that calls ``serve`` of a module of ours; :func:`request_of_this_process` is ``request``.

    It imports from where this process does. ``options`` are those of :class:`subprocess.Popen`, which raises OSError.
    """
    found = os.pathsep.join(each or os.getcwd() for each in sys.path)
    argument = base64.b64encode(pickle.dumps(request)).decode()
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND.format(module=module), argument],
        env={**os.environ, "PYTHONPATH": found},
        **{"stdin": subprocess.DEVNULL, **options},
    )


def request_of_this_process() -> Any:
    """What the process that called :func:`started` asks of this one."""
    return pickle.loads(base64.b64decode(sys.argv[1]))
