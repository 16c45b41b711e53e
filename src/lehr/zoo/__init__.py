"""The shipped models: weights with cards, and how to load them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from lehr.checkpoints.load import load_checkpoint
from lehr.checkpoints.native import checkpoint_files, read_card
from lehr.potentials.base import Potential

__all__ = ["load", "zoo"]

_FOLDER = Path(str(files("lehr") / "zoo" / "weights"))


def zoo() -> dict[str, dict[str, Any]]:
    """The shipped models: name to card."""
    return {file.stem: read_card(file) for file in sorted(_FOLDER.glob("*.json"))}


def load(name: str | Path, **options: Any) -> Potential:
    """A pretrained potential: a shipped model by name, or somebody else's by path or by its name on the hub.

    Args:
        name: a name that :func:`zoo` lists; the path of a checkpoint's weights, of its card, or of both
            without a suffix; the path of a diffusers folder; or ``"owner/name"`` on the Hugging Face hub.
        options: for folders of diffusers, those of :func:`lehr.checkpoints.diffusers.read_diffusers`,
            such as ``variant="fp16"``; on the hub also ``revision``.

    Raises:
        FileNotFoundError: if there is no such model or file.
        lehr.CheckpointError: if the weights are damaged or do not fit their card or config.
    """
    shipped = _FOLDER / str(name)
    if Path(name).name == str(name) and checkpoint_files(shipped).card.is_file():
        return load_checkpoint(shipped, **options)
    try:
        return load_checkpoint(name, **options)
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
        raise FileNotFoundError(f"{error} Shipped: {known}.") from error
