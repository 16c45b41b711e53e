r"""One signature for every kernel.

A kernel moves one chain under a target that changes from level to level, so the target is
an argument of every call and nothing about it is kept: a state caches log π and its
gradient at the current point, and :func:`refresh` renews both when the level changes.

The step size ε is HMC's, whatever the kernel: q moves by ε p per leapfrog step. It is in
units of the scale of each coordinate, which enters as the inverse mass matrix (its
square), so that ε of order one is right at every level.

To plug in a BlackJAX kernel of your own: subclass :class:`Kernel`, build the kernel in
``build``, and return what it does with (key, state, logdensity_fn, step size, inverse mass).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Kernel", "LogDensity", "Stats", "Step", "refresh"]

LogDensity = Callable[[Any], jax.Array]


class Stats(NamedTuple):
    """What is kept of one transition.

    Attributes:
        acceptance_rate: the probability with which the proposal was, or would have been, accepted.
        is_divergent: whether the energy error was non-finite or beyond BlackJAX's threshold.
    """

    acceptance_rate: jax.Array
    is_divergent: jax.Array


Step = Callable[[jax.Array, Any, LogDensity, jax.Array, jax.Array], tuple[Any, Stats]]


class Kernel(abc.ABC):
    """A Markov kernel; subclasses are frozen dataclasses, static under ``jit``.

    Attributes:
        is_adjusted: whether a Metropolis test makes its target exact. Only then are weights right.
        target_acceptance: the mean acceptance that step sizes are tuned for.
        evaluations_per_step: gradient evaluations in one transition.
    """

    is_adjusted: bool
    target_acceptance: float
    evaluations_per_step: int

    @abc.abstractmethod
    def init(self, position: Any, logdensity_fn: LogDensity) -> Any:
        """A state at ``position``, with at least ``position``, ``logdensity`` and ``logdensity_grad``."""

    @abc.abstractmethod
    def build(self) -> Step:
        """``step(rng_key, state, logdensity_fn, step_size, inverse_mass_matrix) -> (state, Stats)``."""

    @abc.abstractmethod
    def initial_step_size(self, dimension: int) -> float:
        """ε to start tuning from, in units of the scale, for a position of ``dimension`` numbers."""


def refresh(state: Any, logdensity_fn: LogDensity) -> Any:
    """``state`` with the log density and gradient of another target at the same position."""
    value, gradient = jax.value_and_grad(logdensity_fn)(state.position)
    return state._replace(logdensity=jnp.asarray(value), logdensity_grad=gradient)
