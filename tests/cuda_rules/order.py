"""Happens-before order of streams and the host, and the memory that they use."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from functools import cache

HOST = -1
"""Number of the host among the streams."""


class RuleBroken(RuntimeError):
    """A breach of CUDA's rules."""


@dataclass(frozen=True)
class Use:
    """One use of the bytes ``start`` to ``stop`` of a memory, the ``number``-th operation of its stream."""

    stream: int
    number: int
    writes: bool
    what: str
    start: int
    stop: int


@dataclass(eq=False)
class Memory:
    """Device memory, which returns to the stream ``home`` when it is freed, or pinned host memory (``home`` is HOST).

    ``registered`` is pinned memory that was registered. That of torch's host allocator is kept by it until copies have
    finished.
    """

    order: Order
    name: str
    start: int
    stop: int
    home: int
    registered: bool = False
    uses: list[Use] = field(default_factory=list)
    told: set[int] = field(default_factory=set)

    def __del__(self) -> None:
        if self.home != HOST:
            self.order.freed(self)


Span = tuple[Memory, int, int]
"""Bytes of a memory."""


class Order:
    """Vector clocks of the streams and of the host, by which two uses of a memory are ordered or not."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.breaches: list[str] = []
        self.names: dict[int, str] = {}
        self._known: dict[int, dict[int, int]] = {}
        self.host: dict[int, int] = {}
        self.device: dict[int, int] = {}
        self.held_bytes = self.peak_bytes = 0

    def add_stream(self, stream: int, name: str) -> None:
        """Add a stream, on which everything that the host knows to be finished lies in the past."""
        with self.lock:
            self.names[stream] = name
            self._known[stream] = {}

    def state(self, stream: int) -> dict[int, int]:
        """Number of the last operation of every stream that lies before the end of ``stream``."""
        with self.lock:
            return _later(self._known[stream], self.host)

    def wait(self, stream: int, state: dict[int, int]) -> None:
        """Make later operations of ``stream`` wait for ``state``."""
        with self.lock:
            self._known[stream] = _later(self._known[stream], state)

    def host_waits(self, state: dict[int, int]) -> None:
        """Make the host know that ``state`` is reached."""
        with self.lock:
            self.host = _later(self.host, state)

    def asks(self, state: dict[int, int]) -> bool:
        """Whether the host knows that ``state`` is reached, or learns it by asking."""
        with self.lock:
            reached = all(max(self.host.get(each, 0), self.device.get(each, 0)) >= n for each, n in state.items())
            if reached:
                self.host_waits(state)
            return reached

    def catch_up(self) -> None:
        """Let the device finish all that is queued, without telling the host."""
        with self.lock:
            for known in self._known.values():
                self.device = _later(self.device, known)

    def use(self, stream: int, what: str, reads: list[Span], writes: list[Span]) -> None:
        """Queue an operation on ``stream``. Raises :class:`RuleBroken` if it may overtake an earlier one."""
        with self.lock:
            known = self._known[stream]
            number = known[stream] = known.get(stream, 0) + 1
            state = _later(known, self.host)
            what = f"{what} on {self.names[stream]} ({place()})"
            found = [self._conflict(span, write, state, what) for span, write in _both(reads, writes)]
            for (memory, start, stop), write in _both(reads, writes):
                _keep(memory, Use(stream, number, write, what, start, stop))
            self._raise(found)

    def use_by_host(self, what: str, span: Span, writes: bool) -> None:
        """Let the host use pinned memory. Raises :class:`RuleBroken` if a copy may still be using it."""
        with self.lock:
            self._raise([self._conflict(span, writes, self.host, f"{what} by the host ({place()})")])

    def _conflict(self, span: Span, writes: bool, state: dict[int, int], what: str) -> str | None:
        memory, start, stop = span
        for use in memory.uses:
            apart = use.stop <= start or stop <= use.start
            if apart or not (writes or use.writes) or state.get(use.stream, 0) >= use.number:
                continue
            doing, done = ("writes" if writes else "reads"), ("written" if use.writes else "read")
            return f"{what} {doing} {memory.name}, {done} by {use.what}, without waiting for it"
        return None

    def took(self, memory: Memory) -> None:
        """Count newly allocated device memory."""
        with self.lock:
            self.held_bytes += memory.stop - memory.start
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def freed(self, memory: Memory) -> None:
        """Note a breach if another stream may still use the freed ``memory``."""
        with self.lock:
            self.held_bytes -= memory.stop - memory.start
            state = self.state(memory.home)
            for use in memory.uses:
                if use.stream not in (memory.home, *memory.told) and state.get(use.stream, 0) < use.number:
                    self.breaches.append(
                        f"{memory.name} of {self.names[memory.home]} is freed while {use.what} may still use it: "
                        "record_stream was not called"
                    )
                    return

    def unregistered(self, memory: Memory) -> None:
        """Raise :class:`RuleBroken` if a copy may still use the pinned ``memory``."""
        with self.lock:
            late = [use for use in memory.uses if self.host.get(use.stream, 0) < use.number]
            self._raise([f"{memory.name} is unregistered while {use.what} may still use it" for use in late[:1]])

    def broken(self, what: str) -> RuleBroken:
        """Note a breach, and return the error to raise."""
        with self.lock:
            self.breaches.append(what)
        return RuleBroken(what)

    def _raise(self, found: list[str | None]) -> None:
        for what in found:
            if what is not None:
                raise self.broken(what)


def _later(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in {*one, *other}}


def _both(reads: list[Span], writes: list[Span]) -> list[tuple[Span, bool]]:
    return [(span, False) for span in reads] + [(span, True) for span in writes]


def _keep(memory: Memory, use: Use) -> None:
    """Add a use, and drop those that it makes superfluous."""
    within = [use.start <= each.start and each.stop <= use.stop for each in memory.uses]
    memory.uses = [
        each
        for each, inside in zip(memory.uses, within, strict=True)
        # A write comes after all uses of its bytes; a read replaces earlier ones of its stream.
        if not (inside and (use.writes or (not each.writes and each.stream == use.stream)))
    ]
    memory.uses.append(use)


def place() -> str:
    """File and line of the innermost call that is not of this package, the standard library or a dependency."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


@cache
def _is_foreign(path: str) -> bool:
    return path.startswith(_HERE) or path.startswith("<") or "/site-packages/" in path or "/lib/python3" in path


_HERE = __file__.rpartition("/")[0] + "/"
