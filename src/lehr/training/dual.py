r"""Dual score matching: an energy trained in space and in noise.

Denoising score matching regresses −∇ log p_σ on the noise,

    ε = −σ ∇_y log p_σ(y)            on average, given y = x₀ + σ ε,

and so learns the shape of every mode but nothing of their relative mass: two modes with a
gap between them have the same score whatever is in each. The derivative by the noise level
has an unbiased target as well,

    ∂ log p_σ(y)/∂ log σ = E[‖ε‖² | y] − d,

and modes that are apart at one σ have met at another, so that following it from the one
Gaussian at σ_max, whose constant is known, fixes the masses and the normalisation. Both
derivatives come out of one reverse pass over log p(y, log σ). The exact part q of the energy
has its own time derivative written in, a control variate: of the target's variance, 2d far
from the data, the network meets only what ∂ log q/∂ log σ does not account for.

Both losses are weighted by v/s² = 1 + σ²/s²: the noise that remains in the targets then has
the same size at every level. The score loss may go without, which is what bounds the
likelihood, and looks closer at the small σ where images have most to learn. σ is log-uniform,
stratified over the batch.

**Where there are no data.** At small σ the noisy data cover only the support, and between
and beyond it a network may say anything: one particle that strays there can be given more
weight than all others together. But E[‖ε‖² | y] is never negative, so that at *every* y

    ∂ log p_σ(y)/∂ log σ ≥ −d :

going down in σ, no density rises faster than that of a point. The third loss is the square
of what this inequality is violated by, at points spread over several widths of the data. It
carries what is known at a σ wide enough to reach y down to all smaller ones.

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
from lehr.training.denoising import Weighting, stratified

__all__ = ["Losses", "dual_score_matching"]


class Losses(NamedTuple):
    """The mean losses of a batch, before they are added.

    Attributes:
        score: of the derivative in space.
        time: of the derivative by log σ.
        bound: of the bound on it, away from the data.
    """

    score: jax.Array
    time: jax.Array
    bound: jax.Array


SPREAD = 2.5  # of the points where the bound is asked for, in units of √v


def dual_score_matching(
    potential: EnergyNetwork,
    rng_key: jax.Array,
    data: jax.Array,
    labels: jax.Array | None = None,
    *,
    weighting: Weighting = "uniform",
    with_bound: bool = True,
) -> Losses:
    """The losses of one batch, each with one draw of (σ, ε) for each event.

    Args:
        potential: the energy that is being trained.
        rng_key: a JAX key.
        data: x₀, shape (n, *event_shape), in data units.
        labels: the class of each event, shape (n,), where the network has classes; K for any.
        weighting: of the score loss: ``"uniform"``, by v/s²; ``"likelihood"``, all levels by 1.
        with_bound: whether the third loss is asked for; 0 otherwise.
    """
    n, dimension = data.shape[0], math.prod(potential.event_shape)
    key_level, key_noise, key_away, key_bound = jax.random.split(rng_key, 4)

    low, high = (math.log(s) for s in potential.sigma_range)

    def by_y_and_log_sigma(y: jax.Array, log_sigma: jax.Array, label: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        p = potential if label is None else potential.given(label)

        def log_density(y: jax.Array, log_sigma: jax.Array) -> jax.Array:
            return p.log_density_at(y, jnp.ones(()), jnp.exp(log_sigma))

        return jax.grad(log_density, (0, 1))(y, log_sigma)

    def regress(
        x0: jax.Array, label: jax.Array | None, log_sigma: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        sigma = jnp.exp(log_sigma)
        by_y, by_log_sigma = by_y_and_log_sigma(x0 + sigma * noise, log_sigma, label)
        precision = 1 + (sigma / potential.std) ** 2
        in_space = jnp.sum((sigma * by_y + noise) ** 2)
        in_time = (by_log_sigma - (jnp.sum(noise**2) - dimension)) ** 2
        return precision * in_space if weighting == "uniform" else in_space, precision * in_time

    def exceed(away: jax.Array, label: jax.Array | None, log_sigma: jax.Array) -> jax.Array:
        y = potential.mean + SPREAD * jnp.hypot(potential.std, jnp.exp(log_sigma)) * away
        return jnp.maximum(-dimension - by_y_and_log_sigma(y, log_sigma, label)[1], 0.0) ** 2

    noise = jax.random.normal(key_noise, data.shape)
    space, time = jax.vmap(regress)(data, labels, stratified(key_level, n, low, high), noise)
    if not with_bound:
        return Losses(jnp.mean(space), jnp.mean(time), jnp.zeros(()))
    few = max(n // 4, 1)
    away = jax.random.normal(key_away, (few, *potential.event_shape))
    bound = jax.vmap(exceed)(away, None if labels is None else labels[:few], stratified(key_bound, few, low, high))
    return Losses(jnp.mean(space), jnp.mean(time), jnp.mean(bound))
