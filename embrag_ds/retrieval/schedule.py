"""Schedule of the reference cache: when it is re-encoded, and which generation a training step uses.

A refresh that is due at step s takes its *snapshot* of the embedding layer before that step. Its *publication* is at
step ``s + lag_steps``, the first that uses it. In between it is encoded while training goes on. Both steps follow from
the settings alone. So all ranks publish at the same step without communication, a resumed run repeats the uninterrupted
one, and an asynchronous run the synchronous one.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock

from embrag_ds.errors import require
from embrag_ds.settings import strict_settings


@strict_settings
class RefreshConfig:
    """Settings of the refresh schedule under ``encoding = "refresh"``; exactly one of the first three is set.

    Raises UserError for values that break a rule.
    """

    every_steps: int | None = None
    """[steps] Between two refreshes. Set exactly one of this, ``every_epochs`` and ``at_steps``."""
    every_epochs: int | None = None
    """[epochs] Between two refreshes."""
    at_steps: tuple[int, ...] | None = None
    """[steps] Of the refreshes, as an increasing list."""
    lag_steps: int = 4
    """[steps] From a snapshot to its first use. Encoding that takes longer is waited for."""
    asynchronous: bool = True
    """Encode on a thread and stream of its own; if false, before the next step, with the same losses."""

    def __post_init__(self) -> None:
        where = "retrieval.refresh"
        given = [name for name in ("every_steps", "every_epochs", "at_steps") if getattr(self, name) is not None]
        require(len(given) == 1, where, "set exactly one of every_steps, every_epochs and at_steps")
        for name in ("every_steps", "every_epochs"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{where}.{name}", "the interval must be at least 1")
        steps = (0, *(self.at_steps or ()))
        rising = all(earlier < later for earlier, later in pairwise(steps))
        listed = self.at_steps is None or len(self.at_steps) > 0
        require(listed and rising, f"{where}.at_steps", "must be increasing steps, the first at least 1")
        require(self.lag_steps >= 0, f"{where}.lag_steps", "must not be negative")


@dataclass(frozen=True)
class Generation:
    """One snapshot of the embedding layer, encoded for every window.

    ``snapshot_step`` is the step before which it is taken, ``first_step`` the first one that uses it.
    """

    number: int
    snapshot_step: int
    first_step: int


@dataclass
class RefreshSchedule:
    """Generations of a run, as a function of the step. Number 0 is taken at step 0; ``config`` None adds no other.

    A refresh that is due while another is unpublished is skipped, not queued. Safe for use from several threads.
    """

    config: RefreshConfig | None
    steps_per_epoch: int = 1
    _generations: list[Generation] = field(default_factory=lambda: [Generation(0, 0, 0)])
    _skipped: list[int] = field(default_factory=list)
    _known_until: int = 0
    # The prefetch thread uses the schedule beside the training thread.
    _lock: Lock = field(default_factory=Lock)

    def taken_at(self, step: int) -> Generation | None:
        """Generation whose snapshot is taken before ``step``, or None."""
        self._extend(step)
        newest = self._generations[bisect_right(self._generations, step, key=lambda each: each.snapshot_step) - 1]
        return newest if newest.snapshot_step == step else None

    def in_use(self, step: int) -> Generation:
        """Generation with which the batches of ``step`` are built."""
        self._extend(step)
        return self._generations[bisect_right(self._generations, step, key=lambda each: each.first_step) - 1]

    def needed_after(self, steps: int) -> list[Generation]:
        """Generations whose snapshots a run resumed after ``steps`` steps cannot take again.

        They are the last one used, and the unpublished one if there is one.
        """
        self._extend(steps)
        last = self.in_use(max(steps - 1, 0))
        return [last] + [each for each in self._generations[last.number + 1 :] if each.snapshot_step < steps]

    def skipped_until(self, step: int) -> int:
        """Number of refreshes due before or at ``step`` that were skipped."""
        self._extend(step)
        return bisect_right(self._skipped, step)

    def _extend(self, step: int) -> None:
        """Add the generations and skipped refreshes that are due up to ``step``."""
        if self.config is None:
            return
        with self._lock:
            for due in self._due(self.config, self._known_until + 1, step):
                if due < self._generations[-1].first_step:
                    self._skipped.append(due)
                else:
                    number = len(self._generations)
                    self._generations.append(Generation(number, due, due + self.config.lag_steps))
            self._known_until = max(step, self._known_until)

    def _due(self, config: RefreshConfig, first: int, last: int) -> list[int]:
        """Steps from ``first`` to ``last``, inclusive, at which a refresh is due."""
        if config.at_steps is not None:
            return [step for step in config.at_steps if first <= step <= last]
        interval = config.every_steps or (config.every_epochs or 0) * self.steps_per_epoch
        start = -(-first // interval) * interval
        return list(range(start, last + 1, interval))
