"""Child processes that answer requests, a line of JSON each, and that may die: they are started again."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


class Died(Exception):
    """A child that ended by itself: by a signal, or with a status."""


class Hung(Exception):
    """A child that did not answer in time, and was killed."""


class Child:
    """A process ``python -m MODULE`` that runs :func:`serve`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to a request; raises :class:`Died` or :class:`Hung`."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return self._answer(seconds)
        except BrokenPipeError:
            raise self._death() from None

    def _start(self) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = f"{_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env=environment,
        )
        self._read = b""
        try:
            self._answer(120)
        except Died as death:
            raise RuntimeError(f"python -m {self._module} does not start: {death}") from None

    def _answer(self, seconds: float) -> Any:
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise Hung
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise self._death()
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _death(self) -> Died:
        assert self._process is not None
        status = self._process.wait()
        self.close()
        return Died(signal.Signals(-status).name if status < 0 else f"exit status {status}")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()
            self._process = None


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer requests on stdin until it ends. What libraries print goes nowhere."""
    out = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    if "EMBRAG_FUZZ_STDERR" not in os.environ:
        os.dup2(nowhere, 2)
    out.write(b"null\n")
    out.flush()
    for line in sys.stdin.buffer:
        out.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        out.flush()
