r"""Folders of diffusers: an unconditional or class-conditional ``UNet2DModel`` and its scheduler.

    folder/  unet/config.json                              or, in older ones, all of it in the folder itself
             unet/diffusion_pytorch_model.safetensors      or .bin, or shards with an index
             scheduler/scheduler_config.json

The weights may come in variants, ``diffusion_pytorch_model.fp16.safetensors``, and the
exponential moving average of training in a folder ``unet_ema``. Events keep the
checkpoint's own shape (channels, height, width), one channel included: it is what the config
says, what pictures of the model are saved as, and what ``lehr.Region`` cuts.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from lehr.checkpoints.errors import CheckpointError
from lehr.checkpoints.scheduler import read_noise
from lehr.checkpoints.tensors import Tensors, fill, read_json, read_shards, read_tensors, shapes_of
from lehr.networks.unet import UNet
from lehr.networks.unet_config import UNetConfig
from lehr.potentials.score_network import ScoreNetwork

__all__ = ["build_unet", "is_diffusers", "parse_config", "read_diffusers", "read_unet"]

STEM = "diffusion_pytorch_model"
# What a folder of averaged weights adds to the config.
AVERAGING = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_diffusers(folder: Path) -> bool:
    """Whether ``folder`` looks like one of diffusers, complete or not."""
    names = ("model_index.json", "config.json", "unet", "unet_ema", "scheduler", "scheduler_config.json")
    return folder.is_dir() and any((folder / name).exists() for name in names)


def read_diffusers(
    folder: Path,
    *,
    variant: str | None = None,
    mean: ArrayLike = 0.0,
    std: ArrayLike = 0.5,
    feature_scale: ArrayLike | None = None,
) -> ScoreNetwork:
    """The score of a folder's model.

    Args:
        folder: as diffusers saves a pipeline, or an older one with all files at its root.
        variant: which weights: ``"ema"`` for ``unet_ema``, and any, such as ``"fp16"``, for files named so.
        mean: the data's mean, () or event-shaped, in data units; checkpoints do not say it.
        std: the data's standard deviation, () or event-shaped, in data units. One half is that of common
            pictures in [−1, 1].
        feature_scale: standard deviation of the data's finest feature; defaults to the least ``std``.

    Raises:
        FileNotFoundError: if a file that belongs to it is missing.
        lehr.CheckpointError: naming it, for an option that is not supported, or weights that do not fit.
    """
    unet = _unet_folder(folder, variant)
    scheduler = next(
        (f for f in (folder / "scheduler/scheduler_config.json", folder / "scheduler_config.json") if f.is_file()), None
    )
    if scheduler is None:
        raise FileNotFoundError(
            f"{folder} has no scheduler/scheduler_config.json, and so no noise schedule; put there the one that "
            "the network was trained with."
        )
    noise = read_noise(read_json(scheduler))
    network = read_unet(unet, variant)
    config = network.config
    if config.time_embedding_type == "fourier" and noise.time_input != "sigma":
        raise CheckpointError(f"a fourier embedding is told σ, but the scheduler of {folder} counts steps.")
    num_classes = config.num_class_embeds
    if config.class_embed_type == "timestep" and num_classes is None:
        raise CheckpointError(f"{unet} embeds labels as times and does not say num_class_embeds, how many there are.")
    try:
        event_shape = config.event_shape
    except ValueError as error:
        raise CheckpointError(f"{unet / 'config.json'}: {error}") from error
    return ScoreNetwork(
        network,
        noise.schedule,
        event_shape,
        prediction=noise.prediction,
        time_input=noise.time_input,
        num_classes=num_classes,
        mean=mean,
        std=std,
        feature_scale=feature_scale,
    )


def read_unet(folder: Path, variant: str | None = None) -> UNet:
    """The U-Net of a folder that holds its ``config.json`` and its weights.

    Args:
        folder: ``unet`` of a pipeline.
        variant: of the weights.

    Raises:
        FileNotFoundError: if there are no weights.
        lehr.CheckpointError: naming it, for an option that is not supported, or weights that do not fit.
    """
    file = folder / "config.json"
    return build_unet(parse_config(read_json(file), file), _weights(folder, variant), folder)


def build_unet(config: UNetConfig, tensors: Tensors, source: Path) -> UNet:
    """The U-Net of ``config`` with its parameters from ``tensors``.

    Args:
        config: its structure.
        tensors: in diffusers' names, of now or of old.
        source: where they come from, for errors.

    Raises:
        lehr.CheckpointError: if they do not fit.
    """
    resnets = len(config.block_out_channels) * (2 * config.layers_per_block + 1)
    if resnets > len(tensors):
        raise CheckpointError(f"the config of {source} asks for {resnets} blocks; there are {len(tensors)} tensors.")
    modern = {_modern(name): get for name, get in tensors.items()}
    return fill(shapes_of(lambda rngs: UNet(config, rngs=rngs)), modern, source)


def parse_config(stated: dict[str, Any], source: Path) -> UNetConfig:
    """The structure that a U-Net's config describes.

    Args:
        stated: the content of its ``config.json``.
        source: the file, for errors.

    Raises:
        lehr.CheckpointError: naming it, for a class, a key or a value that is not supported.
    """
    kind = stated.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{source} describes a {kind!r}; what can be loaded is a 'UNet2DModel'.")
    stated = {k: v for k, v in stated.items() if not k.startswith("_") and k not in AVERAGING}
    for blocks in ("down_block_types", "up_block_types"):
        if isinstance(stated.get(blocks), list):
            stated[blocks] = [str(block).removeprefix("UNetRes") for block in stated[blocks]]
    unknown = sorted(stated.keys() - {field.name for field in dataclasses.fields(UNetConfig)})
    if unknown:
        raise CheckpointError(f"{source} has unknown keys: {', '.join(unknown)}.")
    try:
        return UNetConfig(**stated)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _unet_folder(folder: Path, variant: str | None) -> Path:
    places = [folder / "unet", folder]
    if variant == "ema":
        places.insert(0, folder / "unet_ema")
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"{folder} has no unet/config.json, and no config.json of its own: which network is it?")


def _weights(folder: Path, variant: str | None) -> Tensors:
    """The tensors in ``folder``: safetensors before .bin, one file before shards, the variant before none."""
    names = []
    for middle in (f".{variant}", "") if variant == "ema" else (f".{variant}",) if variant else ("",):
        for kind in ("safetensors", "bin"):
            names += [f"{STEM}{middle}.{kind}", f"{STEM}.{kind}.index{middle}.json"]
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"a variant is a word, such as 'fp16' or 'ema'; got {variant!r}.")
    for name in names:
        if (folder / name).is_file():
            return (read_shards if name.endswith(".json") else read_tensors)(folder / name)
    there = ", ".join(sorted(file.name for file in folder.glob(f"{STEM}*"))) or "nothing of the kind"
    raise FileNotFoundError(
        f"{folder} has no {' nor '.join(names[::2])}; there is {there}. A variant goes by variant=."
    )


def _modern(name: str) -> str:
    """A tensor's name as of now: older attention had names of its own."""
    parts: list[Any] = name.split(".")
    if len(parts) > 2 and "attentions" in parts:
        parts[-2] = OLD_ATTENTION.get(parts[-2], parts[-2])
    return ".".join(parts)
