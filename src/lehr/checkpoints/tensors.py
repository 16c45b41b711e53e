r"""Tensors on disk into the parameters of a module.

A file is a mapping from names to tensors that are read when asked for, one after another,
so that a model is never held twice. Flax names and layouts differ from PyTorch's by

    kernel, scale, embedding ↔ weight,    (k, k, in, out) ↔ (out, in, k, k),    (in, out) ↔ (out, in).

Nothing is taken on trust: names, shapes, types and finiteness are checked against the
module that the config describes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from lehr.checkpoints.errors import CheckpointError
from lehr.checkpoints.torch_file import read_torch

__all__ = ["Tensors", "fill", "read_json", "read_shards", "read_tensors", "shapes_of", "torch_names"]

Tensors = Mapping[str, Callable[[], np.ndarray]]

_M = TypeVar("_M", bound=nnx.Module)
LARGEST_JSON = 50_000_000  # bytes; the index of a thousand shards has one


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        CheckpointError: if there is none.
    """
    if file.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes, too many for a config. Is it the right file?")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object; it holds a {type(content).__name__}.")
    return content


def read_tensors(file: Path) -> Tensors:
    """The tensors of one file: safetensors, or PyTorch's own format by the restricted reader.

    Raises:
        CheckpointError: if it cannot be read as that.
    """
    if file.suffix != ".safetensors":
        content = read_torch(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} must hold named tensors; it holds a {type(content).__name__}.")
        strangers = [str(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, np.ndarray))]
        if strangers:
            raise CheckpointError(
                f"{file} must hold named tensors; {_some(strangers)} is something else. If the weights are one "
                "entry of several, `lehr convert --entry NAME` takes them out."
            )
        return {name: functools.partial(np.asarray, tensor) for name, tensor in content.items()}
    try:
        with safe_open(file, "np") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}); copy it again.") from error

    def get(name: str) -> np.ndarray:
        try:
            with safe_open(file, "np") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"tensor {name!r} of {file} cannot be read ({error}).") from error

    return {name: functools.partial(get, name) for name in names}


def read_shards(index: Path) -> Tensors:
    """The tensors of a model in several files, by the index that says which is where.

    Raises:
        CheckpointError: if the index names files outside its folder, or tensors are not where it says.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files.")
    shards = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names {name!r}: a shard must lie in the folder of its index.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is not there; download it too.")
        shards[name] = read_tensors(index.parent / name)
    lost = [tensor for tensor, file in where.items() if tensor not in shards[file]]
    if lost:
        raise CheckpointError(f"{index} says that {_some(lost)} is in {where[lost[0]]}, but it is not.")
    return {tensor: shards[file][tensor] for tensor, file in where.items()}


def torch_names(state: Any) -> dict[str, tuple[Any, ...]]:
    """The leaves of an NNX state under PyTorch's names, each with its path."""
    leaf_names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    found = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = [str(k) for k in (getattr(p, "key", getattr(p, "name", None)) for p in path) if k not in ("value", None)]
        found[".".join([*keys[:-1], leaf_names.get(keys[-1], keys[-1])])] = path
    return found


def shapes_of(build: Callable[[Any], _M]) -> _M:
    """The module that ``build`` makes of random streams, its parameters known by shape only."""
    return nnx.eval_shape(lambda: build(_OneKey()))


class _OneKey:
    """Random streams that count nothing: for values that are never computed, where counting would be slow."""

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def fill(template: _M, tensors: Tensors, source: Path) -> _M:
    """``template`` with its parameters read from ``tensors``.

    Args:
        template: a module whose parameters are known by shape only, as :func:`shapes_of` makes it.
        tensors: by PyTorch's names and in PyTorch's layouts.
        source: where they come from, for errors.

    Raises:
        CheckpointError: if a tensor is missing or has no place, or has another shape, a type that is
            not floating, or a value that is not finite.
    """
    graphdef, state = nnx.split(template)
    names = torch_names(state)
    lacking, strangers = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    if lacking or strangers:
        raise CheckpointError(
            f"{source} does not fit the network of its config: "
            + "; ".join(
                f"{len(some)} tensors {what}, such as {_some(sorted(some))}"
                for some, what in ((lacking, "are missing"), (strangers, "have no place in it"))
                if some
            )
            + "."
        )
    shapes = jax.tree.leaves(state)
    leaves = [_parameter(name, tensors[name], shape.shape, source) for name, shape in zip(names, shapes, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


def _parameter(name: str, get: Callable[[], np.ndarray], shape: tuple[int, ...], source: Path) -> jax.Array:
    tensor = get()
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise CheckpointError(f"tensor {name!r} of {source} must be floating; it is {tensor.dtype}.")
    found = tensor.shape
    if len(shape) == 2 and len(found) > 2 and set(found[2:]) == {1}:
        tensor = tensor.reshape(found[:2])  # a linear map written as a convolution of size one
    if name.endswith(".weight") and not name.startswith(("class_embedding.weight", "time_proj.")):
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {name!r} of {source} has shape {found}, which does not fit the network of its config."
        )
    if not np.isfinite(tensor.astype(np.float32) if tensor.itemsize < 4 else tensor).all():
        raise CheckpointError(f"tensor {name!r} of {source} holds values that are not finite.")
    return jnp.asarray(tensor, float)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
