r"""Training a potential on samples: Adam on a score matching loss, with an averaged network.

Energies are trained by dual score matching (:mod:`lehr.training.dual`), scores by denoising
score matching (:mod:`lehr.training.denoising`); the losses are counted per dimension,

    energy:   score/d + time_weight · time/2d + bound_weight · bound/2d,      score:   error/d,

2d being the variance of the time loss's target. The averaged weights are what is kept: an
exponential moving average filters the noise that those targets leave in the iterates.

Step i draws its batch and its noise from a key folded from (key, i), and nothing else is
random, so a training that is cut off and taken up again from its checkpoint ends in the
same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import ArrayLike

from lehr.keeper import Keeper
from lehr.networks import Network
from lehr.potentials.base import Potential, ScorePotential, replace
from lehr.potentials.network import EnergyNetwork
from lehr.training.data import Sampler, as_sampler
from lehr.training.denoising import WEIGHTINGS, Weighting, denoising_score_matching
from lehr.training.dual import Losses, dual_score_matching

__all__ = ["Recipe", "average", "drop_labels", "fit"]

P = TypeVar("P", bound=Potential)
WARMUP = 0.02  # of all steps, in which the learning rate rises to its peak


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how hard to train.

    Args:
        num_steps: optimiser steps.
        batch_size: events a step.
        learning_rate: peak rate of Adam; it falls to zero along a cosine.
        ema_decay: decay of the average of the weights.
        weighting: how noise levels are weighed: ``"uniform"``, each alike in the units of what is regressed,
            or ``"likelihood"``, by what they contribute to the bound on the log likelihood.
        time_weight: weight of an energy's time loss beside its score loss; the energy is calibrated if positive.
        bound_weight: weight of the bound on the time derivative, away from the data.
        weight_decay: what each step takes off the weights, in units of the learning rate; for data so few that
            a network might learn them by heart.
        neighbours: if positive, each event is moved along the line to one of so many of its nearest
            (:mod:`lehr.training.spread`); for such data as well.
        reach: how far at most, in units of the way there: towards it or away from it.
        label_dropout: the share of events whose class is hidden, which trains the null label.
        sigma_range: the range of σ/α that a score is trained on; an energy has its own.

    Raises:
        ValueError: for counts, rates, weights or shares that make no sense.
    """

    num_steps: int = 12_000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    ema_decay: float = 0.999
    weighting: Weighting = "uniform"
    time_weight: float = 0.6
    bound_weight: float = 0.2
    weight_decay: float = 0.0
    neighbours: int = 0
    reach: float = 0.5
    label_dropout: float = 0.2
    sigma_range: tuple[float, float] = (2e-3, 20.0)

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(
                "a recipe needs num_steps >= 1, batch_size >= 1 and learning_rate > 0; got "
                f"{self.num_steps=}, {self.batch_size=}, {self.learning_rate=}."
            )
        if not (0 <= self.ema_decay < 1 and 0 <= self.label_dropout <= 1):
            raise ValueError(
                f"ema_decay lies in [0, 1) and label_dropout in [0, 1]; got {self.ema_decay=}, {self.label_dropout=}."
            )
        if min(self.time_weight, self.bound_weight, self.weight_decay) < 0:
            raise ValueError(
                f"weights are not negative; got {self.time_weight=}, {self.bound_weight=}, {self.weight_decay=}."
            )
        if self.neighbours < 0 or self.reach <= 0:
            raise ValueError(
                f"neighbours must be 0, for none, or more, and reach positive; got {self.neighbours=}, {self.reach=}."
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {self.weighting!r}; expected one of {', '.join(WEIGHTINGS)}.")
        if not 0 < self.sigma_range[0] < self.sigma_range[1]:
            raise ValueError(f"sigma_range must be 0 < low < high; got {self.sigma_range}.")


class Progress(NamedTuple):
    """What a training carries from step to step."""

    params: Any
    average: Any
    optimiser: optax.OptState


def fit(
    potential: P,
    data: Sampler | ArrayLike | tuple[ArrayLike, ArrayLike],
    rng_key: jax.Array,
    recipe: Recipe | None = None,
    *,
    folder: str | Path | None = None,
    chunk: int = 250,
    on_chunk: Callable[[int, Losses], None] | None = None,
) -> P:
    """Train an energy or a score on data.

    Args:
        potential: the untrained (or pretrained) network. Its mean and std should be the data's.
        data: events x₀, shape (N, *event_shape), drawn from with replacement; a pair of events and their
            labels, shape (N,), for a network with classes; or a function ``data(key, n)`` that draws n
            events, or n events and n labels.
        rng_key: a JAX key.
        recipe: length and strength of the training; ``Recipe()`` by default.
        folder: where to keep checkpoints, one after each chunk. If it holds some of the same training, that
            goes on where it stopped.
        chunk: steps between two reports.
        on_chunk: called with (steps done, mean losses) after each chunk.

    Returns:
        The potential with averaged weights; an energy is calibrated if the time loss had any weight.

    Raises:
        TypeError: if the potential is not a network.
        ValueError: if the events or labels do not fit the potential, or the folder holds another training.
        FloatingPointError: if the loss stops being finite.
    """
    recipe = Recipe() if recipe is None else recipe
    num_classes = getattr(potential, "num_classes", 0) or 0
    sampler = as_sampler(data, potential.event_shape, num_classes, recipe.batch_size, recipe.neighbours, recipe.reach)
    params, fixed = eqx.partition(potential, trainable(potential))
    adam = optax.adamw(learning_rates(recipe), weight_decay=recipe.weight_decay)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), adam)

    def step(progress: Progress, i: jax.Array) -> tuple[Progress, jax.Array]:
        key_data, key_noise, key_labels = jax.random.split(jax.random.fold_in(rng_key, i), 3)
        events, labels = sampler(key_data, recipe.batch_size)
        if labels is not None:
            labels = drop_labels(key_labels, labels, num_classes, recipe.label_dropout)

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            return batch_loss(eqx.combine(params, fixed), key_noise, events, labels, recipe)

        gradient, losses = jax.grad(loss, has_aux=True)(progress.params)
        updates, state = optimiser.update(gradient, progress.optimiser, progress.params)
        params = optax.apply_updates(progress.params, updates)
        return Progress(params, average(progress.average, params, i, recipe.ema_decay), state), losses

    run_chunk = jax.jit(lambda progress, steps: jax.lax.scan(step, progress, steps))
    progress, done = Progress(params, params, optimiser.init(params)), 0
    seed = np.asarray(jax.random.key_data(rng_key)).tolist()
    with Keeper(folder, {**dataclasses.asdict(recipe), "chunk": chunk, "seed": seed}) as keeper:
        if keeper.step is not None:
            progress, done = keeper.restore(progress), keeper.step
        for start in range(done, recipe.num_steps, chunk):
            stop = min(start + chunk, recipe.num_steps)
            progress, losses = run_chunk(progress, jnp.arange(start, stop))
            means = np.mean(np.asarray(losses), 0)
            if not np.all(np.isfinite(means)):
                raise FloatingPointError(
                    f"the loss is no longer finite after {stop} steps; lower recipe.learning_rate."
                )
            keeper.save(stop, progress)
            if on_chunk is not None:
                on_chunk(stop, Losses(*means))
    trained: Any = eqx.combine(progress.average, fixed)
    if isinstance(trained, EnergyNetwork):
        trained = replace(trained, calibrated=recipe.time_weight > 0)
    return trained


