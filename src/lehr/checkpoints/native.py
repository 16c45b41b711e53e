r"""lehr's own format: weights in safetensors, and beside them a card in JSON.

``ring.safetensors`` holds the network's arrays by their path in the module;
``ring.json`` says everything else: what the model is and was trained on, how to rebuild
the network, its schedule, shape, scales and noise range, whether it is calibrated, the
licence, and the SHA-256 of the weights. Nothing is ever unpickled. Reading checks the hash,
the tensors' names, shapes and types against the network that the card describes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lehr import schedules
from lehr.checkpoints.errors import CheckpointError
from lehr.networks import NETWORKS
from lehr.potentials.network import EnergyNetwork
from lehr.schedules import Schedule

__all__ = ["CheckpointError", "Files", "checkpoint_files", "read_card", "read_checkpoint", "write_checkpoint"]

FORMAT = "lehr-1"
REQUIRED = (
    "format", "kind", "network", "schedule", "event_shape", "head", "mean", "std", "feature_scale",
    "sigma_range", "calibrated", "sha256",
)  # fmt: skip


class Files(NamedTuple):
    """The two files of a checkpoint."""

    weights: Path
    card: Path


def checkpoint_files(path: str | Path) -> Files:
    """The files meant by ``path``: either of them, or both without a suffix; ``model.v2`` is a name."""
    stem = str(path).removesuffix(".safetensors").removesuffix(".json")
    return Files(Path(stem + ".safetensors"), Path(stem + ".json"))


def write_checkpoint(potential: EnergyNetwork, path: str | Path, network: dict[str, Any], **about: Any) -> Path:
    """Write ``path.safetensors`` and ``path.json``; returns the path of the weights.

    Args:
        potential: what to save.
        path: the file's path, with or without a suffix.
        network: how to rebuild the module: ``{"type": "ResidualMLP", ...keyword arguments}``.
        about: further entries of the card: title, data, licence, figures.
    """
    weights, file = checkpoint_files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.asarray(v) for k, v in _tensors(potential.state).items()}, weights)
    card = {
        "format": FORMAT,
        **about,
        "kind": "energy",
        "network": network,
        "schedule": _describe_schedule(potential.schedule),
        "event_shape": list(potential.event_shape),
        "head": potential.head,
        "density": "log p = Gaussian part - alpha s/sigma (alpha s)^2/v F; no further factor of sigma",
        "mean": np.asarray(potential.mean).tolist(),
        "std": float(potential.std),
        "feature_scale": float(potential.feature_scale),
        "sigma_range": list(potential.sigma_range),
        "calibrated": potential.calibrated,
        "sha256": _hash(weights),
    }
    file.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return weights


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
    missing = [k for k in REQUIRED if k not in card]
    if missing or card["format"] != FORMAT:
        raise CheckpointError(
            f"{file} is not a card of format {FORMAT!r}: "
            + (f"it lacks {', '.join(missing)}." if missing else f"it says {card['format']!r}.")
        )
    return card


def read_checkpoint(path: str | Path) -> EnergyNetwork:
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
    potential = EnergyNetwork(
        _build_network(card["network"]),
        _build_schedule(card["schedule"]),
        tuple(card["event_shape"]),
        head=card["head"],
        mean=np.asarray(card["mean"]),
        std=card["std"],
        feature_scale=card["feature_scale"],
        sigma_range=tuple(card["sigma_range"]),
        calibrated=card["calibrated"],
    )
    expected = _tensors(potential.state)
    differing = [
        f"{name}: card {_shape(expected.get(name))}, file {_shape(tensors.get(name))}"
        for name in sorted(expected.keys() | tensors.keys())
        if _shape(expected.get(name)) != _shape(tensors.get(name))
    ]
    if differing:
        raise CheckpointError(f"{weights} does not fit the network of its card. " + "; ".join(differing[:5]))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(potential.state)
    state = jax.tree.unflatten(treedef, [jnp.asarray(tensors[_name(where)]) for where, _ in leaves])
    object.__setattr__(potential, "state", state)
    return potential


def _tensors(state: nnx.State) -> dict[str, Any]:
    return {_name(where): leaf for where, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


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
