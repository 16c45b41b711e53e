"""The command line: ``lehr demo``, ``lehr train zoo/ring``, ``lehr zoo``, ``lehr convert file.pt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

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
    model: Annotated[str, tyro.conf.Positional],
    folder: Path = Path("out/zoo"),
    num_steps: int | None = None,
    seed: int = 0,
) -> None:
    """Train a shipped model anew, from samples of its data.

    Args:
        model: its name, as in ``zoo/ring``; ``lehr zoo`` lists them.
        folder: where the weights and the card go.
        num_steps: optimiser steps; as shipped by default.
        seed: of the first weights and of the data.
    """
    from lehr.training.dual import Losses
    from lehr.training.fit import Recipe
    from lehr.zoo.train import train

    recipe = Recipe() if num_steps is None else Recipe(num_steps=num_steps)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(model, total=recipe.num_steps)

        def on_chunk(steps: int, losses: Losses) -> None:
            bar.update(task, completed=steps, description=f"{model}  score {losses.score:.3f}  time {losses.time:.3f}")

        path = train(model.removeprefix("zoo/"), folder, recipe, seed=seed, on_chunk=on_chunk)
    Console().print(f"Written: {path} and its card {path.with_suffix('.json').name}")


def _zoo() -> None:
    """List the shipped models, and how far each is from the density it was trained on."""
    from lehr.zoo import zoo

    table = Table("name", "what it is", "shape", "calibrated", "log p error at σ = .01, .1, 1")
    for name, card in zoo().items():
        errors = {e["sigma"]: f"{e['mean']:+.3f} ± {e['spread']:.3f}" for e in card["log_density_error"]}
        row = (name, card["title"], str(tuple(card["event_shape"])), "yes" if card["calibrated"] else "no")
        table.add_row(*row, "  ".join(errors[s] for s in (0.01, 0.1, 1.0)))
    Console().print(table)


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
