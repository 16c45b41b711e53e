r"""The log likelihood of a diffusion model, by its probability-flow ODE.

Written in u = x/α and c = log(σ/α), the flow that carries p_t along is du/dc = (σ/α) ε̂, the
same for every schedule. With the data's mean m and standard deviation s it becomes, in

    z = (x − α m)/√v,    v = α² s² + σ²,    g = σ/√v,

    dz/dc = f(z, c) = g ε̂(x, t) − g² z,      log p_t(x) = log N₁(z₁) + ∫ ∇·f dc − Σ log √v_t ,

from the level of t to one of so much noise that z₁ there has the Gaussian density N₁ of the
model's moments. z is of order one all the way, f vanishes for a Gaussian of mean m and
deviation s, and nothing is divided by α, which may end at zero.

The divergence is exact up to 64 dimensions, one derivative each, and beyond that the mean
of ⟨ξ, ∂f ξ⟩ over random signs ξ, each kept along its whole path, so that their spread is
the error of the integral.

References:
    Song et al., Score-based generative modeling through SDEs, ICLR 2021 (the flow).
    Grathwohl et al., FFJORD, ICLR 2019 (the random signs).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from numpy.typing import ArrayLike

from lehr.potentials.base import Potential, check_time

__all__ = ["LogLikelihood", "log_likelihood"]

EXACT_UP_TO = 64  # dimensions whose divergence is taken exactly
WIDE = 300.0  # standard deviations of the data: noise that leaves a Gaussian, where a schedule goes that far
CLEAN = 0.1  # of the finest feature's standard deviation: the blur at which data are read by default
TOGETHER = 64  # events whose flows are solved at a time


class LogLikelihood(NamedTuple):
    """Log densities, and how well they are known.

    Attributes:
        value: log p_t(x) in nats, one for each event.
        standard_error: of the random divergence; zero where it is exact.
    """

    value: jax.Array
    standard_error: jax.Array


def log_likelihood(
    potential: Potential,
    x: ArrayLike,
    t: ArrayLike | None = None,
    *,
    rng_key: jax.Array | None = None,
    num_probes: int | None = None,
    tolerance: float = 1e-5,
) -> LogLikelihood:
    """log p_t(x) of any diffusion model, score or energy, by its probability-flow ODE.

    An energy knows its log density already; its flow tells whether that is normalised.

    Args:
        potential: the model.
        x: one event, or several along a leading axis, as seen at level t.
        t: the level, a scalar in [0, 1]. Defaults to where σ/α is a tenth of the finest feature's standard
            deviation, which is where ladders end: a model says nothing of finer things.
        rng_key: for the random signs of events of more than 64 dimensions; ``jax.random.key(0)`` by default.
        num_probes: random signs for each event; 0 takes the divergence exactly. By default 0 up to 64
            dimensions and 16 above.
        tolerance: of the ODE solver, absolute and relative.

    Raises:
        TypeError: for a product, whose p_t are not the densities of noised data.
        ValueError: if x has another shape than the event, for fewer than two probes, or where the
            log-SNR is infinite.
    """
    if not potential.is_diffusion:
        raise TypeError(
            f"the flow of a {type(potential).__name__} does not carry its p_t along: at t > 0 a product is not the "
            "density of noised data. Its normaliser is lehr.AnnealedSMC's log_evidence."
        )
    x = jnp.asarray(x, float)
    lead = x.ndim - len(potential.event_shape)
    if lead not in (0, 1) or x.shape[lead:] != potential.event_shape:
        raise ValueError(
            f"expected x of shape {potential.event_shape}, or several such along a leading axis; got {x.shape}."
        )
    dimension = math.prod(potential.event_shape)
    if num_probes is None:
        num_probes = 0 if dimension <= EXACT_UP_TO else 16
    if num_probes < 0 or num_probes == 1:
        raise ValueError(f"num_probes must be 0 (exact) or at least 2, for a standard error; got {num_probes}.")
    schedule = potential.schedule
    if t is None:
        t = schedule.time(-2 * jnp.log(CLEAN * potential.width(0.0)))
    t = check_time(t)
    widest = float(jnp.max(potential.moments(0.0).std))
    ends = -schedule.log_snr(t) / 2, jnp.minimum(-schedule.log_snr(1.0) / 2, math.log(WIDE * widest))
    if not math.isfinite(ends[0]):
        raise ValueError(f"the log-SNR is infinite at t = {float(t):g}; ask a little above it.")
    keys = jax.random.split(jax.random.key(0) if rng_key is None else rng_key, x.shape[0] if lead else 1)
    solve = partial(_solve, num_probes=num_probes)
    value, error = solve(potential, x if lead else x[None], t, ends, keys, jnp.asarray(tolerance))
    return LogLikelihood(value, error) if lead else LogLikelihood(value[0], error[0])


@eqx.filter_jit
def _solve(
    potential: Potential,
    events: jax.Array,
    t: jax.Array,
    ends: tuple[jax.Array, jax.Array],
    keys: jax.Array,
    tolerance: jax.Array,
    *,
    num_probes: int,
) -> tuple[jax.Array, jax.Array]:
    schedule, data = potential.schedule, potential.moments(0.0)

    def scales(t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """α m, √v and g."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        root = jnp.hypot(alpha * data.std, sigma)
        return alpha * data.mean, root, sigma / root

    def flow(c: jax.Array, z: jax.Array) -> jax.Array:
        t = schedule.time(-2 * c)
        mean, root, g = scales(t)
        return g * potential._noise(mean + root * z, t) - g**2 * z

    def one(x: jax.Array, rng_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, root, _ = scales(t)
        count = num_probes or x.size
        probes = (
            jax.random.rademacher(rng_key, (count, *x.shape), float)
            if num_probes
            else jnp.eye(x.size).reshape(count, *x.shape)
        )

        def rates(c: Any, state: tuple[jax.Array, jax.Array], _: None) -> tuple[jax.Array, jax.Array]:
            slope, push = jax.linearize(partial(flow, c), state[0])
            traces = jax.vmap(lambda probe: jnp.vdot(probe, push(probe)))(probes)
            return slope, traces if num_probes else jnp.sum(traces)[None]

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            diffrax.Tsit5(),
            t0=ends[0],
            t1=ends[1],
            dt0=None,
            y0=((x - mean) / root, jnp.zeros(num_probes or 1)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=16**4,
        )
        z, traces = (leaf[-1] for leaf in solution.ys)
        t_end = schedule.time(-2 * ends[1])
        m, (there, wide, _) = potential.moments(t_end), scales(t_end)
        last = jnp.sum(norm.logpdf(z, (m.mean - there) / wide, m.std / wide))
        value = last + jnp.mean(traces) - jnp.sum(jnp.log(root))
        return value, jnp.std(traces) / math.sqrt(max(num_probes - 1, 1))

    return jax.lax.map(lambda pair: one(*pair), (events, keys), batch_size=TOGETHER)
