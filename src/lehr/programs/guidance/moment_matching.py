r"""L_t(y | x_t) = N(y; g(x̂₀), Σ + J C Jᵀ): the likelihood knows how uncertain x̂₀ is.

For Normal observations y ~ N(g(x₀, θ), Σ) of any differentiable view g of x. Given x_t, x₀ has
mean x̂₀ and covariance

    C = σ²/(α W) ∂x̂₀/∂x_t

(W = 1 for one diffusion model; see :mod:`~lehr.programs.guidance.tweedie`). Taken as a Gaussian
and pushed through J = ∂g/∂x₀ at x̂₀, it adds J C Jᵀ to the covariance of the observation. For a
Gaussian prior and a linear g this is p(y | x_t) itself, at every level. Several observations are
taken jointly: knowing one tells something of x₀, and so of the other.

Nothing of the size of x is ever a matrix. Up to :attr:`~MomentMatching.dense` observed numbers
J C Jᵀ is written out, one pull and push for each; above, Σ + J C Jᵀ is inverted by conjugate
gradients, and its determinant taken from its diagonal, which fixed random signs estimate. That
shapes the road only. Gradients hold C still: forces that ask for no third derivative of the
energy, under a density that a Metropolis test sees whole.

References:
    Boys et al., Tweedie moment projected diffusions for inverse problems, TMLR 2024.
    Rozet et al., Learning diffusion priors from observations by expectation maximization, NeurIPS 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpyro.distributions as dist
from numpyro.distributions import ExpandedDistribution, Independent, MaskedDistribution

from lehr.programs.diffusion import base
from lehr.programs.guidance.base import Guidance, Noisy, Site

__all__ = ["MomentMatching"]

PROBES = 8  # random signs that estimate the diagonal of J C Jᵀ


@dataclass(frozen=True)
class MomentMatching(Guidance):
    """Normal likelihoods read E[x₀ | x_t] and widen by Cov[x₀ | x_t]; other latents' priors read E[x₀ | x_t].

    Args:
        dense: up to how many observed numbers J C Jᵀ is a matrix; each costs one derivative of the denoiser.
        max_steps: of conjugate gradients, above; each costs one derivative of the denoiser.

    Raises:
        ValueError: when the path is bound, if an observed site is not Normal.
    """

    dense: int = 64
    max_steps: int = 16

    def log_prob(self, noisy: Noisy) -> jax.Array:
        sites = noisy.read_clean()
        # what handlers.scale weighs is weighed by itself: a power of a joint density has no parts
        joint = [site for site in sites if site["is_observed"] and site["scale"] is None]
        alone = [[site] for site in sites if site["is_observed"] and site["scale"] is not None]
        total = noisy.log_prob(site for site in sites if not site["is_observed"])
        for group in (joint, *alone):
            if group:
                scale = group[0]["scale"]
                total += (1.0 if scale is None else scale) * self._observed(noisy, group)
        return total

    def check(self, site: Site) -> None:
        if site["is_observed"] and not isinstance(base(site["fn"]), dist.Normal):
            raise ValueError(
                f"MomentMatching is for Normal observations, and the site {site['name']!r} is a "
                f"{type(base(site['fn'])).__name__}. Give it another strategy, for instance "
                f"guidance={{{site['name']!r}: lehr.guidance.Tweedie()}} with MomentMatching under the other names."
            )

    def _observed(self, noisy: Noisy, group: list[Site]) -> jax.Array:
        names = [site["name"] for site in group]
        seen = _flat(group, _is_seen)

        def mean(x: dict[str, jax.Array]) -> jax.Array:
            found = {site["name"]: site for site in noisy.read_clean(x)}
            return seen * _flat([found[name] for name in names], lambda site: site["fn"].mean)

        loc, push = jax.linearize(mean, noisy.denoised)
        pull = jax.linear_transpose(push, noisy.denoised)
        covariance = noisy.spread()

        def spread(v: jax.Array) -> jax.Array:
            return push(covariance(pull(v)[0]))

        variance = jnp.where(seen, _flat(group, lambda site: site["fn"].variance), 1.0)
        away = seen * _flat(group, lambda site: site["value"]) - loc
        widened = self._dense if away.size <= self.dense else self._iterative
        return widened(away, variance, spread) - jnp.sum(seen) * math.log(2 * math.pi) / 2

    def _dense(self, away: jax.Array, variance: jax.Array, spread: Callable[[Any], Any]) -> jax.Array:
        """−½ rᵀ (Σ + M)⁻¹ r − ½ log |Σ + M|, M held still and kept positive."""
        matrix = jax.lax.stop_gradient(jax.vmap(spread)(jnp.eye(away.size)))
        values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
        # not by @, whose batches XLA gives to a pool of threads on CPU, which now and then never returns
        matrix = jnp.sum(vectors[:, None] * vectors * jnp.maximum(values, 0.0), -1)
        root = jnp.linalg.cholesky(matrix + jnp.diag(variance))
        whitened = jax.scipy.linalg.solve_triangular(root, away, lower=True)
        return -jnp.sum(whitened**2) / 2 - jnp.sum(jnp.log(jnp.diagonal(root)))

    def _iterative(self, away: jax.Array, variance: jax.Array, spread: Callable[[Any], Any]) -> jax.Array:
        """The same, by w = (Σ + M)⁻¹ r held still: 2 wᵀr − wᵀ(Σ + M)w has its value and its derivative."""
        shape = jax.ShapeDtypeStruct(away.shape, away.dtype)
        operator = lx.FunctionLinearOperator(
            lambda v: variance * v + spread(v), shape, tags=lx.positive_semidefinite_tag
        )
        solver = lx.CG(rtol=1e-4, atol=1e-6, max_steps=self.max_steps)
        solution = jax.lax.stop_gradient(lx.linear_solve(operator, away, solver, throw=False).value)
        square = 2 * jnp.vdot(solution, away) - jnp.vdot(solution, variance * solution)
        square -= jax.lax.stop_gradient(jnp.vdot(solution, spread(solution)))
        signs = jax.random.rademacher(jax.random.key(0), (PROBES, away.size), away.dtype)
        diagonal = jax.lax.stop_gradient(jnp.mean(signs * jax.vmap(spread)(signs), 0))
        return -square / 2 - jnp.sum(jnp.log(variance + jnp.maximum(diagonal, 0.0))) / 2


def _is_seen(site: Site) -> jax.Array:
    """Which of a site's numbers are not masked."""
    seen, fn = jnp.ones(()), site["fn"]
    while isinstance(fn, ExpandedDistribution | Independent | MaskedDistribution):
        if isinstance(fn, MaskedDistribution):
            mask = jnp.asarray(fn._mask, float)
            seen = seen * mask.reshape(mask.shape + (1,) * len(fn.event_shape))
        fn = fn.base_dist
    return seen


def _flat(group: list[Site], reading: Callable[[Site], Any]) -> jax.Array:
    """A reading of each site, spread over the shape of what was observed there, end to end."""
    return jnp.concatenate([jnp.broadcast_to(reading(site), jnp.shape(site["value"])).ravel() for site in group])
