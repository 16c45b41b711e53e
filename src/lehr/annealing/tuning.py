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

from lehr.annealing.keys import per_chain
from lehr.annealing.layout import Layout
from lehr.kernels.base import Kernel, LogDensity, Stats, Step
from lehr.predictions import TINY
from lehr.programs.closure import Constants, Structure

__all__ = ["SHORT_SHARE", "Tuning", "curvature", "gain", "pooled_scale", "smooth", "squared_scale", "with_short_steps"]

PRIOR_CHAINS = 5.0  # how many chains' worth the prior spread counts in the pooled one
GAIN_DECAY = 0.6
SHORT_SHARE, SHORT_STEP = 0.125, 0.25  # which share of transitions take which share of the step
SECANT = 0.3  # of the scale, between the two ends of a secant of the gradient
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
        times: the levels that it was found for, where a pilot has placed them, (K,): a driver that is given the tuning
            and their number takes them.
    """

    step_size: Any
    scale: Any = 1.0
    short_share: Any = 0.0
    curvature: Any = 1.0
    moves: Any = True
    times: Any = None

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


def curvature(
    kernel: Kernel, chains: Any, target: LogDensity, inverse_mass: jax.Array, rng_key: jax.Array, layout: Layout
) -> jax.Array:
    r"""−∂_i² log π at all chains, flat (D,): how fast the gradient turns, by one more gradient for each chain.

    With v of random signs, a part of the scale long, −(∂_i log π(q + v) − ∂_i log π(q))/v_i is that on average, also
    where the chains are not yet distributed as π, unlike the variance of the gradient. What lies beyond the 16 % and
    84 % quantiles over the chains counts as those. Where coordinates of a site differ by no more than so few chains
    let expect, they get their common value. By Cramér and Rao none is less than 1/variance; half is left to chance.

    Args:
        kernel: theirs.
        chains: refreshed states, stacked.
        target: log π.
        inverse_mass: squared scales, (D,).
        rng_key: for the signs.
        layout: where the chains lie.
    """
    n = jax.tree.leaves(chains.position)[0].shape[0]
    scale = jnp.sqrt(inverse_mass)

    def one(chain: Any, key: jax.Array) -> jax.Array:
        here, unravel = ravel_pytree(chain.position)
        way = SECANT * scale * jax.random.rademacher(key, here.shape, here.dtype)
        moved = kernel.refresh(chain._replace(position=unravel(here + way)), target)
        before, after = (ravel_pytree(kernel.gradient(state))[0] for state in (chain, moved))
        return (before - after) / way

    def pooled(bends: jax.Array, least: jax.Array) -> jax.Array:
        clipped = jnp.clip(bends, *jnp.nanquantile(bends, jnp.array(ONE_SIGMA), axis=0))
        mean = jnp.fmax(jnp.nanmean(clipped, 0), least)
        noise = jnp.mean(jnp.fmin(jnp.nanvar(clipped, 0) / (n * mean**2), 1.0))
        logs = jnp.log(mean)
        common = jnp.mean(logs)
        differ = jnp.maximum(jnp.mean((logs - common) ** 2) - noise, 0.0)
        return jnp.exp(common + (logs - common) * differ / (differ + noise + TINY))

    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], chains.position))
    bends = jax.vmap(unravel)(layout.over(one)(chains, per_chain(rng_key, n)))
    return ravel_pytree(jax.tree.map(pooled, bends, unravel(0.5 / inverse_mass)))[0]


def smooth(logs: np.ndarray, over: int = 5) -> np.ndarray:
    """The running median over neighbouring levels of what a pilot found, (K, ...): it varies slowly."""
    padded = np.pad(logs, [(over // 2, over // 2)] + [(0, 0)] * (logs.ndim - 1), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, over, axis=0), -1)
