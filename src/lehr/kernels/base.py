r"""One signature for every kernel.

A kernel moves one chain under a target that changes from level to level, so the target is
an argument of every call and nothing about it is kept: a state caches log π and its
gradient at the current point, and :meth:`Kernel.refresh` renews both when the level changes.

The step size ε is HMC's, whatever the kernel: q moves by about ε p per leapfrog step. It is
in units of the scale of each coordinate, which enters as the inverse mass matrix (its
square), so that ε of order one is right at every level.

To plug in a BlackJAX kernel of your own: subclass :class:`Kernel`, build the kernel in
``build``, and return what it does with (key, state, logdensity_fn, step size, inverse mass).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Kernel", "LogDensity", "State", "Stats", "Step", "TunedKernel"]

LogDensity = Callable[[Any], jax.Array]


class State(NamedTuple):
    """The least that a chain's state holds; a kernel may have a NamedTuple of its own with more."""

    position: Any
    logdensity: jax.Array
    logdensity_grad: Any


class Stats(NamedTuple):
    """What is kept of one transition.

    Attributes:
        acceptance_rate: the probability with which the proposal was, or would have been, accepted.
        is_divergent: whether the energy error was non-finite or beyond BlackJAX's threshold.
        evaluations: gradient evaluations that it took.
    """

    acceptance_rate: jax.Array
    is_divergent: jax.Array
    evaluations: jax.Array | int = 1


Step = Callable[[jax.Array, Any, LogDensity, jax.Array, jax.Array], tuple[Any, Stats]]


class Kernel(abc.ABC):
    """A Markov kernel; subclasses are frozen dataclasses, static under ``jit``.

    Attributes:
        is_adjusted: whether a Metropolis test makes its target exact. Only then are weights right.
        target_acceptance: the mean acceptance that step sizes are tuned for.
        integrates_score: whether its test integrates the score where no log density is known.
        integrate_energies: whether it does so where one is known, too.
    """

    is_adjusted: bool
    target_acceptance: float
    integrates_score: bool = False
    integrate_energies: bool = False

    @abc.abstractmethod
    def init(self, rng_key: jax.Array, position: Any, logdensity_fn: LogDensity) -> Any:
        """A state at ``position``: a NamedTuple with at least ``position``, ``logdensity``, ``logdensity_grad``.

        The key is for what else the state holds, such as a momentum.
        """

    @abc.abstractmethod
    def build(self) -> Step:
        """``step(rng_key, state, logdensity_fn, step_size, inverse_mass_matrix) -> (state, Stats)``."""

    @abc.abstractmethod
    def initial_step_size(self, dimension: int) -> float:
        """ε to start tuning from, in units of the scale, for a position of ``dimension`` numbers."""

    def refresh(self, state: Any, logdensity_fn: LogDensity) -> Any:
        """``state`` with the log density and gradient of another target at its position."""
        value, gradient = jax.value_and_grad(logdensity_fn)(state.position)
        return state._replace(logdensity=jnp.asarray(value), logdensity_grad=gradient)

    def gradient(self, state: Any) -> Any:
        """∇ log π at the state's position, as cached."""
        return state.logdensity_grad


@dataclass(frozen=True)
class TunedKernel(Kernel):
    """What the kernels of this package share.

    Args:
        step_size: ε, in units of each coordinate's scale: the start of its tuning. ``None`` starts
            from the kernel's own guess.
        target_acceptance: the mean acceptance to tune for.
    """

    step_size: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, or None to be chosen; got {self.step_size!r}.")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must lie between 0 and 1; got {self.target_acceptance!r}.")

    def initial_step_size(self, dimension: int) -> float:
        return self.step_size if self.step_size is not None else self._guess(dimension)

    def _guess(self, dimension: int) -> float:
        raise NotImplementedError

    def _check_count(self, name: str, least: int = 1) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
