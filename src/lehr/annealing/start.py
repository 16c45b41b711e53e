r"""How chains start: at the first level, each with the density of its start in the place of log π.

An ordinary latent drawn from its prior may lie where the likelihood is a cliff, and no step
that suits the other chains would ever move it. Unweighted chains therefore choose, each for
itself, one of ``num_starts`` draws, with the importance weights of the first level. Weighted
chains do not: their first weight is log π less the density of the start, which must be known.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lehr.annealing.keys import per_chain
from lehr.annealing.plan import Plan
from lehr.annealing.weights import Particles
from lehr.kernels.line_integral import PartlyKnown
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position

__all__ = ["begin"]


def begin(structure: Structure, plan: Plan, constants: Constants, t: jax.Array, rng_key: jax.Array) -> Particles:
    """N chains of equal weight, to enter the first level with.

    Args:
        structure: the path's functions.
        plan: what is static.
        constants: the path's data.
        t: the first level.
        rng_key: for the draws.
    """
    n = plan.num_chains
    keys = per_chain(rng_key, n)
    start, log_start = plan.layout.over(_starter(structure, plan, constants, t))(keys)

    def zero(_: Position) -> jax.Array:
        return jnp.zeros(())

    nowhere = PartlyKnown(zero, zero)
    chains = jax.vmap(lambda key, q: plan.kernel.init(key, q, nowhere))(keys, start)
    chains = chains._replace(logdensity=log_start)  # what the first weight compares with
    islands = plan.num_islands
    zeros = jnp.zeros(islands)
    return Particles(chains, jnp.full(n, -jnp.log(n // islands)), zeros, jnp.arange(n), zeros)


def _starter(
    structure: Structure, plan: Plan, constants: Constants, t: jax.Array
) -> Callable[[jax.Array], tuple[Position, jax.Array]]:
    """How one chain starts: ``start(key) -> (position, log start density)``."""

    def draw(rng_key: jax.Array) -> tuple[Position, jax.Array]:
        position = structure.init(constants, rng_key, t)
        if not plan.counts_noise:  # as wide as one diffusion is at this level, not as a product of several
            means, copies = structure.moments(constants, position, t)[0], structure.copies(constants, position, t)
            wider = {k: m + jnp.sqrt(jnp.maximum(copies[k], 1.0)) * (position[k] - m) for k, m in means.items()}
            position = position | wider
        return position, structure.log_start(constants, position, t)

    def choose(rng_key: jax.Array) -> tuple[Position, jax.Array]:
        key_draws, key_choice = jax.random.split(rng_key)
        drawn = jax.vmap(draw)(jax.random.split(key_draws, plan.num_starts))
        weights = jax.vmap(lambda q: structure.log_density(constants, q, t))(drawn[0]) - drawn[1]
        chosen = jax.random.categorical(key_choice, jnp.where(jnp.isfinite(weights), weights, -jnp.inf))
        return jax.tree.map(lambda leaf: leaf[chosen], drawn)

    return choose if plan.num_starts > 1 else draw
