"""Weights without a folder into a folder that :func:`lehr.load` reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lehr.checkpoints.adm import is_adm, translate_adm
from lehr.checkpoints.diffusers import build_unet, parse_config
from lehr.checkpoints.errors import CheckpointError
from lehr.checkpoints.scheduler import read_noise
from lehr.checkpoints.tensors import read_json
from lehr.checkpoints.torch_file import read_torch

__all__ = ["convert"]


def convert(file: str | Path, config: str | Path, folder: str | Path, *, entry: str | None = None) -> Path:
    """Write the weights in ``file`` as a folder of diffusers; nothing is written unless they fit.

    Args:
        file: ``.pt``, ``.pth``, ``.bin`` or ``.safetensors``.
        config: JSON with the flags of guided-diffusion, or ``{"unet": {…}, "scheduler": {…}}`` in diffusers' terms.
        folder: where to, a new folder or an empty one.
        entry: of a file that holds several things, the weights' path in it, as in ``"ema.model"``.

    Returns:
        ``folder``.

    Raises:
        FileNotFoundError: if ``file`` or ``config`` is not there.
        FileExistsError: if ``folder`` is there and not empty.
        lehr.CheckpointError: if the weights do not fit the config.
    """
    file, config, folder = Path(file), Path(config), Path(folder)
    for needed in (file, config):
        if not needed.is_file():
            raise FileNotFoundError(f"no file {needed}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; name a new folder.")
    tensors, described = _weights(file, entry), read_json(config)
    if is_adm(described):
        tensors, unet, scheduler = translate_adm(tensors, described)
    elif described.keys() == {"unet", "scheduler"} and all(isinstance(v, dict) for v in described.values()):
        unet, scheduler = described["unet"], described["scheduler"]
    else:
        raise CheckpointError(
            f'{config} must hold flags of guided-diffusion (num_channels, …), or {{"unet": …, "scheduler": …}} in '
            f"diffusers' terms; it has {', '.join(described) or 'nothing'}."
        )
    read_noise(scheduler)
    build_unet(parse_config(unet, config), {k: functools.partial(np.asarray, v) for k, v in tensors.items()}, file)
    for part, name, content in (("unet", "config", unet), ("scheduler", "scheduler_config", scheduler)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    weights = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def _weights(file: Path, entry: str | None) -> Mapping[str, np.ndarray]:
    content: Any = load_file(file) if file.suffix == ".safetensors" else read_torch(file)
    for key in entry.split(".") if entry else ():
        if not isinstance(content, dict) or key not in content:
            there = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(f"{file} has no entry {key!r}; there is {there:.200}.")
        content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file} holds no named tensors{' at ' + entry if entry else ''}; name them by entry.")
    strangers = [k for k, v in content.items() if not isinstance(v, np.ndarray)]
    if strangers:
        raise CheckpointError(
            f"{file} holds {', '.join(map(str, content)):.200}; name the weights among them by entry."
        )
    distributed = all(str(name).startswith("module.") for name in content)
    return {str(name).removeprefix("module.") if distributed else str(name): v for name, v in content.items()}
