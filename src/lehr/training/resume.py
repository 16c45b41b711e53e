"""Checkpoints of a training that goes on: the whole state by Orbax, so that it can be taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

__all__ = ["Keeper"]

T = TypeVar("T")
KEPT = 2  # checkpoints, the last ones


class Keeper:
    """A context that saves a training's state after each chunk, or does nothing without a folder.

    Args:
        folder: where checkpoints lie, or None.
        recipe: what the training is determined by, beside its key and data; of JSON's types.
        rng_key: the training's key.

    Raises:
        ValueError: if the folder holds a training of another recipe or key.
    """

    def __init__(self, folder: str | Path | None, recipe: dict[str, Any], rng_key: jax.Array) -> None:
        self.manager: Any = None
        if folder is None:
            return
        import orbax.checkpoint as ocp  # slow to import, and needed only here

        self.ocp = ocp
        path = Path(folder).resolve()
        path.mkdir(parents=True, exist_ok=True)
        said = json.dumps({**recipe, "key": np.asarray(_key_data(rng_key)).tolist()}, indent=2, sort_keys=True)
        note = path / "recipe.json"
        if note.is_file() and note.read_text() != said:
            raise ValueError(
                f"{path} holds a training by another recipe or key ({note.name} says which). Choose another folder, "
                "or remove this one."
            )
        note.write_text(said)
        self.manager = ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(max_to_keep=KEPT))

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        if self.manager is not None:
            self.manager.wait_until_finished()
            self.manager.close()

    def restore(self, start: T) -> tuple[T, int]:
        """The latest state and its step; ``start`` and 0 if there is none."""
        step = None if self.manager is None else self.manager.latest_step()
        if step is None:
            return start, 0
        leaves, treedef = jax.tree.flatten(start)
        kept = self.manager.restore(step, args=self.ocp.args.StandardRestore(jax.eval_shape(lambda: leaves)))
        return jax.tree.unflatten(treedef, kept), step

    def save(self, step: int, state: Any) -> None:
        """Keep ``state`` as it is after ``step`` steps."""
        if self.manager is not None:
            self.manager.save(step, args=self.ocp.args.StandardSave(jax.tree.leaves(state)))


def _key_data(rng_key: jax.Array) -> jax.Array:
    return jax.random.key_data(rng_key) if jax.dtypes.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else rng_key
