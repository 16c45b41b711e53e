r"""How particles are weighed on entering a level, and when they are resampled.

The extended target is π_t(x, θ) f(x' | x), with f the forward kernel as backward kernel, so a
particle that a proposal K took from x' to x gains

    energies   log π_t(x, θ) − log π_t'(x', θ) + log f(x' | x) − log K(x | x')
    path       log Π_i (r_i/f)^{w_i} + log f − log K + log L_t(x, θ) − log L_t'(x', θ)

or, left where it is, the same without f and K at x = x'. Both are had where both are asked for, and their
difference, averaged over the particles, is the *gap*: zero if energies are calibrated and steps
short. Before the first level x' is a draw from the start, whose density stands for π_t'.

log Z accumulates log Σ W w at each entry, with W the normalised weights before it. Its error is had from
the genealogy: families keep together under systematic resampling, which rounds N W_e up or down.

References:
    Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers, JRSS B 2006.
    Lee & Whiteley, Variance estimation in the particle filter, Biometrika 2018.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import systematic

__all__ = ["WEIGHTS", "Particles", "Weights", "follow_path", "weigh"]

Weights = Literal["energy", "path", "both"]
WEIGHTS: tuple[str, ...] = get_args(Weights)


def follow_path(weights: Weights | None) -> bool:
    """Whether these weights need the models' own reverse kernels, which then propose the moves between levels."""
    return weights in ("path", "both")


class Particles(NamedTuple):
    """Chains with weights.

    Attributes:
        chains: kernel states, stacked.
        log_weights: normalised, Σ exp = 1.
        log_evidence: log Z so far.
        ancestors: which starting point each descends from.
        scatter: N Σ_r Σ_e Var(W_e), how much resamplings, which round them, have scattered the families.
    """

    chains: Any
    log_weights: jax.Array
    log_evidence: jax.Array
    ancestors: jax.Array
    scatter: jax.Array


def weigh(
    particles: Particles, increment: jax.Array, rng_key: jax.Array, threshold: jax.Array
) -> tuple[Particles, jax.Array, jax.Array]:
    """Weigh, account for the evidence, and resample where the weights have become too uneven.

    Args:
        particles: before.
        increment: what each log weight gains, (N,); NaN counts as no weight.
        rng_key: for resampling.
        threshold: resample where ESS < threshold · N.

    Returns:
        The particles, the effective sample size before resampling, and whether they were resampled.
    """
    n = particles.log_weights.shape[0]
    weights = particles.log_weights + increment
    weights = jnp.where(jnp.isnan(weights), -jnp.inf, weights)  # who once had no weight gets none back
    gain = jax.nn.logsumexp(weights)
    alive = jnp.isfinite(gain)
    weights = jnp.where(alive, weights - gain, -jnp.log(n))
    ess = jnp.exp(-jax.nn.logsumexp(2 * weights))
    resample = ess < threshold * n

    def again() -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        chosen = systematic(rng_key, jnp.exp(weights), n)
        chains, ancestors = jax.tree.map(lambda leaf: leaf[chosen], (particles.chains, particles.ancestors))
        share = n * jnp.bincount(particles.ancestors, jnp.exp(weights), length=n) % 1.0
        return chains, ancestors, jnp.full(n, -jnp.log(n)), jnp.sum(share * (1 - share)) / n

    def keep() -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        return particles.chains, particles.ancestors, weights, jnp.zeros_like(gain)

    chains, ancestors, weights, scattered = jax.lax.cond(resample, again, keep)
    particles = Particles(chains, weights, particles.log_evidence + gain, ancestors, particles.scatter + scattered)
    return particles, jnp.where(alive, ess, 0.0), resample
