r"""HMC and its relatives, all from BlackJAX's HMC kernel.

    momentum   p ~ N(0, M),  M⁻¹ the squared scale of each coordinate
    leapfrog   L steps of size ε
    test       accept with probability min(1, exp(−ΔH)), or always

MALA is HMC with L = 1 (BlackJAX's own MALA takes ε²/2 and no mass matrix; the move and its
acceptance are the same). Without the test HMC is U-HMC and MALA is ULA: unadjusted, biased
by the step size, and the only ones that a score alone can drive exactly as written.

References:
    Neal, MCMC using Hamiltonian dynamics, 2011.
    Roberts & Tweedie, Exponential convergence of Langevin distributions, 1996.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.mcmc import hmc

from lehr.kernels.base import Kernel, LogDensity, Stats, Step

__all__ = ["HMC", "MALA", "UHMC", "ULA"]


def _always_accept(rng_key: jax.Array, delta_energy: jax.Array, old: Any, new: Any) -> tuple[Any, tuple[Any, ...]]:
    """Accept every proposal that is finite; report what a test would have said."""
    finite = jnp.isfinite(delta_energy)
    chosen = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return chosen, (finite, jnp.clip(jnp.exp(delta_energy), max=1.0), None)


_ADJUSTED = hmc.build_kernel()
_UNADJUSTED = hmc.build_kernel(build_proposal=functools.partial(hmc.hmc_proposal, sample_proposal=_always_accept))


@dataclass(frozen=True)
class _Hamiltonian(Kernel):
    """What the four share.

    Args:
        step_size: ε, in units of each coordinate's scale. ``None`` starts from the kernel's own
            guess. The drivers tune it unless they are told to make no warm-up steps.
        target_acceptance: the mean acceptance to tune for.
    """

    step_size: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, or None to be chosen; got {self.step_size!r}.")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must lie between 0 and 1; got {self.target_acceptance!r}.")
        steps = self._steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_integration_steps must be an integer of at least 1; got {steps!r}.")

    @property
    def _steps(self) -> int:
        return getattr(self, "num_integration_steps", 1)

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        return self._steps

    def init(self, position: Any, logdensity_fn: LogDensity) -> hmc.HMCState:
        return hmc.init(position, logdensity_fn)

    def build(self) -> Step:
        kernel = _ADJUSTED if self.is_adjusted else _UNADJUSTED

        def step(
            rng_key: jax.Array, state: Any, logdensity_fn: LogDensity, step_size: jax.Array, inverse_mass: jax.Array
        ) -> tuple[Any, Stats]:
            state, info = kernel(rng_key, state, logdensity_fn, step_size, inverse_mass, self._steps)
            return state, Stats(jnp.nan_to_num(info.acceptance_rate), info.is_divergent)

        return step

    def initial_step_size(self, dimension: int) -> float:
        if self.step_size is not None:
            return self.step_size
        return 1.2 * dimension ** (-1 / 6 if self._steps == 1 else -1 / 4)


@dataclass(frozen=True)
class HMC(_Hamiltonian):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    Args:
        num_integration_steps: L ≥ 1, leapfrog steps and gradient evaluations in a transition.
        step_size: ε, in units of each coordinate's scale; the start of its tuning. Chosen if None.
        target_acceptance: the mean acceptance to tune for.

    Raises:
        ValueError: for a step size, step count or target out of range.
    """

    num_integration_steps: int = 3
    target_acceptance: float = field(default=0.75, kw_only=True)
    is_adjusted = True


@dataclass(frozen=True)
class UHMC(_Hamiltonian):
    """HMC without the Metropolis test: biased, but in need of a score only. Arguments as for :class:`HMC`;
    the acceptance that is tuned and reported is the one a test would have had. For a score there is
    none, and the step size is used as it is."""

    num_integration_steps: int = 3
    target_acceptance: float = field(default=0.95, kw_only=True)
    is_adjusted = False


@dataclass(frozen=True)
class MALA(_Hamiltonian):
    """The Metropolis-adjusted Langevin algorithm: one leapfrog step of ε, x + ε²s/2 + εξ.

    Args:
        step_size: ε, in HMC's convention: BlackJAX's own MALA would be given ε²/2.
        target_acceptance: the mean acceptance to tune for.

    Raises:
        ValueError: for a step size or target out of range.
    """

    target_acceptance: float = field(default=0.57, kw_only=True)
    is_adjusted = True


@dataclass(frozen=True)
class ULA(_Hamiltonian):
    """The unadjusted Langevin algorithm: MALA without the test. Arguments as for :class:`MALA`."""

    target_acceptance: float = field(default=0.9, kw_only=True)
    is_adjusted = False
