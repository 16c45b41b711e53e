"""How a likelihood meets x_t above the end of the ladder; one strategy a file."""

from lehr.programs.guidance.annealed import Annealed
from lehr.programs.guidance.base import Guidance, Noisy
from lehr.programs.guidance.moment_matching import MomentMatching
from lehr.programs.guidance.raw import Raw
from lehr.programs.guidance.tweedie import Tweedie

__all__ = ["Annealed", "Guidance", "MomentMatching", "Noisy", "Raw", "Tweedie"]
