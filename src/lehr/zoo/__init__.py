"""The shipped models: weights with cards, and how to load them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from lehr.checkpoints.load import load_checkpoint
from lehr.checkpoints.native import checkpoint_files, read_card
from lehr.potentials.base import Potential

__all__ = ["PREFIX", "Zoo", "load", "zoo"]

PREFIX = "zoo/"  # of names, where those of data sets and files are meant too
WIDTH = 160  # characters of the table
_FOLDER = Path(str(files("lehr") / "zoo" / "weights"))


class Zoo(dict[str, dict[str, Any]]):
    """Names to cards, shown as a table."""

    def table(self) -> Table:
        """What each model is, and how far off it was found."""
        table = Table(Column("name", no_wrap=True), "what it is", "kind", "events", "σ/α", "measured")
        for name, card in self.items():
            kind = f"calibrated {card['kind']}" if card.get("calibrated") else card["kind"]
            shape = " × ".join(map(str, card["event_shape"]))
            events = f"{shape}, {card['classes']} classes" if card.get("classes") else shape
            sigmas = " … ".join(f"{s:g}" for s in card["sigma_range"]) if "sigma_range" in card else ""
            table.add_row(name, card["title"], kind, events, sigmas, _measured(card))
        return table

    def __repr__(self) -> str:
        console = Console(width=WIDTH)
        with console.capture() as shown:
            console.print(self.table())
        return shown.get()


def zoo() -> Zoo:
    """The shipped models: name to card; printed as a table."""
    return Zoo({file.stem: read_card(file) for file in sorted(_FOLDER.glob("*.json"))})


def _measured(card: dict[str, Any]) -> str:
    """One figure of the card in words, at the level nearest to σ/α = .3."""
    for entry, words in (("log_density_error", "log p − exact"), ("calibration", "log p − flow")):
        if entry in card:
            at = min(card[entry], key=lambda figure: abs(figure["sigma"] - 0.3))
            return f"{words} at {at['sigma']:g}: {at['mean']:+.3f} ± {at['spread']:.3f}"
    if "held_out" in card:
        at = min(card["held_out"], key=lambda figure: abs(figure["sigma"] - 0.3))
        return f"error of ε̂ at {at['sigma']:g}: {at['error']:.3f}"
    return ""


def load(name: str | Path, **options: Any) -> Potential:
    """A pretrained potential: a shipped model by name, or somebody else's by path or by its name on the hub.

    Args:
        name: a name that :func:`zoo` lists, with or without ``zoo/``; the path of a checkpoint's weights, of its
            card, or of both without a suffix; the path of a diffusers folder; or ``"owner/name"`` on the Hugging Face
            hub.
        options: for folders of diffusers, those of :func:`lehr.checkpoints.diffusers.read_diffusers`,
            such as ``variant="fp16"``; on the hub also ``revision``.

    Raises:
        FileNotFoundError: if there is no such model or file.
        lehr.CheckpointError: if the weights are damaged or do not fit their card or config.
    """
    on_disk = any(file.is_file() for file in checkpoint_files(name))
    stem = str(name) if on_disk else str(name).removeprefix(PREFIX)
    shipped = _FOLDER / stem
    if Path(stem).name == stem and checkpoint_files(shipped).card.is_file():
        return load_checkpoint(shipped, **options)
    try:
        return load_checkpoint(name, **options)
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
        raise FileNotFoundError(f"{error} Shipped: {known}.") from error
