"""Flax NNX networks, and the table by which a card names them."""

from flax import nnx

from lehr.networks.mlp import ResidualMLP

__all__ = ["NETWORKS", "ResidualMLP"]

NETWORKS: dict[str, type[nnx.Module]] = {"ResidualMLP": ResidualMLP}
