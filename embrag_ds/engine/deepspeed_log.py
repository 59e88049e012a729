"""DeepSpeed's log lines: held back from its import on, and written to the run's log.

DeepSpeed's logger writes to stdout, from the moment it is imported. Importing this module redirects that logger.
:mod:`embrag_ds.training` therefore imports it before any other of its modules.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from embrag_ds.logs import RunLog

_printed = io.StringIO()
with redirect_stdout(_printed):
    from deepspeed.utils import logger

_held = RunLog()
for _handler in list(logger.handlers):
    logger.removeHandler(_handler)
logger.addHandler(_held)
for _line in _printed.getvalue().splitlines():
    logger.warning(_line)


@contextmanager
def written_to(handler: logging.Handler) -> Iterator[None]:
    """Pass DeepSpeed's records to ``handler`` inside ``with``, after those held back so far."""
    for record in _held.buffer:
        handler.handle(record)
    _held.buffer.clear()
    logger.removeHandler(_held)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.addHandler(_held)


@contextmanager
def prints_logged() -> Iterator[None]:
    """Log what is printed to stdout inside ``with``: DeepSpeed prints some of its remarks."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.info(line)
