r"""Draws of one diffusion model by its probability flow.

With y = x/α and s = σ/α, the noise in units of the data, the flow that carries p_1 to p_0 is

    dy/ds = ε̂(α y, t),

solved here by Heun's rule on levels uniform in log s, from the Gaussian of the noisiest one. What it
ends on has the density p_t of the model, where the model is the noised density of some data.

References:
    Song et al., Score-based generative modeling through SDEs, ICLR 2021 (probability flow).
    Karras et al., Elucidating the design space of diffusion models, NeurIPS 2022 (Heun's rule in σ/α).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lehr.potentials.base import Potential

__all__ = ["draw"]

NUM_LEVELS = 64
NOISIEST, CLEANEST = -8.0, 12.0  # log-SNR: where σ/α = 55 and where it is .0025


def draw(rng_key: jax.Array, potential: Potential, t: jax.Array) -> jax.Array:
    """One event of p_t, of shape ``event_shape``, by 2 × 64 evaluations of the noise.

    Args:
        rng_key: of the noise that it starts from.
        potential: a diffusion model.
        t: the level, a scalar; at a clean end of no noise, the last step is the denoiser's.
    """
    schedule = potential.schedule
    noisy = jnp.maximum(schedule.log_snr(1.0), NOISIEST)
    clean = jnp.clip(schedule.log_snr(t), noisy, CLEANEST)
    log_snr = jnp.linspace(noisy, clean, NUM_LEVELS)
    start = potential.moments(schedule.time(noisy))
    x = start.mean + start.std * jax.random.normal(rng_key, potential.event_shape)

    def step(x: jax.Array, levels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        (t_from, t_to), (s_from, s_to) = map(schedule.time, levels), (jnp.exp(-level / 2) for level in levels)
        y, alpha = x / schedule.alpha(t_from), schedule.alpha(t_to)
        slope = potential.noise(x, t_from)
        ahead = potential.noise(alpha * (y + (s_to - s_from) * slope), t_to)
        return alpha * (y + (s_to - s_from) * (slope + ahead) / 2), None

    x, _ = jax.lax.scan(step, x, (log_snr[:-1], log_snr[1:]))
    blurred = schedule.log_snr(t) > CLEANEST
    return jnp.where(blurred, schedule.alpha(t) * potential.denoise(x, schedule.time(clean)), x)
