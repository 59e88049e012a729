"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from types import TracebackType

from embrag_ds.logs import rank_of_process

logger = logging.getLogger(__name__)

_FIRST_S, _LONGEST_S = 2.0, 60.0
"""Seconds until the first line, and most between two; each gap is twice the one before."""


class Progress:
    """Progress of ``what``, in ``total`` parts; None where their number is not known.

    On a terminal it is a bar, which goes when the work ends. Elsewhere it is lines, at growing intervals, so that a log
    of hours stays short. Both have the time left if there is a total, and the rate if there is a ``unit``. Without a
    unit only the share of what is done is said. If not ``shown``, nothing is. Use it as a context.
    """

    def __init__(self, what: str, total: float | None, unit: str | None = None, *, shown: bool = True):
        self._what, self._total, self._unit = what, total, unit
        self._done = 0.0
        self._gap, self._said = _FIRST_S, time.monotonic()
        self._first: tuple[float, float] | None = None  # done and time; loops compile until then
        self._shown = shown and rank_of_process() == 0
        self._bar = None
        if self._shown and _on_a_terminal():
            from tqdm import tqdm  # its import is a twentieth of a second, and most commands of a pipeline need no bar

            form = _form(total, unit)
            self._bar = tqdm(
                desc=what,
                total=total,
                unit=f" {unit}",
                leave=False,
                mininterval=0.5,
                delay=_FIRST_S,
                bar_format=form,
                file=sys.stderr,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, parts: float = 1) -> None:
        """Count so many ``parts`` as done."""
        self._done += parts
        if self._bar is not None:
            self._bar.update(parts)
        elif self._shown and (self._total is None or self._done < self._total):
            now = time.monotonic()
            if self._first is None:
                self._first = self._done, now
            elif now - self._said >= self._gap and self._done > self._first[0]:
                self._said, self._gap = now, min(2 * self._gap, _LONGEST_S)
                logger.info("%s: %s", self._what, self._text((self._done - self._first[0]) / (now - self._first[1])))

    def _text(self, rate: float) -> str:
        """Words for what is done, at so many parts a second, more than 0."""
        said = []
        if self._unit is not None:
            of = "" if self._total is None else f" of {self._total:,.0f}"
            said.append(f"{self._done:,.0f}{of} {self._unit}")
        if self._total is not None:
            said.append(f"{100 * self._done / self._total:.0f} %")
        if self._unit is not None:
            said.append(f"{rate:,.{0 if rate >= 10 else 1}f} a second")
        if self._total is not None:
            said.append(f"{spoken((self._total - self._done) / rate)} left")
        return ", ".join(said)


def _on_a_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def _form(total: float | None, unit: str | None) -> str:
    """Format of tqdm's bar."""
    if total is None:
        return f"{{desc}}: {{n_fmt}} {unit or ''}, {{rate_noinv_fmt}}"
    counted = "" if unit is None else f" {{n_fmt}}/{{total_fmt}} {unit}, {{rate_noinv_fmt}},"
    return f"{{desc}}: {{percentage:3.0f}} %|{{bar:24}}|{counted} {{remaining}} left"


def spoken(seconds: float) -> str:
    """A duration in its two largest units: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = math.ceil(seconds)
    for size, name, part, smaller in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name} {rest} {smaller}" if rest else f"{whole // size} {name}"
    return f"{whole} s"
