r"""Training an energy on samples: Adam on dual score matching, with an averaged network.

The averaged weights are what is kept: an exponential moving average filters the noise that
the time loss, whose target has variance 2d, leaves in the iterates. Training runs in
jitted chunks, so that progress can be shown and a training cut short still has an average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lehr.potentials.base import replace
from lehr.potentials.network import EnergyNetwork
from lehr.training.dual import Losses, dual_score_matching

__all__ = ["Recipe", "fit"]

Sampler = Callable[[jax.Array, int], jax.Array]


class Recipe(NamedTuple):
    """How long and how hard to train.

    Attributes:
        num_steps: optimiser steps.
        batch_size: events a step.
        learning_rate: peak rate of Adam; it falls to zero along a cosine.
        time_weight: weight of the time loss beside the score loss.
        bound_weight: weight of the bound on the time derivative, away from the data.
        ema_decay: decay of the average of the weights.
    """

    num_steps: int = 12_000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    time_weight: float = 0.3
    bound_weight: float = 0.1
    ema_decay: float = 0.999


class _Progress(NamedTuple):
    params: nnx.State
    average: nnx.State
    optimiser: optax.OptState


def fit(
    potential: EnergyNetwork,
    sampler: Sampler,
    rng_key: jax.Array,
    recipe: Recipe | None = None,
    *,
    chunk: int = 250,
    on_chunk: Callable[[int, Losses], None] | None = None,
) -> EnergyNetwork:
    """Train an energy network by dual score matching; the result is calibrated.

    Args:
        potential: the untrained (or pretrained) energy. Its mean and std should be the data's.
        sampler: ``sampler(key, n)`` draws n events x₀, shape (n, *event_shape).
        rng_key: a JAX key.
        recipe: length and strength of the training; ``Recipe()`` by default.
        chunk: steps between two reports.
        on_chunk: called with (steps done, mean losses) after each chunk.

    Returns:
        The potential with averaged weights, calibrated if the time loss had any weight.

    Raises:
        ValueError: if the sampler's events do not have the potential's shape.
        FloatingPointError: if the loss stops being finite.
    """
    recipe = Recipe() if recipe is None else recipe
    events = jax.eval_shape(lambda key: sampler(key, recipe.batch_size), rng_key)
    if events.shape != (recipe.batch_size, *potential.event_shape):
        raise ValueError(
            f"the sampler must draw events of shape (n, {', '.join(map(str, potential.event_shape))}); "
            f"asked for n = {recipe.batch_size} it gave {events.shape}."
        )
    params, fixed = nnx.split_state(potential.state, nnx.Param, ...)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, recipe.num_steps)),
    )

    def with_params(params: nnx.State) -> EnergyNetwork:
        return eqx.tree_at(lambda p: p.state, potential, nnx.merge_state(params, fixed))

    def step(progress: _Progress, i: jax.Array) -> tuple[_Progress, jax.Array]:
        key_data, key_noise = jax.random.split(jax.random.fold_in(rng_key, i))
        data = sampler(key_data, recipe.batch_size)

        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            losses = dual_score_matching(with_params(params), key_noise, data)
            return losses.score + recipe.time_weight * losses.time + recipe.bound_weight * losses.bound, jnp.stack(
                losses
            )

        gradient, losses = jax.grad(loss, has_aux=True)(progress.params)
        updates, state = optimiser.update(gradient, progress.optimiser, progress.params)
        params = optax.apply_updates(progress.params, updates)
        decay = jnp.minimum(recipe.ema_decay, (1 + i) / (10 + i))
        return _Progress(params, optax.incremental_update(params, progress.average, 1 - decay), state), losses

    run_chunk = jax.jit(lambda progress, steps: jax.lax.scan(step, progress, steps))
    progress = _Progress(params, params, optimiser.init(params))
    for start in range(0, recipe.num_steps, chunk):
        stop = min(start + chunk, recipe.num_steps)
        progress, losses = run_chunk(progress, jnp.arange(start, stop))
        means = np.mean(np.asarray(losses), 0)
        if not np.all(np.isfinite(means)):
            raise FloatingPointError(f"the loss is no longer finite after {stop} steps; lower recipe.learning_rate.")
        if on_chunk is not None:
            on_chunk(stop, Losses(*means))
    return replace(with_params(progress.average), calibrated=recipe.time_weight > 0)
