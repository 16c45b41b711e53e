"""Folders of diffusers from the Hugging Face hub, or from its cache on this machine."""

from __future__ import annotations

from pathlib import Path

__all__ = ["fetch"]

CONFIGS = ["*.json"]


def fetch(name: str, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a model, downloaded unless the hub's cache has it. Nothing in it is run.

    Args:
        name: ``"owner/name"``.
        revision: branch, tag or commit; the main branch by default.
        variant: of the weights, so that others are not downloaded.

    Raises:
        ImportError: if huggingface-hub is not installed.
        FileNotFoundError: if there is no such model, or it can neither be reached nor is in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not on this disk; to look for it on the Hugging Face hub, pip install 'lehr[hub]'."
        ) from error
    names = f"diffusion_pytorch_model.{variant}" if variant not in (None, "ema") else "diffusion_pytorch_model"
    parts = ("unet_ema/", "unet/", "") if variant == "ema" else ("unet/", "")
    try:
        for suffix in ("*.safetensors", "*.bin"):  # the second only if the first is not there
            weights = [f"{part}{names}{suffix}" for part in parts]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGS + weights))
            if any(folder.glob(f"**/{names}{suffix}")):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no shipped model, no file and no model of the hub named {name!r} ({error})."
        ) from error
    return folder
