"""The shipped models of planar densities: how they are trained, and measured against the exact ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lehr.checkpoints.native import save
from lehr.networks import ResidualMLP
from lehr.potentials.analytic import ExactPotential
from lehr.potentials.network import EnergyNetwork
from lehr.training.dual import Losses
from lehr.training.fit import Recipe, fit
from lehr.zoo.targets import target

__all__ = ["LEVELS", "density_error", "train_planar"]

LEVELS = (0.002, 0.01, 0.03, 0.1, 0.3, 1.0)
SIGMA_RANGE = (0.002, 20.0)
NETWORK: dict[str, Any] = {"num_inputs": 2, "width": 128, "num_blocks": 3, "num_frequencies": 32, "bandwidth": 0.35}


def train_planar(
    name: str,
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    on_chunk: Callable[[int, Losses], None] | None = None,
) -> Path:
    """Train one of the planar models from samples and write it with its card.

    Args:
        name: the model's name, as in :data:`lehr.zoo.targets.TARGETS`.
        folder: where the two files go.
        recipe: length and strength of the training; ``Recipe()`` by default. The cards of the shipped
            models say which they had.
        seed: of the network's first weights and of the data.
        on_chunk: progress, see :func:`lehr.training.fit.fit`.

    Returns:
        The path of the weights.

    Raises:
        ValueError: for an unknown name.
    """
    goal, recipe = target(name), Recipe() if recipe is None else recipe
    key_data, key_train, key_test = jax.random.split(jax.random.key(seed), 3)
    draws = goal.exact.sample(key_data, 0.0, (50_000,))
    untrained = EnergyNetwork(
        ResidualMLP(**NETWORK, rngs=nnx.Rngs(seed)),
        event_shape=goal.exact.event_shape,
        mean=jnp.mean(draws, 0),
        std=jnp.sqrt(jnp.mean(jnp.var(draws, 0))),
        feature_scale=goal.feature_scale,
        sigma_range=SIGMA_RANGE,
    )
    started = time.monotonic()
    trained = fit(untrained, lambda key, n: goal.exact.sample(key, 0.0, (n,)), key_train, recipe, on_chunk=on_chunk)
    return save(
        trained,
        Path(folder) / name,
        title=goal.title,
        data="exact draws of the density named in the title; no third-party data",
        licence="Apache-2.0",
        training={**dataclasses.asdict(recipe), "loss": "dual score matching", "seed": seed},
        training_seconds=round(time.monotonic() - started),
        log_density_error=density_error(trained, goal.exact, key_test),
    )


def density_error(
    model: EnergyNetwork, exact: ExactPotential, rng_key: jax.Array, n: int = 2000
) -> list[dict[str, float]]:
    """Mean and spread of log p_model − log p_exact at several noise levels, over n exact draws each.

    A mean of zero says that the energy is normalised; a spread of zero that it has the right shape.
    """
    figures = []
    for i, sigma in enumerate(LEVELS):
        t = exact.schedule.time(-2 * jnp.log(sigma))
        x = exact.sample(jax.random.fold_in(rng_key, i), t, (n,))
        p, q = (jax.vmap(potential.log_density, (0, None))(x, t) for potential in (model, exact))
        error = np.asarray(p - q)
        figures.append({"sigma": sigma, "mean": round(float(error.mean()), 4), "spread": round(float(error.std()), 4)})
    return figures
