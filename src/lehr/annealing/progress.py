r"""What a run says of itself while it goes on.

The host is told after every segment of a run, and tells a meter: a bar where there is a terminal or a
notebook, plain lines now and then where there is none, nothing in a process that works for another. A meter of
your own is a subclass of :class:`ProgressMeter`, given as ``progress=``.
"""

from __future__ import annotations

import abc
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

__all__ = ["NoMeter", "PlainLines", "ProgressMeter", "RichBar", "Standing", "as_meter", "counted"]

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


class Standing(NamedTuple):
    """How far one part of a run is.

    Attributes:
        done: stages behind it: levels, and then draws.
        total: stages in all.
        sigma: σ/α of the level it is at, the noise in units of the data; NaN of several runs.
        acceptance_rate: mean acceptance there; NaN where nobody knows it.
        ess: effective share of the weights, in [0, 1]; 1 for chains without, NaN of several runs.
        seconds_left: at the pace so far; None before there is one.
    """

    done: int
    total: int
    sigma: float = math.nan
    acceptance_rate: float = math.nan
    ess: float = math.nan
    seconds_left: float | None = None

    def __str__(self) -> str:
        known = {
            f"σ {self.sigma:.3g}": self.sigma,
            f"accepted {self.acceptance_rate:.2f}": self.acceptance_rate,
            f"ESS {self.ess:.0%}": self.ess,
        }
        said = [words for words, value in known.items() if not math.isnan(value)]
        if self.seconds_left is not None:
            said.append(f"{_clock(self.seconds_left)} left")
        return "  ".join(said)


class ProgressMeter(abc.ABC):
    """Is told how far a run is. What it raises ends the run."""

    @abc.abstractmethod
    def begin(self, label: str, total: int) -> None:
        """A part of a run begins, by the name of ``label``, of ``total`` stages. It is compiled first."""

    @abc.abstractmethod
    def update(self, standing: Standing) -> None:
        """Some more of its stages are done."""

    @abc.abstractmethod
    def end(self) -> None:
        """It has ended, or was ended."""


class NoMeter(ProgressMeter):
    """Says nothing."""

    def begin(self, label: str, total: int) -> None: ...

    def update(self, standing: Standing) -> None: ...

    def end(self) -> None: ...


class RichBar(ProgressMeter):
    """A bar on a terminal, or in a notebook.

    Args:
        console: where to draw; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True) if console is None else console
        self._bar: Progress | None = None

    def begin(self, label: str, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self._bar = Progress(*columns, console=self.console)
        self._task = self._bar.add_task(label, total=total, said="compiling")
        self._bar.start()

    def update(self, standing: Standing) -> None:
        assert self._bar is not None
        self._bar.update(self._task, completed=standing.done, said=str(standing))

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


class PlainLines(ProgressMeter):
    """A line now and then, as for a log file; none of a part that is over before the first is due.

    Args:
        console: where to print; standard error by default.
        seconds: between two lines.
    """

    def __init__(self, console: Console | None = None, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self.console = Console(stderr=True) if console is None else console
        self.seconds = seconds

    def begin(self, label: str, total: int) -> None:
        self._label, self._spoke = label, float("inf")  # until it is compiled

    def update(self, standing: Standing) -> None:
        self._spoke = min(self._spoke, time.monotonic())
        if time.monotonic() - self._spoke >= self.seconds:
            self._spoke = time.monotonic()
            self.console.print(
                f"{self._label} {standing.done}/{standing.total}  {standing}", soft_wrap=True, highlight=False
            )

    def end(self) -> None: ...


def as_meter(progress: bool | ProgressMeter) -> ProgressMeter:
    """The meter that a user asked for: True is whichever suits where the program runs.

    Raises:
        TypeError: for anything but a bool or a meter.
    """
    if isinstance(progress, ProgressMeter):
        return progress
    if not isinstance(progress, bool):
        raise TypeError(f"progress must be True, False or a lehr.ProgressMeter; got {progress!r}.")
    works_for_another = jax.process_index() > 0 or multiprocessing.parent_process() is not None
    if not progress or works_for_another:
        return NoMeter()
    console = Console(stderr=True)
    return RichBar(console) if console.is_terminal or console.is_jupyter else PlainLines(console)


def counted(meter: ProgressMeter, label: str, items: Sequence[T]) -> Iterator[T]:
    """``items``, one after the other: many runs that are one piece of work to who watches.

    Args:
        meter: is told of each that is done with.
        label: what is done.
        items: any, of a known number.
    """
    meter.begin(label, len(items))
    try:
        started = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            pace = (time.monotonic() - started) / done
            meter.update(Standing(done, len(items), seconds_left=pace * (len(items) - done)))
    finally:
        meter.end()


def _clock(seconds: Any) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
