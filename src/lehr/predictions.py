r"""What a network predicts, and what is read from it.

Six heads are in use; with x = α x̂₀ + σ ε̂ they are one and the same information:

    noise      ε̂                          data   x̂₀
    score      s = −ε̂/σ                   v      v̂ = α ε̂ − σ x̂₀
    velocity   û = α̇ x̂₀ + σ̇ ε̂             (flows; the derivative of x_t along its path)
    edm        F̂ = (σ x̂₀ − α s_d² ε̂)/(s_d √v),   v = σ² + α² s_d²,   s_d = sigma_data

The last is the F of x̂₀ = c_skip y + c_out F(c_in y) with y = x/α, the noise-to-signal ratio σ/α
in the place of the reference's σ, c_skip = α² s_d²/v, c_out = σ s_d/√v and c_in y = x/√v: written so, nothing
divides by α. It is the one head whose network sees x scaled, by :func:`network_input`.

Each of the three readings ``score``, ``denoise`` and ``noise`` is computed from the head in
closed form. Divisions by α or σ appear only where the reading itself has them, and there
the divisor is kept above ``TINY``, so that both ends of the ladder stay finite.

References:
    Salimans & Ho, Progressive distillation, ICLR 2022 (v).
    Lipman et al., Flow matching for generative modeling, ICLR 2023 (velocity).
    Karras et al., Elucidating the design space of diffusion models, NeurIPS 2022 (edm).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lehr.schedules import Schedule

__all__ = ["PREDICTIONS", "Prediction", "Readings", "network_input", "predict", "read"]

Prediction = Literal["noise", "data", "score", "v", "velocity", "edm"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
TINY = 1e-6


class Readings(NamedTuple):
    """The three readings of one network output, each of the event's shape."""

    score: jax.Array
    denoise: jax.Array
    noise: jax.Array


def network_input(
    prediction: Prediction, x: jax.Array, t: jax.Array, schedule: Schedule, sigma_data: jax.Array | float = 0.5
) -> jax.Array:
    """What the network is given for x: x/√v under ``"edm"``, else x itself.

    Args:
        prediction: what the head predicts.
        x: the noisy event x_t.
        t: the time, a scalar.
        schedule: the schedule that t belongs to.
        sigma_data: s_d, the data's standard deviation that the network was trained with.
    """
    return x / _edm_root(t, schedule, sigma_data) if prediction == "edm" else x


def read(
    prediction: Prediction,
    output: jax.Array,
    x: jax.Array,
    t: jax.Array,
    schedule: Schedule,
    sigma_data: jax.Array | float = 0.5,
) -> Readings:
    """The readings of a head of type ``prediction`` whose output at (x, t) is ``output``.

    Args:
        prediction: what the head predicts.
        output: the head's output, of the shape of ``x``.
        x: the noisy event x_t.
        t: the time, a scalar.
        schedule: the schedule that t belongs to.
        sigma_data: s_d of an ``"edm"`` head.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    by_alpha, by_sigma = 1 / jnp.maximum(alpha, TINY), 1 / jnp.maximum(sigma, TINY)
    match prediction:
        case "noise":
            return Readings(-output * by_sigma, (x - sigma * output) * by_alpha, output)
        case "data":
            noise = (x - alpha * output) * by_sigma
            return Readings(-noise * by_sigma, output, noise)
        case "score":
            return Readings(output, (x + sigma**2 * output) * by_alpha, -sigma * output)
        case "v":
            power = alpha**2 + sigma**2  # 1 where variance is preserved
            noise = (sigma * x + alpha * output) / power
            return Readings(-noise * by_sigma, (alpha * x - sigma * output) / power, noise)
        case "velocity":
            alpha_dot, sigma_dot, determinant = _rates(t, schedule)
            noise = (alpha * output - alpha_dot * x) / determinant
            return Readings(-noise * by_sigma, (sigma_dot * x - sigma * output) / determinant, noise)
        case "edm":
            root = _edm_root(t, schedule, sigma_data)
            y = x / root
            noise = (sigma * y - alpha * sigma_data * output) / root
            return Readings(-noise * by_sigma, sigma_data * (alpha * sigma_data * y + sigma * output) / root, noise)
    raise ValueError(f"unknown prediction {prediction!r}; expected one of {', '.join(PREDICTIONS)}.")


def predict(
    prediction: Prediction,
    data: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    schedule: Schedule,
    sigma_data: jax.Array | float = 0.5,
) -> jax.Array:
    """What a perfect head of type ``prediction`` would say of x_t = α x₀ + σ ε: its training target.

    Args:
        prediction: what the head predicts.
        data: x̂₀ (or x₀), of the event's shape.
        noise: ε̂ (or ε), of the event's shape.
        t: the time, a scalar.
        schedule: the schedule that t belongs to.
        sigma_data: s_d of an ``"edm"`` head.
    """
    match prediction:
        case "noise":
            return noise
        case "data":
            return data
        case "score":
            return -noise / jnp.maximum(schedule.sigma(t), TINY)
        case "v":
            return schedule.alpha(t) * noise - schedule.sigma(t) * data
        case "velocity":
            alpha_dot, sigma_dot, _ = _rates(t, schedule)
            return alpha_dot * data + sigma_dot * noise
        case "edm":
            root = _edm_root(t, schedule, sigma_data)
            return (schedule.sigma(t) / sigma_data * data - schedule.alpha(t) * sigma_data * noise) / root
    raise ValueError(f"unknown prediction {prediction!r}; expected one of {', '.join(PREDICTIONS)}.")


def _edm_root(t: jax.Array, schedule: Schedule, sigma_data: jax.Array | float) -> jax.Array:
    """√v, the standard deviation of x_t for data of standard deviation s_d about zero."""
    return jnp.hypot(schedule.sigma(t), schedule.alpha(t) * sigma_data)


def _rates(t: jax.Array, schedule: Schedule) -> tuple[jax.Array, jax.Array, jax.Array]:
    """α̇, σ̇ and the determinant α σ̇ − σ α̇ of the map (x̂₀, ε̂) ↦ (x, û)."""
    t = jnp.maximum(t, TINY)  # σ̇ of a variance-preserving schedule is infinite at t = 0
    one = jnp.ones_like(t)
    alpha, alpha_dot = jax.jvp(schedule.alpha, (t,), (one,))
    sigma, sigma_dot = jax.jvp(schedule.sigma, (t,), (one,))
    return alpha_dot, sigma_dot, alpha * sigma_dot - sigma * alpha_dot