def batch_loss(
    potential: Potential, rng_key: jax.Array, events: jax.Array, labels: jax.Array | None, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
    """The loss of one batch, and its parts as in :class:`~lehr.training.dual.Losses`."""
    d = math.prod(potential.event_shape)
    if isinstance(potential, EnergyNetwork):
        losses = dual_score_matching(
            potential, rng_key, events, labels, weighting=recipe.weighting, with_bound=recipe.bound_weight > 0
        )
        total = losses.score / d + (recipe.time_weight * losses.time + recipe.bound_weight * losses.bound) / (2 * d)
        return total, jnp.stack(losses)
    assert isinstance(potential, ScorePotential)
    error = denoising_score_matching(
        potential, rng_key, events, labels, sigma_range=recipe.sigma_range, weighting=recipe.weighting
    )
    return error / d, jnp.stack(Losses(error, jnp.zeros(()), jnp.zeros(())))


def average(mean: Any, params: Any, i: jax.Array, decay: float) -> Any:
    """The moving average of the weights after step i = 0, 1, …: m ← δ m + (1 − δ) θ.

    δ rises as (1 + i)/(10 + i) to ``decay``, so that the first weights are soon forgotten.
    """
    return optax.incremental_update(params, mean, 1 - jnp.minimum(decay, (1 + i) / (10 + i)))


def drop_labels(rng_key: jax.Array, labels: jax.Array, num_classes: int, share: float) -> jax.Array:
    """``labels`` with a random ``share`` of them replaced by the null label K = ``num_classes``."""
    return jnp.where(jax.random.bernoulli(rng_key, share, labels.shape), num_classes, labels)


def learning_rates(recipe: Recipe) -> optax.Schedule:
    """A short linear rise to the peak, then a cosine down to zero."""
    warmup = int(WARMUP * recipe.num_steps)
    return optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup, recipe.num_steps)


def trainable(potential: Potential) -> Any:
    """Which leaves of a network potential are trained: a tree of booleans.

    Of a Flax NNX network the ``Param`` variables are; of others every array of floats.

    Raises:
        TypeError: if the potential is not made of one network.
    """
    network = getattr(potential, "network", None)
    if not isinstance(network, Network):
        raise TypeError(
            f"only networks are trained, an EnergyNetwork or a ScoreNetwork; got a {type(potential).__name__}."
        )

    def of_network(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            return jax.tree.map(lambda _: isinstance(leaf, nnx.Param), leaf)
        return eqx.is_inexact_array(leaf)

    weights = jax.tree.map(of_network, network, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    nothing = jax.tree.map(lambda _: False, potential)
    return eqx.tree_at(lambda p: p.network, nothing, weights)
