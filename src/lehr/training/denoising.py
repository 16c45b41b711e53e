r"""Denoising score matching: what a score is trained on.

With x_t = α x₀ + σ ε, and Δ the difference between what the network says and what is so,

    likelihood weighting   ‖ε̂ − ε‖²                      at λ uniform,
    uniform weighting      ‖predicted − its target‖²     at λ uniform,

λ the log-SNR. The first is, up to a factor of ½ and a constant, the variational bound on
the log likelihood, whatever the schedule; the second counts each level alike in the units
of the head, so that a data head is asked for images and not for noise. All heads are linear
in (x̂₀, ε̂), so one formula serves them: the head's own error is that of Δx̂₀ and Δε̂.

References:
    Vincent, A connection between score matching and denoising autoencoders, 2011.
    Kingma & Gao, Understanding diffusion objectives as the ELBO with simple data augmentation, NeurIPS 2023.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lehr.potentials.base import ScorePotential
from lehr.predictions import predict

__all__ = ["WEIGHTINGS", "Weighting", "denoising_score_matching", "stratified"]

Weighting = Literal["uniform", "likelihood"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def stratified(rng_key: jax.Array, n: int, low: float, high: float) -> jax.Array:
    """n numbers, each uniform in its own nth part of [low, high], shape (n,)."""
    return low + (high - low) * (jnp.arange(n) + jax.random.uniform(rng_key, (n,))) / n


def denoising_score_matching(
    potential: ScorePotential,
    rng_key: jax.Array,
    data: jax.Array,
    labels: jax.Array | None = None,
    *,
    sigma_range: tuple[float, float],
    weighting: Weighting = "uniform",
) -> jax.Array:
    """The mean squared error of one batch, with one draw of (λ, ε) for each event; a scalar.

    Args:
        potential: the score that is being trained, with a field ``prediction``.
        rng_key: a JAX key.
        data: x₀, shape (n, *event_shape), in data units.
        labels: the class of each event, shape (n,), where the network has classes; K for any.
        sigma_range: the range of σ/α.
        weighting: see above.
    """
    key_level, key_noise = jax.random.split(rng_key)
    schedule = potential.schedule
    low, high = (-2 * math.log(ratio) for ratio in sigma_range)
    times = schedule.time(stratified(key_level, data.shape[0], low, high))

    def squared_error(x0: jax.Array, label: jax.Array | None, t: jax.Array, noise: jax.Array) -> jax.Array:
        p = potential if label is None else potential.given(label)  # type: ignore[attr-defined]
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        error = p._noise(alpha * x0 + sigma * noise, t) - noise
        if weighting == "uniform":
            error = predict(potential.prediction, -sigma / alpha * error, error, t, schedule)  # type: ignore[attr-defined]
        return jnp.sum(error**2)

    noise = jax.random.normal(key_noise, data.shape)
    return jnp.mean(jax.vmap(squared_error)(data, labels, times, noise))
