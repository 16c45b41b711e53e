"""Checkpoints of work that goes on: the whole state by Orbax, so that it can be taken up again.

A folder holds one piece of work. What determines it stands in ``work.json`` beside the checkpoints, and work that
differs is refused, with what differs. A checkpoint appears whole or not at all: one that was being written when
its process was killed is passed over, and the one before it serves.

Several processes keep one state together, each its own part of it; the first of them writes the note.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["Keeper"]

T = TypeVar("T")
KEPT = 2  # checkpoints, the last ones
NOTE = "work.json"


class Keeper:
    """A context that saves a state now and then, or does nothing without a folder.

    Args:
        folder: where checkpoints lie, or None.
        facts: what the work is determined by, by name, in JSON's types.

    Raises:
        ValueError: if the folder holds work that these facts do not determine.
    """

    def __init__(self, folder: str | Path | None, facts: dict[str, Any]) -> None:
        self.manager: Any = None
        if folder is None:
            return
        import orbax.checkpoint as ocp  # slow to import, and needed only here

        self.ocp = ocp
        path = Path(folder).resolve()
        facts = json.loads(json.dumps(facts))
        _check(path, facts)
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0 and not (path / NOTE).is_file():
            draft = path / (NOTE + ".draft")
            draft.write_text(json.dumps(facts, indent=2, sort_keys=True))
            draft.replace(path / NOTE)
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(path, options=options)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        if self.manager is not None:
            self.manager.wait_until_finished()
            self.manager.close()

    @property
    def step(self) -> int | None:
        """How far the work is that is kept; None if nothing is."""
        return None if self.manager is None else self.manager.latest_step()

    def restore(self, like: T) -> T:
        """The latest state that is kept.

        Args:
            like: one of the same structure, of arrays or of ``jax.ShapeDtypeStruct``, laid out as it is to be.
        """
        leaves, treedef = jax.tree.flatten(like)
        wanted = [self.ocp.utils.to_shape_dtype_struct(leaf) for leaf in leaves if leaf.size]
        kept = iter(self.manager.restore(self.step, args=self.ocp.args.StandardRestore(wanted)))
        return jax.tree.unflatten(treedef, [next(kept) if x.size else jnp.zeros(x.shape, x.dtype) for x in leaves])

    def save(self, step: int, state: Any) -> None:
        """Keep ``state`` as it is after ``step`` steps; returns once it is copied, and writes it meanwhile."""
        if self.manager is not None:
            leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size]  # Orbax refuses empty arrays
            self.manager.save(step, args=self.ocp.args.StandardSave(leaves))


def _check(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder that holds other work."""
    note = folder / NOTE
    if not note.is_file():
        return
    try:
        kept = json.loads(note.read_text())
    except json.JSONDecodeError:
        raise ValueError(f"{note} cannot be read; remove {folder}, or choose another folder.") from None
    names = [name for name in {**kept, **facts} if kept.get(name) != facts.get(name)]
    if names:
        differ = "; ".join(
            f"{name} is {_short(kept.get(name))} there, {_short(facts.get(name))} here" for name in names
        )
        raise ValueError(
            f"{folder} holds other work than this: {differ}. Choose another folder, or remove that one, or ask "
            "for what it holds."
        )


def _short(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 60 else said[:57] + "..."
