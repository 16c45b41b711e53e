"""Flax NNX networks, the table by which a card names them, and one face for all networks."""

from lehr.networks.described import Described
from lehr.networks.elementwise import ElementwiseMLP
from lehr.networks.lighten import lighten
from lehr.networks.mixer import PatchMixer
from lehr.networks.mlp import ResidualMLP
from lehr.networks.wrap import Network, wrap

__all__ = ["NETWORKS", "Described", "ElementwiseMLP", "Network", "PatchMixer", "ResidualMLP", "lighten", "wrap"]

NETWORKS: dict[str, type[Described]] = {
    "ElementwiseMLP": ElementwiseMLP,
    "PatchMixer": PatchMixer,
    "ResidualMLP": ResidualMLP,
}
