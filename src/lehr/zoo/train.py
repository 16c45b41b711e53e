"""Training what has a name: the shipped models, known data sets, files of events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from lehr.training.data import DATA_SETS, load_data, read_data
from lehr.training.dual import Losses
from lehr.training.fit import Recipe
from lehr.zoo import PREFIX
from lehr.zoo.images import IMAGES
from lehr.zoo.planar import train_planar
from lehr.zoo.produce import Making, produce
from lehr.zoo.targets import TARGETS

__all__ = ["recipe_for", "train"]

DEFAULT = Recipe(num_steps=5000, batch_size=128, learning_rate=1e-3, weighting="likelihood", bound_weight=0.0)
RANGE = (0.05, 10.0)  # of σ/α, in units of the data's standard deviation
LEVELS = (0.1, 0.3, 1.0, 3.0)  # at which held-out losses are taken, in the same units


def train(
    what: str,
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    kind: Literal["energy", "score"] = "energy",
    seed: int = 0,
    on_chunk: Callable[[int, Losses], None] | None = None,
) -> Path:
    """Train a model and write it with its card.

    Args:
        what: ``zoo/`` and the name of a shipped model; the name of a data set, see
            :func:`lehr.training.data.load_data`; or the path of a file, see :func:`lehr.training.data.read_data`.
        folder: where the two files go.
        recipe: length and strength of the training; that of the shipped model, or one that suits, by default.
        kind: what to train on a data set or a file.
        seed: of the first weights, the batches and the noise.
        on_chunk: progress, see :func:`lehr.fit`.

    Returns:
        The path of the weights.

    Raises:
        ValueError: if there is nothing of that name.
    """
    name = what.removeprefix(PREFIX)
    if what.startswith(PREFIX) and name in TARGETS:
        return train_planar(name, folder, recipe, seed=seed, on_chunk=on_chunk)
    if what.startswith(PREFIX) and name in IMAGES:
        making = IMAGES[name] if recipe is None else IMAGES[name]._replace(recipes=(recipe,))
        return produce(name, load_data(name), making, folder, seed=seed, on_chunk=on_chunk)
    if what in DATA_SETS:
        data = load_data(what)
    elif Path(what).suffix in (".npy", ".npz"):
        data = read_data(what)
    else:
        shipped = ", ".join(PREFIX + n for n in (*TARGETS, *IMAGES))
        raise ValueError(
            f"nothing to train on is called {what!r}: give one of {shipped}; "
            f"a data set, {', '.join(DATA_SETS)}; or a file that ends in .npy or .npz."
        )
    std = float(np.sqrt(data.events.var(0).mean()))
    levels, ends = (tuple(std * s for s in sigmas) for sigmas in (LEVELS, RANGE))
    recipe = DEFAULT if recipe is None else recipe
    making = Making(kind, (recipe,), (ends[0], ends[1]), levels)
    return produce(Path(what).stem, data, making, folder, seed=seed, on_chunk=on_chunk)


def recipe_for(what: str) -> Recipe:
    """The recipe that :func:`train` uses by default; the first one where there are several."""
    name = what.removeprefix(PREFIX)
    if what.startswith(PREFIX) and name in IMAGES:
        return IMAGES[name].recipes[0]
    return Recipe() if what.startswith(PREFIX) else DEFAULT
