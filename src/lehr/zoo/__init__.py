"""The shipped models: weights with cards, and how to load them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from lehr.checkpoints.native import checkpoint_files, read_card, read_checkpoint
from lehr.potentials.network import EnergyNetwork, ScoreNetwork

__all__ = ["load", "zoo"]

_FOLDER = Path(str(files("lehr") / "zoo" / "weights"))


def zoo() -> dict[str, dict[str, Any]]:
    """The shipped models: name to card."""
    return {file.stem: read_card(file) for file in sorted(_FOLDER.glob("*.json"))}


def load(name: str | Path) -> EnergyNetwork | ScoreNetwork:
    """A pretrained potential: a shipped model by name, or a checkpoint on disk by path.

    Args:
        name: a name that :func:`zoo` lists, or the path of a checkpoint's weights, of its card, or
            of both without a suffix.

    Raises:
        FileNotFoundError: if there is no such model or file.
        lehr.CheckpointError: if the weights are damaged or do not fit their card.
    """
    shipped = _FOLDER / str(name)
    if Path(name).name == str(name) and checkpoint_files(shipped).card.is_file():
        return read_checkpoint(shipped)
    if not any(file.is_file() for file in checkpoint_files(name)):
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
        raise FileNotFoundError(f"no shipped model and no checkpoint named {str(name)!r}. Shipped: {known}.")
    return read_checkpoint(name)
