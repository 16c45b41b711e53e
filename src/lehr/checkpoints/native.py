r"""lehr's own format: weights in safetensors, and beside them a card in JSON.

``ring.safetensors`` holds the network's arrays by their path in the module, and under
``base.`` those of the exact density that an energy corrects;
``ring.json`` says everything else: what the model is and was trained on, how to rebuild
the network, its schedule, shape, scales and noise range, whether it is calibrated, the
licence, and the SHA-256 of the weights. Nothing is ever unpickled. Reading checks the hash,
the tensors' names, shapes and types against the network that the card describes. Weights may be
stored in half precision; they are read as JAX's default floats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lehr import schedules
from lehr.checkpoints.errors import CheckpointError
from lehr.networks import NETWORKS, Described
from lehr.potentials.analytic import ExactPotential, Gaussian, GaussianMixture
from lehr.potentials.base import Potential, from_fields, replace
from lehr.potentials.network import EnergyNetwork
from lehr.potentials.score_network import ScoreNetwork
from lehr.schedules import Schedule

__all__ = ["CheckpointError", "Files", "checkpoint_files", "read_card", "read_checkpoint", "save"]

FORMAT = "lehr-1"
BOTH = ("format", "kind", "network", "schedule", "event_shape", "mean", "std", "feature_scale", "sha256")
REQUIRED = {
    "energy": (*BOTH, "head", "sigma_range", "calibrated"),
    "score": (*BOTH, "prediction", "time_input"),
}
BASES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Gaussian": (Gaussian, ("loc", "stds")),
    "GaussianMixture": (GaussianMixture, ("locs", "stds", "log_weights")),
}


class Files(NamedTuple):
    """The two files of a checkpoint."""

    weights: Path
    card: Path


def checkpoint_files(path: str | Path) -> Files:
    """The files meant by ``path``: either of them, or both without a suffix; ``model.v2`` is a name."""
    stem = str(path).removesuffix(".safetensors").removesuffix(".json")
    return Files(Path(stem + ".safetensors"), Path(stem + ".json"))


def save(
    potential: EnergyNetwork | ScoreNetwork,
    path: str | Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    **about: Any,
) -> Path:
    """Write ``path.safetensors`` and ``path.json``, which :func:`lehr.load` reads.

    Args:
        potential: what to save: an energy or a score whose network is one of lehr's own.
        path: the file's path, with or without a suffix.
        dtype: how the network's weights are stored. Half precision halves the file; measure what is said of
            the model after a round trip.
        about: further entries of the card: title, data, licence, figures, of JSON's types.

    Returns:
        The path of the weights.

    Raises:
        TypeError: for a potential that is no network, or a network that a card cannot describe.
    """
    module = _module(potential)
    weights, file = checkpoint_files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(potential, np.dtype(dtype)), weights)
    card = {
        "format": FORMAT,
        **about,
        "network": {"type": type(module).__name__, **module.arguments()},
        "schedule": _describe_schedule(potential.schedule),
        "event_shape": list(potential.event_shape),
        "mean": _once(potential.mean),
        "std": _once(potential.std),
        "feature_scale": float(potential.feature_scale),
        "stored": dtype,
        **(_energy(potential) if isinstance(potential, EnergyNetwork) else _score(potential)),
        "sha256": _hash(weights),
    }
    file.write_text(_written(card))
    return weights


def _once(value: Any) -> Any:
    """An array as a list, or the one number that it holds everywhere."""
    array = np.asarray(value)
    return array.flat[0].item() if np.all(array == array.flat[0]) else array.tolist()


def _written(card: dict[str, Any]) -> str:
    """A card as people read it: an entry a line, a row of numbers a line."""
    text = json.dumps(card, indent=2, ensure_ascii=False)
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda row: "[" + " ".join(row[0][1:-1].split()) + "]", text) + "\n"


def _energy(potential: EnergyNetwork) -> dict[str, Any]:
    known = potential.log_normalizer
    optional = {
        "log_normalizer": None if known is None else np.asarray(known).round(4).tolist(),
        "limit": potential.limit,
    }
    return {name: value for name, value in optional.items() if value is not None} | {
        "kind": "energy",
        "base": type(potential.base).__name__,
        "head": potential.head,
        "density": "log p = log base - alpha s/sigma (alpha s)^2/v F; no further factor of sigma",
        "sigma_range": list(potential.sigma_range),
        "calibrated": potential.calibrated,
    }


def _score(potential: ScoreNetwork) -> dict[str, Any]:
    return {"kind": "score", "prediction": potential.prediction, "time_input": potential.time_input}


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of the checkpoint at ``path``.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is not a card of this format.
    """
    file = checkpoint_files(path).card
    if not file.is_file():
        raise FileNotFoundError(
            f"no card at {file}: a checkpoint is two files, name.safetensors and name.json. "
            "lehr.zoo() lists the shipped models."
        )
    try:
        card = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); copy the card again.") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{file} is not a card: it holds a {type(card).__name__} in place of named entries.")
    missing = [k for k in REQUIRED.get(str(card.get("kind")), BOTH) if k not in card]
    if missing or card["format"] != FORMAT:
        raise CheckpointError(
            f"{file} is not a card of format {FORMAT!r}: "
            + (f"it lacks {', '.join(missing)}." if missing else f"it says {card['format']!r}.")
        )
    if card["kind"] not in REQUIRED:
        raise CheckpointError(f"{file} is of the unknown kind {card['kind']!r}; expected one of {', '.join(REQUIRED)}.")
    return card


