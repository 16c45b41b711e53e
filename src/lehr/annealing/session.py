r"""What the host does while a compiled program takes chains down a ladder.

The program is run in *segments* of some stages each. Between two segments a meter is told, the state is kept, and
a signal is obeyed. How long segments are changes nothing in the result: the program is the same, and every stage
draws from keys of its own. So a run that was stopped, or killed, goes on from what was kept, and ends as if it
never had been.

Segments last about a fifth of a second where somebody watches, some seconds where only a checkpoint is
made, and as long as the run where neither is wanted.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lehr.annealing.progress import NoMeter, ProgressMeter, Standing
from lehr.keeper import Keeper

__all__ = ["Part", "Session"]

T = TypeVar("T")
WATCHED, KEPT = 0.2, 5.0  # seconds of a segment
SAVING_SHARE = 0.05  # of the time, at most, goes into copying a state that is kept


class Part(NamedTuple, Generic[T]):
    """What is to be done, in stages, from one state to the next.

    Attributes:
        name: of the part; what is kept of it lies in a folder of that name.
        total: stages.
        begin: makes the first state.
        like: the shapes of a state, and how it is laid out.
        advance: takes a state on until so many stages are done.
        stand: what a :class:`~lehr.annealing.progress.Standing` says of a state.
    """

    name: str
    total: int
    begin: Callable[[], T]
    like: Callable[[], T]
    advance: Callable[[T, int], T]
    stand: Callable[[T], dict[str, float]]


class Session:
    """A context around one run.

    Args:
        label: what runs.
        meter: is told how far it is.
        folder: where the run is kept, or None.
        facts: what determines the run, see :class:`~lehr.keeper.Keeper`.
        resume: whether to go on with what the folder holds.

    Raises:
        ValueError: if it is to be resumed and no folder was given.
    """

    def __init__(
        self, label: str, meter: ProgressMeter, folder: str | Path | None, facts: dict[str, Any], resume: bool
    ) -> None:
        if resume and folder is None:
            raise ValueError(
                f"resume=True goes on from a checkpoint, and this {label} keeps none; make it with checkpoint=<folder>."
            )
        self.label, self.meter, self.facts, self.resume = label, meter, facts, resume
        self.folder = None if folder is None else Path(folder)
        self.seconds_compiling = 0.0  # and making the first states
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self.folder is not None and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def run(self, part: Part[T]) -> T:
        """One part of the run, from its beginning, or from where it was kept, to its end; returns its last state.

        Raises:
            ValueError: if the folder holds another run, or this one and it is not to be resumed.
            KeyboardInterrupt, SystemExit: after a signal, once the state has been kept.
        """
        self.meter.begin(f"{self.label} {part.name}", part.total)
        try:
            with Keeper(None if self.folder is None else self.folder / part.name, self.facts) as keeper:
                return self._go(part, keeper)
        finally:
            self.meter.end()

    def _go(self, part: Part[T], keeper: Keeper) -> T:
        total = part.total
        if keeper.step is not None and not self.resume:
            raise ValueError(
                f"{self.folder} holds this run, {keeper.step} of {total} stages of its {part.name} done. Go on with "
                "run(..., resume=True), or remove the folder, or choose another."
            )
        started, done = time.monotonic(), keeper.step or 0
        state = part.begin() if keeper.step is None else keeper.restore(part.like())
        if done < total:
            state = jax.block_until_ready(part.advance(state, done))  # compiles, and does nothing
        self.seconds_compiling += time.monotonic() - started
        longest = WATCHED if not isinstance(self.meter, NoMeter) else KEPT if self.folder is not None else float("inf")
        pace, copying, kept_at = longest, 0.0, time.monotonic()
        while done < total:
            count = total - done if longest == float("inf") else int(min(max(longest / pace, 1), total - done))
            count = _first_says(count)
            started = time.monotonic()
            state = jax.block_until_ready(part.advance(state, done + count))
            pace, done = (time.monotonic() - started) / count, done + count
            self.meter.update(Standing(done=done, total=total, seconds_left=pace * (total - done), **part.stand(state)))
            told = _anyone_says(self._signal or 0)
            due = _first_says(time.monotonic() - kept_at > max(KEPT, copying / SAVING_SHARE))
            if done == total or told or due:
                started = time.monotonic()
                keeper.save(done, state)
                kept_at = time.monotonic()
                copying = kept_at - started
            if told and done < total:
                said = (
                    f"stopped at stage {done} of {total} of the {part.name}; run(..., resume=True) goes on from there."
                )
                raise SystemExit(128 + told) if told == signal.SIGTERM else KeyboardInterrupt(said)
        return state

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:  # told twice: at once
            raise KeyboardInterrupt
        self._signal = number


def _first_says(value: int) -> int:
    """What the first process says: their clocks differ, and all must take the same segments."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _anyone_says(number: int) -> int:
    """A signal that one of the processes was sent, or 0: all end after the same stage."""
    return number if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.asarray(number))))
