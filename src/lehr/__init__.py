"""lehr: diffusion-model energies as parts of probabilistic programs.

Pretrained diffusion models are time-indexed potentials; NumPyro declares how they combine
with each other and with likelihoods; BlackJAX kernels sample the result down an annealing
ladder; ArviZ tells whether to believe it.
"""

import numpyro  # noqa: F401  # whole, before any part: ArviZ 1.x leaves a lazy NumPyro behind, whose parts load twice

from lehr.annealing.drivers import AnnealedMCMC, AnnealedSMC, Reverse
from lehr.annealing.evidence import Evidence, evidence
from lehr.annealing.exchange import ReplicaExchange
from lehr.annealing.ladder import Ladder
from lehr.annealing.predictors import Restart
from lehr.annealing.progress import ProgressMeter
from lehr.annealing.run import Run
from lehr.annealing.tuning import Tuning
from lehr.checkpoints.native import CheckpointError, save
from lehr.diagnostics.calibration import Calibration, sbc
from lehr.diagnostics.tree import from_netcdf
from lehr.kernels import GHMC, HMC, MALA, MCLMC, NUTS, UHMC, ULA, Barker, Kernel
from lehr.likelihood import LogLikelihood, log_likelihood
from lehr.networks.lighten import lighten
from lehr.potentials.analytic import ExactPotential, Gaussian, GaussianMixture, Uniform
from lehr.potentials.base import EnergyPotential, Potential, ScorePotential
from lehr.potentials.contrast import Contrast
from lehr.potentials.mixture import Mixture
from lehr.potentials.network import EnergyNetwork
from lehr.potentials.product import Power, Product
from lehr.potentials.region import Region
from lehr.potentials.reschedule import with_schedule
from lehr.potentials.score_network import ScoreNetwork
from lehr.programs import guidance
from lehr.programs.diffusion import Diffusion, current_level, noise_level
from lehr.programs.path import Path
from lehr.schedules import VE, DiscreteSchedule, RectifiedFlow, Schedule, VPCosine, VPLinear
from lehr.training.fit import Recipe, fit
from lehr.zoo import load, zoo

__all__ = [
    "GHMC",
    "HMC",
    "MALA",
    "MCLMC",
    "NUTS",
    "UHMC",
    "ULA",
    "VE",
    "AnnealedMCMC",
    "AnnealedSMC",
    "Barker",
    "Calibration",
    "CheckpointError",
    "Contrast",
    "Diffusion",
    "DiscreteSchedule",
    "EnergyNetwork",
    "EnergyPotential",
    "Evidence",
    "ExactPotential",
    "Gaussian",
    "GaussianMixture",
    "Kernel",
    "Ladder",
    "LogLikelihood",
    "Mixture",
    "Path",
    "Potential",
    "Power",
    "Product",
    "ProgressMeter",
    "Recipe",
    "RectifiedFlow",
    "Region",
    "ReplicaExchange",
    "Restart",
    "Reverse",
    "Run",
    "Schedule",
    "ScoreNetwork",
    "ScorePotential",
    "Tuning",
    "Uniform",
    "VPCosine",
    "VPLinear",
    "current_level",
    "evidence",
    "fit",
    "from_netcdf",
    "guidance",
    "lighten",
    "load",
    "log_likelihood",
    "noise_level",
    "save",
    "sbc",
    "with_schedule",
    "zoo",
]
