r"""L_t(y | x_t) = L(y | x̂₀(x_t)): the likelihood reads the denoised x.

For one diffusion model x̂₀ = (x + σ² s)/α = E[x₀ | x_t] (Tweedie's formula). A product of
models with total weight W counts the noise W times: far up, π_t is close to
N(x; α m, σ²/W), so the noise that x_t really carries on this path has variance σ²/W, and

    x̂₀ = (x + σ² s/W)/α,

the average of the members' denoised x with their weights. With W = 1 (one model, a
contrast, classifier-free guidance) the two are the same; with W = 2 the plain formula
would put x̂₀ at −x/α.

References:
    Efron, Tweedie's formula and selection bias, JASA 2011.
    Chung et al., Diffusion posterior sampling for general noisy inverse problems, ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from lehr.programs.guidance.base import Guidance, Noisy

__all__ = ["Tweedie"]


@dataclass(frozen=True)
class Tweedie(Guidance):
    """The likelihood reads E[x₀ | x_t]; costs a second derivative of an energy."""

    def log_prob(self, noisy: Noisy) -> jax.Array:
        return noisy.log_prob(noisy.read_clean())
