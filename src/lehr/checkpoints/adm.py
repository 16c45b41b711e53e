r"""Guided-diffusion's U-Nets (ADM, and improved-diffusion before it) as diffusers'.

Their files hold weights only; the structure is in the flags that the scripts are called
with. Both are the same network, so that it is enough to rename: a block's place in
``input_blocks`` and ``output_blocks`` becomes a resolution and a number. Attention has one
matrix for (q, k, v), whose rows are ordered by head first, (head, qkv, channel), or with
``use_new_attention_order`` by (qkv, head, channel).

References:
    Dhariwal & Nichol, Diffusion models beat GANs on image synthesis, NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lehr.checkpoints.errors import CheckpointError
from lehr.networks.unet_config import UNetConfig

__all__ = ["is_adm", "translate_adm"]

FLAGS: dict[str, Any] = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "channel_mult": "", "num_heads": 4,
    "num_head_channels": -1, "num_heads_upsample": -1, "attention_resolutions": "16,8", "dropout": 0.0,
    "class_cond": False, "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False,
    "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear", "predict_xstart": False,
    "rescale_timesteps": False,
}  # fmt: skip
# Flags of training and sampling.
UNREAD = {"use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas", "sigma_small"}
MULTIPLIERS = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
GROUPS = 32
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip


def is_adm(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` holds flags of guided-diffusion."""
    return "num_channels" in config


def translate_adm(
    tensors: Mapping[str, np.ndarray], flags: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Weights, network config and scheduler config in diffusers' terms.

    Args:
        tensors: a state dict of guided-diffusion's ``UNetModel``.
        flags: what its scripts were called with, by name; those not named have the scripts' defaults.

    Raises:
        CheckpointError: naming it, for an unknown flag, one that has no counterpart, or an unknown tensor.
    """
    unknown = sorted(flags.keys() - FLAGS.keys() - UNREAD)
    if unknown:
        raise CheckpointError(f"unknown flags: {', '.join(unknown)}; expected those of guided-diffusion.")
    said = {**FLAGS, **{k: v for k, v in flags.items() if k in FLAGS}}
    try:
        network = _network(said, tensors)
        config = UNetConfig(**{k: v for k, v in network.items() if k != "_class_name"})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the flags describe no network: {error}") from error
    places = {**ENDS, **dict(_places(config))}
    translated: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        block, leaf = _split(name, places)
        if leaf.startswith("qkv."):
            heads = tensor.shape[0] // 3 // config.head_channels(tensor.shape[0] // 3)
            for part, rows in zip("qkv", _unmix(tensor, heads, said["use_new_attention_order"]), strict=True):
                translated[f"{block}.to_{part}.{leaf.removeprefix('qkv.')}"] = rows
        else:
            translated[f"{block}.{leaf}"] = tensor
    return translated, network, _scheduler(said)


def _network(said: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    size, width = int(said["image_size"]), int(said["num_channels"])
    multipliers = said["channel_mult"] or MULTIPLIERS.get(size, ())
    if isinstance(multipliers, str):
        multipliers = [float(m) for m in multipliers.split(",")]
    if not multipliers or multipliers[0] != 1:
        raise ValueError(f"channel_mult must begin with 1; got {multipliers!r} for image_size {size}.")
    if said["num_heads_upsample"] not in (-1, said["num_heads"]):
        raise ValueError("num_heads_upsample other than num_heads is not supported.")
    resolutions = said["attention_resolutions"]
    listed = resolutions.split(",") if isinstance(resolutions, str) else resolutions
    attends = [size >> level in {int(r) for r in listed} for level in range(len(multipliers))]
    updown = bool(said["resblock_updown"])
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if updown else ("DownBlock2D", "UpBlock2D")
    by_heads = int(said["num_head_channels"]) == -1
    labels = tensors.get("label_emb.weight")
    if bool(said["class_cond"]) != (labels is not None):
        raise ValueError(f"class_cond is {said['class_cond']}, but label_emb is {'not ' * (labels is None)}there.")
    return {
        "_class_name": "UNet2DModel",
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 6 if said["learn_sigma"] else 3,
        "block_out_channels": [int(m * width) for m in multipliers],
        "layers_per_block": int(said["num_res_blocks"]),
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attends)],
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "attention_head_dim": None if by_heads else int(said["num_head_channels"]),
        **({"num_attention_heads": int(said["num_heads"])} if by_heads else {}),
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if said["use_scale_shift_norm"] else "default",
        "num_class_embeds": None if labels is None else int(labels.shape[0]),
        "dropout": float(said["dropout"]),
    }


def _scheduler(said: dict[str, Any]) -> dict[str, Any]:
    steps = int(said["diffusion_steps"])
    if said["rescale_timesteps"] and steps != 1000:
        raise CheckpointError(
            "rescale_timesteps is supported with diffusion_steps of 1000 only, where it does nothing."
        )
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    if said["noise_schedule"] not in schedules:
        raise CheckpointError(f"noise_schedule {said['noise_schedule']!r} is not supported: linear or cosine.")
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": schedules[said["noise_schedule"]],
        "beta_start": 0.1 / steps,
        "beta_end": 20.0 / steps,
        "num_train_timesteps": steps,
        "prediction_type": "sample" if said["predict_xstart"] else "epsilon",
    }


def _places(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Where each module of ADM stands in the other's terms."""
    levels = len(config.block_out_channels)
    number = 1
    for level, kind in enumerate(config.down_block_types):
        here = f"down_blocks.{level}"
        for i in range(config.layers_per_block):
            yield f"input_blocks.{number}.0", f"{here}.resnets.{i}"
            if kind.startswith("Attn"):
                yield f"input_blocks.{number}.1", f"{here}.attentions.{i}"
            number += 1
        if level < levels - 1:
            yield f"input_blocks.{number}.0", f"{here}.downsamplers.0"
            number += 1
    for i, place in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{i}", f"mid_block.{place}"
    number = 0
    for level, kind in enumerate(config.up_block_types):
        here, attends = f"up_blocks.{level}", kind.startswith("Attn")
        for i in range(config.layers_per_block + 1):
            yield f"output_blocks.{number}.0", f"{here}.resnets.{i}"
            if attends:
                yield f"output_blocks.{number}.1", f"{here}.attentions.{i}"
            if i == config.layers_per_block and level < levels - 1:
                yield f"output_blocks.{number}.{1 + attends}", f"{here}.upsamplers.0"
            number += 1


def _split(name: str, places: Mapping[str, str]) -> tuple[str, str]:
    """The block of a tensor in the other's terms, and the rest of its name there."""
    parts = name.split(".")
    for length in (3, 2, 1):
        block, rest = ".".join(parts[:length]), ".".join(parts[length:])
        if block in places:
            for was, now in RESNET.items():
                if rest.startswith(was + "."):
                    return places[block], now + rest.removeprefix(was)
            for was, now in (("norm.", "group_norm."), ("proj_out.", "to_out.0."), ("op.", "conv.")):
                if rest.startswith(was):
                    return places[block], now + rest.removeprefix(was)
            return places[block], rest
    raise CheckpointError(f"tensor {name!r} has no place in the network that the flags describe.")


def _unmix(tensor: np.ndarray, heads: int, new_order: bool) -> Iterator[np.ndarray]:
    """The rows of q, of k and of v, each ordered by (head, channel)."""
    rest = tensor.shape[1:]
    if new_order:
        yield from tensor.reshape(3, -1, *rest)
    else:
        by_head = tensor.reshape(heads, 3, -1, *rest)
        yield from (by_head[:, i].reshape(-1, *rest) for i in range(3))
