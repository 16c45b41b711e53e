"""Flax NNX networks, the table by which a card names them, and one face for all networks."""

from flax import nnx

from lehr.networks.mlp import ResidualMLP
from lehr.networks.wrap import Network, wrap

__all__ = ["NETWORKS", "Network", "ResidualMLP", "wrap"]

NETWORKS: dict[str, type[nnx.Module]] = {"ResidualMLP": ResidualMLP}
