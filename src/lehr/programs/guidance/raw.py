r"""L_t(y | x_t) = L(y | x_t): the likelihood reads the noisy x.

Free, and far too sure of itself at high noise: for a Gaussian prior at t = 1 the posterior
precision comes out 11.9 where .94 is right. Serves where the likelihood is weak, and for
likelihoods that were trained on noisy x, such as a classifier of x_t that asks for
:func:`~lehr.current_level`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from lehr.programs.guidance.base import Guidance, Noisy

__all__ = ["Raw"]


@dataclass(frozen=True)
class Raw(Guidance):
    """The likelihood reads x_t itself."""

    uses_score = False

    def log_prob(self, noisy: Noisy) -> jax.Array:
        return noisy.log_prob(noisy.sites(noisy.x, noisy.t))
