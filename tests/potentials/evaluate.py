"""All readings of a potential on a grid of times and points, compiled once per kind of potential."""

import equinox as eqx
import jax
import numpy as np


@eqx.filter_jit
def readings(p, x, t):
    """log density, score, denoise and noise at all (t, x)."""

    def one(x, t):
        return p.log_density(x, t), p.score(x, t), p.denoise(x, t), p.noise(x, t)

    return jax.vmap(lambda t: jax.vmap(lambda x: one(x, t))(x))(t)


@eqx.filter_jit
def scores(p, x, t):
    """score, denoise and noise at all (t, x), for potentials without a density."""

    def one(x, t):
        return p.score(x, t), p.denoise(x, t), p.noise(x, t)

    return jax.vmap(lambda t: jax.vmap(lambda x: one(x, t))(x))(t)


def noising(schedule, t):
    """α and σ in float64, shaped (time, 1, 1)."""
    return (np.asarray(f(t), float)[:, None, None] for f in (schedule.alpha, schedule.sigma))
