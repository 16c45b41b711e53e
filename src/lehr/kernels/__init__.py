"""BlackJAX kernels behind one signature."""

from lehr.kernels.barker import Barker
from lehr.kernels.base import Kernel, State, Stats
from lehr.kernels.hamiltonian import GHMC, HMC, MALA, NUTS, UHMC, ULA
from lehr.kernels.line_integral import line_integral
from lehr.kernels.mclmc import MCLMC

__all__ = ["GHMC", "HMC", "MALA", "MCLMC", "NUTS", "UHMC", "ULA", "Barker", "Kernel", "State", "Stats", "line_integral"]
