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

**Islands** are sets of particles that are resampled each within itself. Each has its own estimate of Z, unbiased as
all of them are; their mean is the run's, their scatter its error, and in averages an island counts as its Z does.

References:
    Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers, JRSS B 2006.
    Vergé, Dubarry, Del Moral & Moulines, On parallel implementation of sequential Monte Carlo methods: the island
    particle model, Statistics and Computing 2015.
    Lee & Whiteley, Variance estimation in the particle filter, Biometrika 2018.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import systematic

from lehr.annealing.keys import per_chain
from lehr.annealing.layout import Layout

__all__ = ["WEIGHTS", "Particles", "Weights", "follow_path", "overall", "weigh"]

Weights = Literal["energy", "path", "both"]
WEIGHTS: tuple[str, ...] = get_args(Weights)


def follow_path(weights: Weights | None) -> bool:
    """Whether these weights need the models' own reverse kernels, which then propose the moves between levels."""
    return weights in ("path", "both")


class Particles(NamedTuple):
    """Chains with weights, in islands: stretches of the same number of chains.

    Attributes:
        chains: kernel states, stacked.
        log_weights: normalised within each island, Σ exp = 1; (N,).
        log_evidence: log Z so far, of each island.
        ancestors: which starting point each descends from, (N,).
        scatter: N Σ_r Σ_e Var(W_e) of each island, how much resamplings, which round them, have scattered families.
    """

    chains: Any
    log_weights: jax.Array
    log_evidence: jax.Array
    ancestors: jax.Array
    scatter: jax.Array

    @property
    def total_log_evidence(self) -> jax.Array:
        """log of the mean of the islands' Z."""
        return jax.nn.logsumexp(self.log_evidence) - jnp.log(self.log_evidence.size)


def overall(particles: Particles) -> jax.Array:
    """Log weights normalised over all islands, each counting as its Z does; (N,)."""
    total = jax.nn.logsumexp(particles.log_evidence)
    shares = jnp.where(jnp.isfinite(total), particles.log_evidence - total, -jnp.log(particles.log_evidence.size))
    return particles.log_weights + jnp.repeat(shares, particles.log_weights.size // shares.size)


def weigh(
    particles: Particles, increment: jax.Array, rng_key: jax.Array, threshold: jax.Array, layout: Layout
) -> tuple[Particles, jax.Array, jax.Array]:
    """Weigh, account for the evidence, and resample where the weights have become too uneven.

    Each island by itself: where they are as many as the devices, or a multiple, nothing moves between devices.

    Args:
        particles: before.
        increment: what each log weight gains, (N,); NaN counts as no weight.
        rng_key: for resampling.
        threshold: resample where ESS < threshold · N.
        layout: where the chains lie.

    Returns:
        The particles, the effective sample size before resampling, and whether any were resampled.
    """
    islands = particles.log_evidence.size

    def parted(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(islands, -1, *leaf.shape[1:])

    def island(
        chains: Any, log_weights: jax.Array, gained: jax.Array, ancestors: jax.Array, key: jax.Array
    ) -> tuple[Any, ...]:
        n = log_weights.shape[0]
        weights = log_weights + gained
        weights = jnp.where(jnp.isnan(weights), -jnp.inf, weights)  # who once had no weight gets none back
        gain = jax.nn.logsumexp(weights)
        weights = jnp.where(jnp.isfinite(gain), weights - gain, -jnp.log(n))
        ess = jnp.exp(-jax.nn.logsumexp(2 * weights))
        resample = ess < threshold * n

        def again() -> tuple[Any, ...]:
            chosen = systematic(key, jnp.exp(weights), n)
            share = n * jnp.bincount(ancestors % n, jnp.exp(weights), length=n) % 1.0
            scattered = jnp.sum(share * (1 - share)) / n
            return *jax.tree.map(lambda leaf: leaf[chosen], (chains, ancestors)), jnp.full(n, -jnp.log(n)), scattered

        def keep() -> tuple[Any, ...]:
            return chains, ancestors, weights, jnp.zeros_like(gain)

        chains, ancestors, after, scattered = jax.lax.cond(resample, again, keep)
        return chains, after, ancestors, gain, weights, resample, scattered

    local = islands % layout.num_shards == 0
    each: Any = layout.over(island, in_batches=False) if local else jax.vmap(island)
    parts = jax.tree.map(parted, (particles.chains, particles.log_weights, increment, particles.ancestors))
    chains, after, ancestors, gain, before, resampled, scattered = each(*parts, per_chain(rng_key, islands))
    chains, after, ancestors, before = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (chains, after, ancestors, before)
    )
    weighed = Particles(chains, after, particles.log_evidence + gain, ancestors, particles.scatter + scattered)
    total = overall(weighed._replace(log_weights=before))
    ess = jnp.exp(-jax.nn.logsumexp(2 * total))
    return weighed, jnp.where(jnp.any(jnp.isfinite(gain)), ess, 0.0), jnp.any(resampled)
