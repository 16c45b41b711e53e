r"""What a strategy is shown of a level, and what it is asked: log L_t(y, θ | x_t).

Above the end of the ladder the sites that are not diffusions cannot read x₀, which nobody knows
there. A strategy says what they read instead. It shapes the road only: at the end of the ladder
``denoised`` is x itself, ``gain`` is zero and ``share`` is one, so that each strategy is the
user's own joint density there.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Guidance", "Noisy"]

Position = dict[str, jax.Array]
Site = dict[str, Any]


class Noisy(NamedTuple):
    """x_t, as the sites that are not diffusions meet it.

    Attributes:
        x: x_t, by site.
        denoised: x̂₀(x_t), by site; x_t itself for a strategy that uses no score.
        denoise: the function x ↦ x̂₀(x) at this level.
        gain: σ²/(α W), by site and coordinate, with W the number of times that the noise is counted
            there: what makes a covariance of the denoiser's derivative.
        share: α²/(α² + σ²), the signal's share in x_t: a scalar.
        t: the level of x_t.
        end: the level of what is denoised: the end of the ladder.
        sites: (x, t) ↦ the sites to be weighed, as the model has them when x_t is x and its level t.
        log_prob: Σ log p over sites, with the log-Jacobians of the latent ones.
    """

    x: Position
    denoised: Position
    denoise: Callable[[Position], Position]
    gain: Position
    share: jax.Array
    t: jax.Array
    end: jax.Array
    sites: Callable[[Position, jax.Array], list[Site]]
    log_prob: Callable[[Iterable[Site]], jax.Array]

    def spread(self) -> Callable[[Position], Position]:
        """The linear map v ↦ Cov[x₀ | x_t] v of things shaped as ``x``."""
        _, tangent = jax.linearize(self.denoise, self.x)
        return lambda v: jax.tree.map(jnp.multiply, self.gain, tangent(v))

    def read_clean(self, x: Position | None = None) -> list[Site]:
        """The sites as the model has them at the denoised x, or at another clean one."""
        return self.sites(self.denoised if x is None else x, self.end)


class Guidance(abc.ABC):
    """How the sites that are not diffusions read x_t on the way down: a frozen dataclass, hashable,
    whose fields are structure.

    Attributes:
        uses_score: False for one that reads ``noisy.x`` and asks no model for its score, by ``denoised`` or
            ``denoise``. That spares a gradient of the prior, and reverse steps may look at it wherever they go.
    """

    uses_score: bool = True

    @abc.abstractmethod
    def log_prob(self, noisy: Noisy) -> jax.Array:
        """Σ over ``noisy.sites`` of what stands for log p(θ) + log L(y | x₀, θ) at this level, a scalar."""

    def check(self, site: Site) -> None:  # noqa: B027
        """Refuse an observed site that the strategy cannot read, by a ValueError."""
