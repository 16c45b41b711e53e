r"""L_t(y | x_t) = L̃_t(y | x_t)^{λ_t}: another strategy's likelihood, switched on by degrees.

    λ_t = (α²/(α² + σ²))^r

is the signal's share in x_t, raised to a power: next to nothing far up, one at the end of the
ladder. A likelihood that is sharp against the prior then comes in over many levels, instead of
within the few in which the denoiser makes up its mind. Priors of ordinary latents keep their
whole weight at every level.

References:
    Neal, Annealed importance sampling, Statistics and Computing 2001.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

from lehr.programs.guidance.base import Guidance, Noisy, Site
from lehr.programs.guidance.tweedie import Tweedie

__all__ = ["Annealed"]


@dataclass(frozen=True)
class Annealed(Guidance):
    """Another strategy with an exponent on the likelihood.

    Args:
        strategy: how the likelihood reads x_t; Tweedie by default.
        rate: r > 0, how late it comes in.

    Raises:
        ValueError: if the rate is not positive.
    """

    strategy: Guidance = field(default_factory=Tweedie)
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"Annealed needs a positive rate; got {self.rate!r}. Leave it out for no exponent.")

    @property
    def uses_score(self) -> bool:  # type: ignore[override]
        return self.strategy.uses_score

    def log_prob(self, noisy: Noisy) -> jax.Array:
        def latent(x: dict[str, jax.Array], t: jax.Array) -> list[Site]:
            return [site for site in noisy.sites(x, t) if not site["is_observed"]]

        everything = self.strategy.log_prob(noisy)
        prior = self.strategy.log_prob(noisy._replace(sites=latent))
        return prior + noisy.share**self.rate * (everything - prior)

    def check(self, site: Site) -> None:
        self.strategy.check(site)
