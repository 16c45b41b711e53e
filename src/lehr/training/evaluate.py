"""How well a network predicts held-out data, level by level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.likelihood import log_likelihood
from lehr.potentials.base import Potential
from lehr.potentials.network import EnergyNetwork

__all__ = ["calibration", "held_out_losses"]


def held_out_losses(
    potential: Potential,
    events: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    sigmas: Sequence[float],
    rng_key: jax.Array,
) -> list[dict[str, float]]:
    """The mean squared error of ε̂ per dimension, at each noise level.

    Args:
        potential: the network.
        events: x₀ that it was not trained on, shape (N, *event_shape).
        labels: their classes, shape (N,), which the network is then told; none for "any".
        sigmas: the levels, as σ/α.
        rng_key: of the noise.

    Returns:
        For each level its ``sigma``, the ``error``, and the ``standard_error`` of that mean.
    """
    x0, known = jnp.asarray(events, float), None if labels is None else jnp.asarray(labels)

    @eqx.filter_jit
    def errors(potential: Any, t: jax.Array, rng_key: jax.Array) -> jax.Array:
        alpha, sigma = potential.schedule.alpha(t), potential.schedule.sigma(t)

        def error(x0: jax.Array, label: jax.Array | None, noise: jax.Array) -> jax.Array:
            p = potential if label is None else potential.given(label)
            return jnp.mean((p._noise(alpha * x0 + sigma * noise, t) - noise) ** 2)

        return jax.vmap(error)(x0, known, jax.random.normal(rng_key, x0.shape))

    figures = []
    for i, sigma in enumerate(sigmas):
        t = potential.schedule.time(-2 * math.log(sigma))
        each = np.asarray(errors(potential, t, jax.random.fold_in(rng_key, i)))
        figures.append(
            {"sigma": sigma, **_rounded(error=each.mean(), standard_error=each.std() / math.sqrt(each.size))}
        )
    return figures


def calibration(
    energy: EnergyNetwork,
    events: ArrayLike,
    *,
    sigmas: Sequence[float],
    rng_key: jax.Array,
    tolerance: float = 1e-3,
) -> list[dict[str, float]]:
    """log p by the energy less log p by the probability flow of its own score, over noised events, in nats.

    A mean of zero says that the energy is normalised where its flow is, a spread of zero that its values and its
    score tell one story of noise.

    Args:
        energy: the energy, its label fixed or not.
        events: x₀, shape (N, *event_shape).
        sigmas: the levels, as σ/α.
        rng_key: of the noise.
        tolerance: of the ODE solver.

    Returns:
        For each level its ``sigma``, ``mean`` and ``spread``, and the flow's mean ``log_likelihood``.
    """
    x0 = jnp.asarray(events, float)
    figures = []
    for i, sigma in enumerate(sigmas):
        t = energy.schedule.time(-2 * math.log(sigma))
        noise = jax.random.normal(jax.random.fold_in(rng_key, i), x0.shape)
        x = energy.schedule.alpha(t) * x0 + energy.schedule.sigma(t) * noise
        flow = np.asarray(log_likelihood(energy, x, t, tolerance=tolerance).value)
        gap = np.asarray(jax.jit(jax.vmap(partial(energy.log_density, t=t)))(x)) - flow
        figures.append({"sigma": sigma, **_rounded(mean=gap.mean(), spread=gap.std(), log_likelihood=flow.mean())})
    return figures


def _rounded(**figures: float) -> dict[str, float]:
    return {name: round(float(figure), 4) for name, figure in figures.items()}
