"""From data to a checkpoint: train, store, normalise and measure what was stored, and write that on the card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lehr.checkpoints.native import read_checkpoint, save
from lehr.potentials.network import EnergyNetwork
from lehr.training.data import DataSet
from lehr.training.dual import Losses
from lehr.training.evaluate import calibration, held_out_losses
from lehr.training.fit import Recipe, fit
from lehr.training.normalise import normalise
from lehr.training.start import suitable_network, untrained_energy, untrained_score

__all__ = ["Making", "produce"]

HELD_OUT = 500  # events on which losses are measured
COMPARED = 250  # events on which an energy is compared with its probability flow: many derivatives each


class Making(NamedTuple):
    """How a model of a data set is made.

    Attributes:
        kind: whether it is an energy or a score.
        recipes: trainings, one after the other.
        sigma_range: the range of σ/α that is trained, in data units.
        levels: σ/α at which held-out losses are taken.
        compared_at: σ/α at which an energy is compared with its probability flow.
        limit: where an energy's correction begins to saturate, see :class:`~lehr.EnergyNetwork`.
    """

    kind: Literal["energy", "score"]
    recipes: tuple[Recipe, ...]
    sigma_range: tuple[float, float]
    levels: tuple[float, ...]
    compared_at: tuple[float, ...] = ()
    limit: float | None = None


def produce(
    name: str,
    data: DataSet,
    making: Making,
    folder: str | Path,
    *,
    seed: int = 0,
    on_chunk: Callable[[int, Losses], None] | None = None,
) -> Path:
    """Train a model of ``data`` and write it with its card; cut off, it goes on when called again.

    Args:
        name: of the files.
        data: events, some held out; if they have labels, an energy learns the classes too.
        making: what to train, and how.
        folder: where the two files go, and the training's checkpoints in a folder beside them.
        seed: of the first weights, the batches and the noise.
        on_chunk: progress, see :func:`lehr.fit`.

    Returns:
        The path of the weights. The figures on the card, and a calibrated energy's normaliser, are those of the
        weights as stored.
    """
    recipes = making.recipes
    if making.kind == "score":  # of all classes together; an energy knows its own range
        data = data._replace(labels=None, held_out_labels=None)
        recipes = tuple(dataclasses.replace(recipe, sigma_range=making.sigma_range) for recipe in recipes)
    potential = _untrained(making, data, seed)
    events: Any = data.events if data.labels is None else (data.events, data.labels)
    for i, recipe in enumerate(recipes):
        key, kept = jax.random.fold_in(jax.random.key(seed), i), Path(folder) / f"{name}.training" / str(i)
        potential = fit(potential, events, key, recipe, folder=kept, on_chunk=on_chunk)
    about: dict[str, Any] = {
        "title": data.title,
        "data": f"{len(data.events)} of {len(data.events) + len(data.held_out)} events, the rest held out",
        "licence": data.licence,
        "classes": data.num_classes,
        "value_range": [float(data.events.min()), float(data.events.max())],
        "sigma_range": list(making.sigma_range),
        "grain": data.grain,
        "training": [dataclasses.asdict(recipe) for recipe in recipes],
        "seed": seed,
    }
    path = save(potential, Path(folder) / name, dtype="float16", **about)
    stored = read_checkpoint(path)
    if isinstance(stored, EnergyNetwork) and stored.is_calibrated:
        stored = normalise(stored, jax.random.key(seed + 2))
    return save(stored, path, dtype="float16", **about, **_measured(stored, making, data, seed))


def _untrained(making: Making, data: DataSet, seed: int) -> Any:
    std = float(np.sqrt(data.events.var(0).mean()))
    alike = making.kind == "energy" and data.grain > 0
    network = suitable_network(data.events.shape[1:], data.num_classes, std, seed, alike=alike)
    finest = 10 * making.sigma_range[0]  # ladders end at a tenth of it
    if making.kind == "score":
        return untrained_score(network, data.events, feature_scale=finest)
    told = {"feature_scale": finest, "sigma_range": making.sigma_range, "limit": making.limit}
    return untrained_energy(network, data.events, data.labels, **told)


def _measured(potential: Any, making: Making, data: DataSet, seed: int) -> dict[str, Any]:
    """What the card says of held-out events."""
    key_losses, key_flow = jax.random.split(jax.random.key(seed + 1))
    events, labels = data.held_out[:HELD_OUT], None if data.held_out_labels is None else data.held_out_labels[:HELD_OUT]
    figures = {"held_out": held_out_losses(potential, events, labels, sigmas=making.levels, rng_key=key_losses)}
    if isinstance(potential, EnergyNetwork) and making.compared_at:
        some = jnp.asarray(data.held_out[:: max(len(data.held_out) // COMPARED, 1)][:COMPARED])
        figures["calibration"] = calibration(potential, some, sigmas=making.compared_at, rng_key=key_flow)
    return figures
