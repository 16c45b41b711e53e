"""The command line: ``lehr demo``, ``lehr train zoo/ring``, ``lehr zoo``, ``lehr convert file.pt``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from lehr.training.dual import Losses

__all__ = ["main"]


def _demo(folder: Path = Path("out"), num_particles: int = 2000, seed: int = 0) -> None:
    """Compose two pretrained energies, add data, sample, and compare with the exact answers.

    Args:
        folder: where the netCDF files and pictures go.
        num_particles: particles of each run.
        seed: of each run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from lehr.demo import demo

    demo(folder, num_particles=num_particles, seed=seed)


def _train(
    what: Annotated[str, tyro.conf.Positional],
    folder: Path = Path("out/zoo"),
    kind: Literal["energy", "score"] = "energy",
    num_steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
) -> None:
    """Train a shipped model anew, or a model of a data set or of your own events.

    A training that was cut off goes on when it is called again with the same arguments.

    Args:
        what: a shipped model such as zoo/ring (`lehr zoo` lists them); a data set: digits, mnist or fashion; or a
            file, .npy with events along the first axis, or .npz with arrays events and, if there are classes, labels.
        folder: where the weights, the card and the training's checkpoints go.
        kind: what to train on a data set or a file.
        num_steps: optimiser steps; by default as shipped, or what suits.
        batch_size: events a step, likewise.
        learning_rate: the peak rate, likewise.
        seed: of the first weights, the batches and the noise.
    """
    from lehr.zoo.train import recipe_for, train

    asked = {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    recipe = dataclasses.replace(recipe_for(what), **changes) if changes else None
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=(recipe or recipe_for(what)).num_steps)

        def on_chunk(steps: int, losses: Losses) -> None:
            said = "  ".join(f"{name} {loss:.3f}" for name, loss in losses._asdict().items() if loss)
            bar.update(task, completed=steps, description=f"{what}  {steps} steps  {said}")

        path = train(what, folder, recipe, kind=kind, seed=seed, on_chunk=on_chunk)
    Console().print(f"Written: {path} and its card {path.with_suffix('.json').name}")


def _zoo() -> None:
    """List the shipped models, what they are, and how far off each was found."""
    from lehr.zoo import zoo

    Console().print(zoo().table())


def _convert(
    file: Annotated[Path, tyro.conf.Positional],
    config: Path,
    folder: Path = Path("out/converted"),
    entry: str | None = None,
) -> None:
    """Write the weights in a PyTorch file as a folder that lehr.load reads; nothing in the file is run.

    Args:
        file: .pt, .pth, .bin or .safetensors.
        config: JSON with the flags of guided-diffusion, or {"unet": ..., "scheduler": ...} of diffusers.
        folder: where to.
        entry: of a file that holds several things, the path of the weights in it, as in ema.model.
    """
    from lehr.checkpoints.convert import convert

    Console().print(f'Written: {convert(file, config, folder, entry=entry)}; lehr.load("{folder}") reads it')


def main() -> None:
    """Entry point of the ``lehr`` command."""
    tyro.extras.subcommand_cli_from_dict(
        {"convert": _convert, "demo": _demo, "train": _train, "zoo": _zoo}, description=__doc__
    )
