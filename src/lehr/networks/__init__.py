"""Flax NNX networks, and the table by which a card names them."""

from lehr.networks.described import Described
from lehr.networks.mixer import PatchMixer
from lehr.networks.mlp import ResidualMLP

__all__ = ["NETWORKS", "Described", "PatchMixer", "ResidualMLP"]

NETWORKS: dict[str, type[Described]] = {"PatchMixer": PatchMixer, "ResidualMLP": ResidualMLP}
