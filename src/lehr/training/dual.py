r"""Dual score matching: an energy trained in space and in noise.

Denoising score matching regresses −∇ log p_σ on the noise,

    ε = −σ ∇_y log p_σ(y)            on average, given y = x₀ + σ ε,

and so learns the shape of every mode but nothing of their relative mass: two modes with a
gap between them have the same score whatever is in each. The derivative by the noise level
has an unbiased target as well,

    ∂ log p_σ(y)/∂ log σ = E[‖ε‖² | y] − d,

and modes that are apart at one σ have met at another, so that following it from the one
Gaussian at σ_max, whose constant is known, fixes the masses and the normalisation. Both
derivatives come out of one reverse pass over log p(y, log σ). The Gaussian part of the
energy has its own time derivative written in, which leaves the network the small remainder.

Both losses are weighted by v/s² = 1 + σ²/s²: the noise that remains in the targets then has
the same size at every level. σ is log-uniform, stratified over the batch.

References:
    Vincent, A connection between score matching and denoising autoencoders, 2011.
    Guth, Kadkhodaie & Simoncelli, Learning normalized image densities via dual score
    matching, 2025 (arXiv 2506.05310).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lehr.potentials.network import EnergyNetwork

__all__ = ["Losses", "dual_score_matching"]


class Losses(NamedTuple):
    """The two mean losses of a batch, before they are added."""

    score: jax.Array
    time: jax.Array


def dual_score_matching(potential: EnergyNetwork, rng_key: jax.Array, data: jax.Array) -> Losses:
    """The two losses of one batch, each with one draw of (σ, ε) for each event.

    Args:
        potential: the energy that is being trained.
        rng_key: a JAX key.
        data: x₀, shape (n, *event_shape), in data units.
    """
    n, dimension = data.shape[0], math.prod(potential.event_shape)
    key_level, key_noise = jax.random.split(rng_key)
    low, high = (math.log(s) for s in potential.sigma_range)
    strata = (jnp.arange(n) + jax.random.uniform(key_level, (n,))) / n
    log_sigma = low + (high - low) * strata
    noise = jax.random.normal(key_noise, data.shape)

    def one(x0: jax.Array, log_sigma: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        def log_density(y: jax.Array, log_sigma: jax.Array) -> jax.Array:
            return potential.log_density_at(y, jnp.ones(()), jnp.exp(log_sigma))

        sigma = jnp.exp(log_sigma)
        by_y, by_log_sigma = jax.grad(log_density, (0, 1))(x0 + sigma * noise, log_sigma)
        weight = 1 + (sigma / potential.std) ** 2
        in_space = jnp.sum((sigma * by_y + noise) ** 2)
        in_time = (by_log_sigma - (jnp.sum(noise**2) - dimension)) ** 2
        return weight * in_space, weight * in_time

    space, time = jax.vmap(one)(data, log_sigma, noise)
    return Losses(jnp.mean(space), jnp.mean(time))
