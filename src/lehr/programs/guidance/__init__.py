"""How a likelihood meets x_t above the end of the ladder; one strategy a file."""

from lehr.programs.guidance.base import Guidance
from lehr.programs.guidance.raw import Raw
from lehr.programs.guidance.tweedie import Tweedie

__all__ = ["Guidance", "Raw", "Tweedie"]
