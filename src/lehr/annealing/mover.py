"""How all chains move at one level: transitions that tune the step, and transitions that count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from lehr.annealing.keys import per_chain
from lehr.annealing.plan import Plan
from lehr.annealing.tuning import gain, with_short_steps
from lehr.kernels.base import LogDensity, Stats

__all__ = ["Mover"]


class Mover:
    """How all chains move at one level.

    ``move(key, chains, target, log_step, inverse_mass, num_warmup, num_steps)`` returns the chains, the
    step size, and for each chain the mean acceptance and number of divergences of the steps that
    count, and the evaluations of all, (chains,).
    """

    def __init__(self, plan: Plan, short_share: ArrayLike) -> None:
        self.plan, self.step = plan, with_short_steps(plan.kernel.build(), short_share)

    def __call__(
        self,
        rng_key: jax.Array,
        chains: Any,
        target: LogDensity,
        log_step: jax.Array,
        inverse_mass: jax.Array,
        num_warmup: int,
        num_steps: int,
    ) -> tuple[Any, jax.Array, Stats]:
        n = self.plan.num_chains
        none = Stats(jnp.zeros(n), jnp.zeros(n, int), jnp.zeros(n, int))
        if num_warmup + num_steps == 0:
            return chains, log_step, none

        def one(state: tuple[Any, jax.Array, Stats], i: jax.Array) -> tuple[tuple[Any, jax.Array, Stats], None]:
            chains, log_step, sums = state
            keys = per_chain(jax.random.fold_in(rng_key, i), n)
            step_size = jnp.exp(log_step)
            step = self.plan.layout.over(lambda key, chain: self.step(key, chain, target, step_size, inverse_mass))
            chains, stats = step(keys, chains)
            error = jnp.mean(stats.acceptance_rate) - self.plan.kernel.target_acceptance
            counts = i >= num_warmup
            sums = Stats(
                sums.acceptance_rate + jnp.where(counts, stats.acceptance_rate, 0.0),
                sums.is_divergent + jnp.where(counts, stats.is_divergent, 0),
                sums.evaluations + stats.evaluations,
            )
            return (chains, log_step + gain(i, num_warmup) * error, sums), None

        (chains, log_step, sums), _ = jax.lax.scan(one, (chains, log_step, none), jnp.arange(num_warmup + num_steps))
        return chains, log_step, sums._replace(acceptance_rate=sums.acceptance_rate / max(num_steps, 1))
