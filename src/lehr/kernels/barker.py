r"""Barker's proposal, from BlackJAX: a random walk that leans towards the gradient.

Each coordinate draws a step z of standard deviation ε and keeps its sign with probability
1/(1 + exp(−z ∂ log π)). The gradient decides the direction only and never the length, so a
wrong scale or a steep place costs little; on a target that suits it MALA is better.

Reference:
    Livingstone & Zanella, The Barker proposal, JRSS B 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.mcmc import barker

from lehr.kernels.base import LogDensity, Stats, Step, TunedKernel

__all__ = ["Barker"]


@dataclass(frozen=True)
class Barker(TunedKernel):
    """Metropolis-adjusted Barker proposal.

    Args:
        step_size: ε, the standard deviation of the proposal in units of each coordinate's scale; the
            start of its tuning. Chosen if None.
        target_acceptance: the mean acceptance to tune for.

    Raises:
        ValueError: for a step size or target out of range.
    """

    target_acceptance: float = field(default=0.5, kw_only=True)
    is_adjusted = True

    def init(self, rng_key: jax.Array, position: Any, logdensity_fn: LogDensity) -> barker.BarkerState:
        return barker.init(position, logdensity_fn)

    def build(self) -> Step:
        kernel = barker.build_kernel()

        def step(
            rng_key: jax.Array, state: Any, logdensity_fn: LogDensity, step_size: jax.Array, inverse_mass: jax.Array
        ) -> tuple[Any, Stats]:
            precision = 1 / inverse_mass  # whose inverse root BlackJAX's Barker, unlike its HMC, steps by
            state, info = kernel(rng_key, state, logdensity_fn, step_size, precision)
            lost = ~jnp.isfinite(info.proposal.logdensity)  # rejected, with an acceptance of NaN
            return state, Stats(jnp.where(lost, 0.0, jnp.nan_to_num(info.acceptance_rate)), lost)

        return step

    def _guess(self, dimension: int) -> float:
        return 1.5 * dimension ** (-1 / 6)
