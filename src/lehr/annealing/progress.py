r"""A progress bar over levels, fed from inside the compiled program.

The program calls back once a level; whether anybody listens is decided outside, by the
:func:`progress_bar` context. The callback carries no identity of the bar, so that another
bar compiles nothing new; it never raises, since an exception there would end the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["progress_bar", "report"]

Listener = Callable[[int, int, float, float, float], None]
_listeners: list[Listener] = []


def report(level: jax.Array, num_levels: int, t: jax.Array, acceptance: jax.Array, ess: jax.Array) -> None:
    """Say, from inside a compiled program, that a level is done.

    Args:
        level: index of the level.
        num_levels: how many there are.
        t: its time.
        acceptance: mean acceptance at it.
        ess: effective share of the weights, in [0, 1].
    """
    jax.debug.callback(_tell, level, num_levels, t, acceptance, ess)


def _tell(level: np.ndarray, num_levels: np.ndarray, *figures: np.ndarray) -> None:
    for listen in _listeners[-1:]:
        with contextlib.suppress(Exception):
            listen(int(level), int(num_levels), *(float(f) for f in figures))


@contextlib.contextmanager
def progress_bar(label: str, num_levels: int, console: Console | None = None) -> Iterator[None]:
    """Show a bar while a program that reports its levels runs inside this context.

    Args:
        label: what is running.
        num_levels: how many levels it has.
        console: where to draw; standard error by default. Nothing is drawn where it is no terminal.
    """
    console = Console(stderr=True) if console is None else console
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=num_levels, figures="compiling")

        def listen(level: int, _: int, t: float, acceptance: float, ess: float) -> None:
            figures = f"t {t:.4f}  accepted {acceptance:.2f}  ESS {ess:.0%}"
            bar.update(task, completed=level + 1, figures=figures)

        _listeners.append(listen)
        try:
            yield
            jax.effects_barrier()
        finally:
            _listeners.remove(listen)
