"""A checkpoint by where it is: on disk in any of the known formats, or on the Hugging Face hub by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lehr.checkpoints.diffusers import is_diffusers, read_diffusers
from lehr.checkpoints.hub import fetch
from lehr.checkpoints.native import checkpoint_files, read_checkpoint
from lehr.potentials.base import Potential

__all__ = ["load_checkpoint"]


def load_checkpoint(where: str | Path, **options: Any) -> Potential:
    """The potential at ``where``.

    Args:
        where: a checkpoint of lehr's own, a folder of diffusers, or ``"owner/name"`` on the hub.
        options: of :func:`lehr.checkpoints.diffusers.read_diffusers`; on the hub also ``revision``.

    Raises:
        FileNotFoundError: if there is nothing.
        TypeError: for options that the format does not have.
        lehr.CheckpointError: if it is damaged, or not what it says.
    """
    if any(file.is_file() for file in checkpoint_files(where)):
        if options:
            raise TypeError(f"a checkpoint of lehr's own says everything itself; got {', '.join(options)}.")
        return read_checkpoint(where)
    if Path(where).is_dir():
        if is_diffusers(Path(where)):
            return read_diffusers(Path(where), **options)
        raise FileNotFoundError(f"the folder {where} holds no checkpoint: no model_index.json and no config.json.")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(where)):
        folder = fetch(str(where), revision=options.pop("revision", None), variant=options.get("variant"))
        return read_diffusers(folder, **options)
    raise FileNotFoundError(f"no checkpoint at {str(where)!r}.")
