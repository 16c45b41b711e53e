r"""Microcanonical Langevin Monte Carlo, from BlackJAX: a momentum of fixed length.

The velocity is a unit vector, turned by the gradient (isokinetic McLachlan, two gradients a
step) and mixed with noise so that it is forgotten over a length L. There is no Metropolis test;
the bias grows with the energy error, whose would-be acceptance min(1, exp(−ΔE)) is what steps
are tuned by.

A unit vector in d dimensions moves each coordinate by about 1/√d, so BlackJAX's step and L are
here ε √d and L √d, in units of each coordinate's scale: order one at every level and dimension.

Reference:
    Robnik, De Luca, Silverstein & Seljak, Microcanonical Hamiltonian Monte Carlo, JMLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.mcmc import mclmc

from lehr.kernels.base import LogDensity, Stats, Step, TunedKernel

__all__ = ["MCLMC"]


@dataclass(frozen=True)
class MCLMC(TunedKernel):
    """Unadjusted microcanonical Langevin.

    Args:
        num_integration_steps: isokinetic steps in a transition, two gradient evaluations each.
        decoherence: L, the length over which the velocity is forgotten, in units of the scale √d.
        step_size: ε, in units of the scale √d; the start of its tuning. Chosen if None.
        target_acceptance: the mean would-be acceptance to tune for.

    Raises:
        ValueError: for a step size, count, length or target out of range.
    """

    num_integration_steps: int = 2
    decoherence: float = 1.5
    target_acceptance: float = field(default=0.95, kw_only=True)
    is_adjusted = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("num_integration_steps")
        if not self.decoherence > 0:
            raise ValueError(f"decoherence must be a positive length; got {self.decoherence!r}.")

    def init(self, rng_key: jax.Array, position: Any, logdensity_fn: LogDensity) -> Any:
        return mclmc.init(position, logdensity_fn, rng_key)

    def build(self) -> Step:
        kernel = mclmc.build_kernel()

        def step(
            rng_key: jax.Array, state: Any, logdensity_fn: LogDensity, step_size: jax.Array, inverse_mass: jax.Array
        ) -> tuple[Any, Stats]:
            root = jnp.sqrt(1.0 * inverse_mass.size)

            def one(state: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
                state, info = kernel(key, state, logdensity_fn, inverse_mass, self.decoherence * root, step_size * root)
                return state, (info.energy_change, ~info.nonans)

            state, (change, lost) = jax.lax.scan(one, state, jax.random.split(rng_key, self.num_integration_steps))
            rate = jnp.where(jnp.any(lost), 0.0, jnp.exp(-jnp.abs(jnp.sum(change))))
            return state, Stats(rate, jnp.any(lost), 2 * self.num_integration_steps)

        return step

    def _guess(self, dimension: int) -> float:
        return 0.5 * dimension ** (-1 / 4)