def read_checkpoint(path: str | Path) -> EnergyNetwork | ScoreNetwork:
    """The potential saved at ``path``.

    Args:
        path: the path of either file, or of both without a suffix.

    Raises:
        FileNotFoundError: if the card or the weights are not there.
        CheckpointError: if the weights are truncated, have another hash than the card's, or do
            not fit the network that the card describes.
    """
    card = read_card(path)
    weights = checkpoint_files(path).weights
    if not weights.is_file():
        raise FileNotFoundError(f"the card is there but the weights are not: expected {weights}.")
    found = _hash(weights)
    if found != card["sha256"]:
        raise CheckpointError(
            f"{weights} has SHA-256 {found[:12]}…, its card says {str(card['sha256'])[:12]}…: the file is "
            "truncated or is not the one the card was written for. Copy both again."
        )
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} cannot be read as safetensors ({error}).") from error
    try:
        potential = _build(card, tensors)
    except CheckpointError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint_files(path).card} describes no potential: {error}") from error
    expected = _tensors(potential)
    differing = [
        f"{name}: card {_shape(expected.get(name))}, file {_shape(tensors.get(name))}"
        for name in sorted(expected.keys() | tensors.keys())
        if _shape(expected.get(name)) != _shape(tensors.get(name))
    ]
    if differing:
        raise CheckpointError(f"{weights} does not fit the network of its card. " + "; ".join(differing[:5]))
    unreal = [name for name, array in tensors.items() if not np.all(np.isfinite(array))]
    if unreal:
        raise CheckpointError(f"{weights} holds weights that are not finite: {', '.join(unreal[:5])}.")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(potential.network.params)
    params = jax.tree.unflatten(treedef, [_as_default(tensors[_name(where)]) for where, _ in leaves])
    return replace(potential, network=replace(potential.network, params=params))


def _build(card: dict[str, Any], tensors: dict[str, np.ndarray]) -> EnergyNetwork | ScoreNetwork:
    """The potential of the card, its base from the file, its network with weights of its own yet."""
    network, schedule, shape = _build_network(card["network"]), _build_schedule(card["schedule"]), card["event_shape"]
    scales: dict[str, Any] = {name: np.asarray(card[name]) for name in ("mean", "std", "feature_scale")}
    if card["kind"] == "score":
        told: dict[str, Any] = {name: card[name] for name in ("prediction", "time_input")}
        return ScoreNetwork(network, schedule, tuple(shape), **scales, **told)
    return EnergyNetwork(
        network,
        schedule,
        tuple(shape),
        base=_build_base(card.get("base"), tensors, schedule),
        head=card["head"],
        sigma_range=tuple(card["sigma_range"]),
        calibrated=card["calibrated"],
        limit=card.get("limit"),
        log_normalizer=card.get("log_normalizer"),
        **scales,
    )


