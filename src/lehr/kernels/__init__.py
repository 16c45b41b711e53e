"""BlackJAX kernels behind one signature."""

from lehr.kernels.base import Kernel, Stats, refresh
from lehr.kernels.hamiltonian import HMC, MALA, UHMC, ULA

__all__ = ["HMC", "MALA", "UHMC", "ULA", "Kernel", "Stats", "refresh"]
