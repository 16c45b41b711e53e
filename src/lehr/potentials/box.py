r"""The density of a box with noise, in one coordinate, without cancellation.

With c = (x − α (a + b)/2)/σ and h = α (b − a)/2σ, a coordinate's density is

    log p = −log σ + G(c, h),      G(c, h) = log [ (Φ(c + h) − Φ(c − h)) / 2h ] ,

and the difference of two nearly equal numbers is never taken: by symmetry c ≤ 0; where
h (1 + |c|) is small the mean of φ over the box is a Gauss-Legendre sum; and in the tail log Φ is
split into −z²/2 and the slowly varying log of the scaled Mills ratio, whose quadratic parts
subtract to 2ch exactly.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc

__all__ = ["log_box", "log_box_slope", "mean_in_box"]

LOG_ROOT_2PI = math.log(2 * math.pi) / 2
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(12)


def log_box(centre: jax.Array, half: jax.Array) -> jax.Array:
    """G(c, h) = log [(Φ(c + h) − Φ(c − h))/2h], elementwise, for h ≥ 0."""
    centre = -jnp.abs(centre)
    thin = _is_thin(centre, half)
    near, narrow = jnp.where(thin, centre, 0.0), jnp.where(thin, half, 0.0)
    averaged = -(near**2) / 2 - LOG_ROOT_2PI + jax.nn.logsumexp(_tilted(near, narrow), 0)
    wide = jnp.where(thin, 1.0, half)
    return jnp.where(thin, averaged, _log_difference(centre, wide) - jnp.log(2 * wide))


def log_box_slope(centre: jax.Array, half: jax.Array) -> jax.Array:
    """∂G/∂c, elementwise."""
    return jax.jvp(lambda c: log_box(c, half), (centre,), (jnp.ones_like(centre),))[1]


def mean_in_box(centre: jax.Array, half: jax.Array) -> jax.Array:
    """(∂G/∂c + c)/h, elementwise: where in the box, from −1 to 1, the data behind x is expected."""
    thin = _is_thin(centre, half)
    near, narrow = jnp.where(thin, centre, 0.0), jnp.where(thin, half, 0.0)
    averaged = jnp.tensordot(jnp.asarray(NODES, float), jax.nn.softmax(_tilted(near, narrow), 0), 1)
    wide = jnp.where(thin, 1.0, half)
    return jnp.where(thin, averaged, (log_box_slope(centre, wide) + centre) / wide)


def _is_thin(centre: jax.Array, half: jax.Array) -> jax.Array:
    return half * (1 + jnp.abs(centre)) < 3.0


def _tilted(c: jax.Array, h: jax.Array) -> jax.Array:
    """log of w_k φ(c − h u_k)/2φ(c) at the nodes u_k of Gauss and Legendre, along a new first axis."""
    column = (-1,) + (1,) * jnp.ndim(c)
    u, w = (jnp.asarray(v, float).reshape(column) for v in (NODES, NODE_WEIGHTS))
    return jnp.log(w / 2) + h * u * (c - h * u / 2)


def _log_difference(c: jax.Array, h: jax.Array) -> jax.Array:
    """log [Φ(c + h) − Φ(c − h)] for c ≤ 0 and h not small."""
    upper, lower = c + h, c - h
    tail = upper < 0
    z = jnp.stack([jnp.where(tail, upper, -upper), lower])  # a side on which both are tails
    mills = _log_mills(z)
    apart = jnp.where(tail, -2 * c * h + mills[0] - mills[1], 1.0)
    beyond = jnp.where(tail, 0.0, jnp.sum(jnp.exp(mills - z**2 / 2), 0))
    return jnp.where(tail, mills[0] - z[0] ** 2 / 2 + _log1mexp(apart), jnp.log1p(-beyond))


def _log_mills(z: jax.Array) -> jax.Array:
    """log Φ(z) + z²/2 for z ≤ 0, which varies only like −log(−z)."""
    far = z < -10
    near = jnp.where(far, -1.0, z)
    deep = jnp.where(far, z, -20.0)
    r = 1 / deep**2
    series = 1 - r * (1 - 3 * r * (1 - 5 * r * (1 - 7 * r)))
    close = _close_log_mills(near)
    return jnp.where(far, -jnp.log(-deep) - LOG_ROOT_2PI + jnp.log(series), close)


@jax.custom_jvp
def _close_log_mills(z: jax.Array) -> jax.Array:
    """For −10 ≤ z ≤ 0. It solves m' = φ(0) exp(−m) + z, by which it has derivatives of all orders: those of log erfc
    divide by its square, which underflows in single precision."""
    return jnp.log(erfc(-z / math.sqrt(2)) / 2) + z**2 / 2


@_close_log_mills.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (z,), (dz,) = primals, tangents
    m = _close_log_mills(z)
    return m, (jnp.exp(-LOG_ROOT_2PI - m) + z) * dz


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 − exp(−x)) for x > 0."""
    x = jnp.maximum(x, 1e-6)  # smaller only in a branch not taken, whose second derivative stays finite
    return jnp.where(x < 0.7, jnp.log(-jnp.expm1(-jnp.minimum(x, 0.7))), jnp.log1p(-jnp.exp(-jnp.maximum(x, 0.7))))
