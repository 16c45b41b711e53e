"""What a strategy is asked: what shall stand for x₀ where a likelihood reads x."""

from __future__ import annotations

import abc

import jax

__all__ = ["Guidance"]


class Guidance(abc.ABC):
    """How the sites that are not diffusions read x_t on the way down.

    A strategy shapes the road only: at the end of the ladder every site reads x itself.
    """

    uses_score: bool = True

    @abc.abstractmethod
    def estimate(
        self, x: jax.Array, score: jax.Array, copies: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> jax.Array:
        """What a likelihood reads in place of x.

        Args:
            x: x_t.
            score: ∇ log Π_i p_i,t^{w_i} at x_t, of the shape of ``x``.
            copies: how often the noise is counted at each coordinate, Σ w_i over the factors
                that see it; of the shape of ``x``, 1 for a single model.
            alpha: α_t.
            sigma: σ_t.
        """
