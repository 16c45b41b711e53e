"""Parameter trees of Flax: msgpack files and orbax folders, as nested dictionaries of arrays.

They say nothing of the network; give one to :class:`lehr.ScoreNetwork` beside the Flax Linen
module that it belongs to, ``(module, {"params": tree})``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from lehr.checkpoints.errors import CheckpointError

__all__ = ["read_tree"]


def read_tree(path: str | Path) -> dict[str, Any]:
    """The tree at ``path``.

    Args:
        path: a folder that orbax's ``StandardCheckpointer`` wrote, or a file of Flax's ``msgpack_serialize``.

    Raises:
        FileNotFoundError: if there is nothing.
        CheckpointError: if it cannot be read, or holds anything but arrays and numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no parameters at {path}: expected a msgpack file or an orbax folder.")
    tree = _read_orbax(path) if path.is_dir() else _read_msgpack(path)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} must hold a tree of arrays; it holds a {type(tree).__name__}.")
    for where, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, np.ndarray | np.generic | int | float | jax.Array):
            raise CheckpointError(f"{path} holds a {type(leaf).__name__} at {jax.tree_util.keystr(where)}; no array.")
    return tree


def _read_msgpack(file: Path) -> Any:
    try:
        return serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # msgpack's and numpy's errors have no common base
        raise CheckpointError(f"{file} cannot be read as Flax's msgpack ({error}).") from error


def _read_orbax(folder: Path) -> Any:
    from orbax.checkpoint import StandardCheckpointer

    try:
        with StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute())
    except Exception as error:  # orbax raises whatever its backends do
        raise CheckpointError(f"{folder} cannot be read as an orbax checkpoint ({error}).") from error