def _build_base(kind: str | None, tensors: dict[str, np.ndarray], schedule: Schedule) -> ExactPotential | None:
    """The exact density whose arrays the file has; None, for the Gaussian of mean and std, if it has none."""
    arrays = {name.removeprefix("base."): array for name, array in tensors.items() if name.startswith("base.")}
    if not arrays:
        return None
    if kind not in BASES:
        raise CheckpointError(f"unknown base {kind!r}; this version knows {', '.join(BASES)}.")
    cls, needed = BASES[kind]
    if set(arrays) | {"basis"} != {*needed, "basis"}:
        raise CheckpointError(f"a {kind} as base needs the arrays {', '.join(needed)}; got {', '.join(arrays)}.")
    fields = {"basis": None, **{name: _as_default(array) for name, array in arrays.items()}}
    return from_fields(cls, schedule=schedule, event_shape=arrays[needed[0]].shape[-1:], **fields)


def _module(potential: Potential) -> Described:
    if not isinstance(potential, EnergyNetwork | ScoreNetwork):
        raise TypeError(
            f"only networks are saved, an EnergyNetwork or a ScoreNetwork; got a {type(potential).__name__}."
        )
    module = potential.network.module
    if not isinstance(module, Described) or type(module).__name__ not in NETWORKS:
        raise TypeError(
            f"a card can describe {', '.join(NETWORKS)}; this network is a {type(module).__name__}. Save it by its own "
            "framework's means."
        )
    return module


def _tensors(potential: EnergyNetwork | ScoreNetwork, dtype: Any = None) -> dict[str, np.ndarray]:
    """The arrays of the network and, unless it is the plain Gaussian of mean and std, those of the base."""
    leaves = jax.tree_util.tree_flatten_with_path(potential.network.params)[0]
    tensors = {_name(where): np.asarray(leaf, dtype) for where, leaf in leaves}
    base = getattr(potential, "base", None)
    if base is None or eqx.tree_equal(base, Gaussian(potential.mean.ravel(), potential.std, potential.schedule)):
        return tensors
    if type(base).__name__ not in BASES:
        raise TypeError(f"a checkpoint holds a base of the kinds {', '.join(BASES)}; this is a {type(base).__name__}.")
    fields = {name: getattr(base, name) for name in (*BASES[type(base).__name__][1], "basis")}
    return tensors | {f"base.{name}": np.asarray(array) for name, array in fields.items() if array is not None}


def _as_default(array: np.ndarray) -> jax.Array:
    """Floats in the precision that JAX uses now, whatever they were stored in."""
    return jnp.asarray(array, float) if np.issubdtype(array.dtype, np.floating) else jnp.asarray(array)


def _name(where: tuple[Any, ...]) -> str:
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in where)
    return ".".join(str(k) for k in keys if k not in ("value", None))


def _shape(tensor: Any) -> str:
    """Kind and shape; the precision is the file's, whatever JAX's default is now."""
    return "none" if tensor is None else f"{np.dtype(tensor.dtype).kind}{list(tensor.shape)}"


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _build_network(card: dict[str, Any]) -> nnx.Module:
    arguments: dict[str, Any] = {**card, "rngs": nnx.Rngs(0)}
    kind = arguments.pop("type", None)
    if kind not in NETWORKS:
        raise CheckpointError(f"unknown network type {kind!r}; this version knows {', '.join(NETWORKS)}.")
    try:
        return NETWORKS[kind](**arguments)
    except TypeError as error:
        raise CheckpointError(f"the card's network does not build a {kind}: {error}.") from error


def _describe_schedule(schedule: Schedule) -> dict[str, Any]:
    return {"type": type(schedule).__name__, **dataclasses.asdict(schedule)}  # type: ignore[call-overload]


def _build_schedule(card: dict[str, Any]) -> Schedule:
    arguments = dict(card)
    kind = arguments.pop("type", None)
    if kind not in schedules.__all__ or kind == "Schedule":
        raise CheckpointError(f"unknown schedule {kind!r}; this version knows {', '.join(schedules.__all__)}.")
    return getattr(schedules, kind)(**arguments)
