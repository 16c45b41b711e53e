r"""How far chains step: a scale for each coordinate, and one number for all.

The step in coordinate i is ε = c · scale_i, with scale_i = min(width_i(t), spread_i): the width
is the path's own scale at the level, √(α² s² + σ²); the spread is half the distance between the
16 % and 84 % quantiles over the chains, which is what ordinary latents go by, and what a sharp
likelihood makes smaller than the width. c is pooled over chains, carried from level to level, and
follows the mean acceptance by Robbins-Monro, log c += γ_n (acceptance − target), γ_n = n^{−.6}.
One transition in eight takes a quarter of the step, so that a chain where the density is steeper
than elsewhere can still move; tuning and the reported acceptance average over both.

Both are found by a pilot pass of few chains over the whole ladder, and then frozen: a
:class:`Tuning`. The chains that count adapt to nothing, least of all to themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lehr.kernels.base import LogDensity, Stats, Step
from lehr.programs.closure import Constants, Structure

__all__ = ["SHORT_SHARE", "Tuning", "curvature", "gain", "pooled_scale", "smooth", "squared_scale", "with_short_steps"]

PRIOR_CHAINS = 5.0  # how many chains' worth the prior spread counts in the pooled one
GAIN_DECAY = 0.6
SHORT_SHARE, SHORT_STEP = 0.125, 0.25  # which share of transitions take which share of the step
LOG_VARIANCE_NOISE = 3.1  # n times the variance of the log of a variance, had from two quantiles of n Gaussians
ONE_SIGMA = (0.1587, 0.8413)  # the quantiles at ±1σ of a Gaussian


class Tuning(NamedTuple):
    """Steps for each level: fixed, wherever they come from.

    ``lehr.Tuning(0.03)`` is one absolute step for all coordinates and levels; a run's ``tuning`` is
    what its pilot found, and may be given to another.

    Attributes:
        step_size: ε in units of the scale, a scalar or (K,).
        scale: of each coordinate, a scalar, (K, 1), or (K, D) in the order of ``ravel_pytree``.
        short_share: which share of transitions takes a quarter of the step.
        curvature: of −log π, averaged, a scalar or (K, D), for the proposals of weighted chains.
        moves: to which levels weighted chains move, and do not stay where they are: a bool or (K,).
    """

    step_size: Any
    scale: Any = 1.0
    short_share: Any = 0.0
    curvature: Any = 1.0
    moves: Any = True

    def on(self, num_levels: int, dimension: int) -> Tuning:
        """The same as arrays of shapes (K,) and (K, D).

        Raises:
            ValueError: if they do not fit, or are not positive and finite.
        """
        try:
            step_size = np.broadcast_to(np.asarray(self.step_size, np.float64), (num_levels,))
            scale = np.broadcast_to(np.asarray(self.scale, np.float64), (num_levels, dimension))
        except ValueError:
            raise ValueError(
                f"a Tuning for {num_levels} levels and {dimension} coordinates needs a step_size of shape () or "
                f"({num_levels},) and a scale of shape (), ({num_levels}, 1) or ({num_levels}, {dimension}); got "
                f"{np.shape(self.step_size)} and {np.shape(self.scale)}."
            ) from None
        for name, value in (("step_size", step_size), ("scale", scale)):
            if not np.all(np.isfinite(value) & (value > 0)):
                raise ValueError(f"the {name} of a Tuning must be positive and finite.")
        curvature = np.broadcast_to(np.asarray(self.curvature, np.float64), (num_levels, dimension))
        moves = np.broadcast_to(np.asarray(self.moves, bool), (num_levels,))
        steps, scales, share, bends = (jnp.asarray(c, float) for c in (step_size, scale, self.short_share, curvature))
        return Tuning(steps, scales, share, bends, jnp.asarray(moves))


def with_short_steps(step: Step, share: Any) -> Step:
    """``step``, but in that share of the transitions a quarter as long: drawn without looking at the chain."""

    def transition(
        rng_key: jax.Array, chain: Any, target: LogDensity, step_size: jax.Array, inverse_mass: jax.Array
    ) -> tuple[Any, Stats]:
        key_step, key_length = jax.random.split(rng_key)
        short = jax.random.bernoulli(key_length, jnp.asarray(share))
        return step(key_step, chain, target, step_size * jnp.where(short, SHORT_STEP, 1.0), inverse_mass)

    return transition


def gain(i: jax.Array, num_warmup: int) -> jax.Array:
    """γ of the i-th transition: zero once the warm-up is over."""
    return jnp.where(i < num_warmup, (i + 1.0) ** -GAIN_DECAY, 0.0)


def squared_scale(position: Any, widths: Any, prior_variance: Any) -> jax.Array:
    """The inverse mass of each coordinate, flat (D,): the lesser of width² and pooled variance.

    Args:
        position: of all chains, leaves (N, ...).
        widths: of one chain; infinite where there is none.
        prior_variance: of the start; what a coordinate without a width shrinks towards.
    """

    def one(q: jax.Array, width: jax.Array, prior: jax.Array) -> jax.Array:
        n = q.shape[0]
        low, high = jnp.quantile(q, jnp.array(ONE_SIGMA), axis=0)
        pooled = ((high - low) / 2) ** 2
        cap = jnp.where(jnp.isfinite(width), width**2, prior + 1e-12)
        shrunk = (n * pooled + PRIOR_CHAINS * cap) / (n + PRIOR_CHAINS)
        return jnp.where(jnp.isfinite(shrunk), jnp.minimum(shrunk, width**2), cap)

    return ravel_pytree(jax.tree.map(one, position, widths, prior_variance))[0]


def pooled_scale(
    structure: Structure, constants: Constants, position: Any, t: jax.Array, prior_variance: Any
) -> jax.Array:
    """:func:`squared_scale` at level t of a path, for positions of all chains there."""
    widths = structure.widths(constants, jax.tree.map(lambda leaf: leaf[0], position), t)
    return squared_scale(position, widths, prior_variance)


def curvature(gradient: Any) -> jax.Array:
    """E[(∂_i log π)²] = −E[∂_i² log π], flat (D,), from the gradients at all chains, leaves (N, ...).

    By quantiles, as spreads are: a few chains far away count little. Where coordinates differ by no
    more than so few chains let expect, they get their common value.
    """

    def one(g: jax.Array) -> jax.Array:
        low, high = jnp.nanquantile(g, jnp.array(ONE_SIGMA), axis=0)  # a network may have broken somewhere
        logs = 2 * jnp.log(jnp.maximum((high - low) / 2, 1e-12))
        noise = LOG_VARIANCE_NOISE / g.shape[0]
        common = jnp.mean(logs)
        differ = jnp.maximum(jnp.mean((logs - common) ** 2) - noise, 0.0)
        return jnp.exp(common + (logs - common) * differ / (differ + noise))

    return ravel_pytree(jax.tree.map(one, gradient))[0]


def smooth(logs: np.ndarray, over: int = 5) -> np.ndarray:
    """The running median over neighbouring levels of what a pilot found, (K, ...): it varies slowly."""
    padded = np.pad(logs, [(over // 2, over // 2)] + [(0, 0)] * (logs.ndim - 1), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, over, axis=0), -1)
