r"""From one level to the next by the reverse kernels of the diffusion models themselves.

Between a noisy level t' and the next cleaner one t, with a = α'/α and δ = 1 − exp(λ' − λ),

    forward   f(x' | x)  = N(x'; a x, σ'² δ)
    reverse   r_i(x | x') = N(x; κ x' + α δ x̂₀ᵢ(x'), σ² δ + α² δ² C_i),   κ = (σ/σ') e^{(λ' − λ)/2}

where x̂₀ᵢ and C_i = (σ'²/α') ∂x̂₀ᵢ/∂x' are the mean and covariance of x₀ given x' under model i.
By Bayes' rule p_t(x)/p_t'(x') = r_i(x | x')/f(x' | x): the score alone gives a *ratio of densities*
between two levels, the one thing that weights need. It is exact for Gaussians and as steps shrink;
without C_i (the usual form) it is of first order in the step only.

For a path with factors p_i^{w_i} the target ratio is Π (r_i/f)^{w_i}, and the backward kernel of the
extended target is f, so that a proposal K has the incremental weight

    Π_i (r_i/f)^{w_i} · f/K · L_t(x, θ)/L_t'(x', θ).

All of r_i and f being Gaussian, so is G = f Π (r_i/f)^{w_i} as a function of x. K is G, normalised:
then the weight does not depend on where x falls, and is ∫ G dx. Where there is a likelihood, K
is moved along its gradient, by no more than a few of its own standard deviations.

The ratio holds for any pair of points, so a chain may also stay where it is, x = x', and gain
Π (r_i/f)^{w_i} there.

The covariance costs one derivative of the denoiser for each coordinate of an event. It is used for events of up
to :data:`SMALL` numbers.

References:
    Wu, Trippe, Naesseth, Blei & Cunningham, Practical and asymptotically exact conditional sampling in
    diffusion models, NeurIPS 2023 (twisted proposals).
    Skreta et al., Feynman-Kac correctors in diffusion, ICML 2025 (the limit of small steps).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm
from numpy.typing import ArrayLike

from lehr.potentials.base import Potential
from lehr.potentials.product import factors
from lehr.predictions import TINY
from lehr.programs.diffusion import Diffusion, diffusions, map_diffusions
from lehr.programs.path import Path, Position, total_log_prob
from lehr.schedules import Schedule

__all__ = ["SMALL", "Level", "ReverseStep", "evaluations", "log_forward", "lost_share", "reverse_step", "start_density"]

SMALL = 16
LARGEST_SHIFT = 3.0  # by which a likelihood may move a proposal, in its standard deviations


class Level(NamedTuple):
    """A noise level: α, σ and λ = 2 log(α/σ), scalars or one of each for every level of a ladder."""

    alpha: jax.Array
    sigma: jax.Array
    log_snr: jax.Array

    @classmethod
    def of(cls, schedule: Schedule, t: ArrayLike) -> Level:
        t = jnp.asarray(t)
        return cls(*(jnp.broadcast_to(f(t), t.shape) for f in (schedule.alpha, schedule.sigma, schedule.log_snr)))


class ReverseStep(NamedTuple):
    """A proposal for all of x at the cleaner level, flat: mean + root · (noise + shift).

    Attributes:
        mean: of K without the likelihood, shape (D,).
        root: the symmetric square root of its covariance, which unlike others is a smooth function of it: (D, D), or
            (D,) where it is diagonal.
        log_det: the logarithm of its determinant.
        shift: by which the likelihood moves it, in units of ``root``, shape (D,).
        log_weight: log ∫ G dx.
        log_stay: log Π (r_i/f)^{w_i} for a chain that stays where it is: the change of log density there.
        excess: what had to be added to the precision of G to make a density of it, laid out as ``root``:
            zeros, but for powers and contrasts that are none.
    """

    mean: jax.Array
    root: jax.Array
    log_det: jax.Array
    shift: jax.Array
    log_weight: jax.Array
    log_stay: jax.Array
    excess: jax.Array

    def draw(self, rng_key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x, flat, and log G(x) − log K(x), and log K(x)."""
        noise = jax.random.normal(rng_key, self.mean.shape)
        moved = noise + self.shift
        x = self.mean + _times(self.root, moved)
        log_ratio = self.log_weight + (jnp.sum(noise**2 - moved**2) + jnp.dot(x, _times(self.excess, x))) / 2
        return x, log_ratio, jnp.sum(norm.logpdf(noise)) - self.log_det


def evaluations(path: Path) -> int:
    """What one reverse step costs, in evaluations: the denoiser, and its derivatives where they are used."""
    return 1 + (_size(path) if _size(path) <= SMALL else 0)


def reverse_step(path: Path, position: Position, gradient: Position, t_from: ArrayLike, t_to: ArrayLike) -> ReverseStep:
    """The proposal for x at ``t_to``, from a position at ``t_from``.

    Args:
        path: bound, of diffusion models.
        position: the whole of it, at ``t_from``.
        gradient: ∇ log π there; used for what the likelihood adds to the models' own.
        t_from: the noisier level.
        t_to: the cleaner level.
    """
    noisy, clean = Level.of(path.schedule, t_from), Level.of(path.schedule, t_to)
    x = {name: position[name] for name in path.diffusion_sites}
    flat, unravel = ravel_pytree(x)
    with_covariance = _size(path) <= SMALL

    expected = {
        site["name"]: _over_events(site, lambda d, v: _expect(d.potential, v, t_from, noisy, with_covariance))
        for site in path.trace(position, x, t_from)
        if diffusions(site["fn"])
    }

    def log_g(to: jax.Array) -> jax.Array:
        sites = path.trace(position, unravel(to), t_to)
        ratios = total_log_prob(
            site | {"fn": map_diffusions(lambda d: _Ratio(d, expected[site["name"]], noisy, clean), site["fn"])}  # noqa: B023
            for site in sites
            if diffusions(site["fn"])
        )
        return ratios + log_forward(to, flat, noisy, clean)

    origin = jnp.zeros_like(flat)
    constant, slope = jax.value_and_grad(log_g)(origin)
    least = 1e-3 / (clean.sigma**2 * lost_share(noisy, clean))  # a power or a contrast may leave no density
    if with_covariance:
        bare, vectors = jnp.linalg.eigh(-jax.hessian(log_g)(origin))
        values = jnp.maximum(bare, least)
        root, excess = ((vectors * c) @ vectors.T for c in (values**-0.5, values - bare))
    else:
        bare = slope - jax.grad(log_g)(jnp.ones_like(flat))
        values = jnp.maximum(bare, least)
        root, excess = values**-0.5, values - bare
    mean, log_det = _times(root, _times(root, slope)), jnp.sum(jnp.log(values))
    log_weight = constant + jnp.dot(slope, mean) / 2 + (flat.size * math.log(2 * math.pi) - log_det) / 2
    shift = _shift(path, position, gradient, root, t_from, noisy, clean)
    log_stay = log_g(flat) - log_forward(flat, flat, noisy, clean)
    return ReverseStep(mean, root, -log_det / 2, shift, log_weight, log_stay, excess)


def start_density(path: Path, position: Position, t: ArrayLike) -> jax.Array:
    """log π_t at the first level, with each model a Gaussian of its moments: normalised, as the models are."""
    x = {name: position[name] for name in path.diffusion_sites}
    sites = [site for site in path.trace(position, x, t) if diffusions(site["fn"])]
    gaussians = total_log_prob(site | {"fn": map_diffusions(_Gaussians, site["fn"])} for site in sites)
    return gaussians + (path.others(position, t) if path.other_sites else 0.0)


def _size(path: Path) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(path.origin)))


def lost_share(noisy: Level, clean: Level) -> jax.Array:
    """δ: which share of the noise at the noisier level has come since the cleaner one."""
    return -jnp.expm1(noisy.log_snr - clean.log_snr)


def log_forward(x: jax.Array, x_noisy: jax.Array, noisy: Level, clean: Level) -> jax.Array:
    """log f(x' | x): how x gains noise."""
    std = noisy.sigma * jnp.sqrt(lost_share(noisy, clean))
    return jnp.sum(norm.logpdf(x_noisy, noisy.alpha / clean.alpha * x, std))


class _Expected(NamedTuple):
    """What one factor of a potential expects behind the noisy event, or the part of it, that it sees."""

    x_noisy: jax.Array
    mean: jax.Array
    variances: jax.Array | None  # eigenvalues of C_i
    axes: jax.Array | None  # and its eigenvectors


def _expect(potential: Potential, x: jax.Array, t: ArrayLike, noisy: Level, with_covariance: bool) -> list[_Expected]:
    return [_expect_one(f.potential, x[f.slices], t, noisy, with_covariance) for f in factors(potential)]


def _expect_one(p: Potential, x: jax.Array, t: ArrayLike, noisy: Level, with_covariance: bool) -> _Expected:
    mean = p.denoise(x, t)
    if not with_covariance:
        return _Expected(x, mean, None, None)
    slope = jax.jacfwd(lambda v: p.denoise(v.reshape(x.shape), t).reshape(-1))(x.reshape(-1))
    covariance = noisy.sigma**2 / jnp.maximum(noisy.alpha, TINY) * (slope + slope.mT) / 2
    variances, axes = jnp.linalg.eigh(covariance)
    return _Expected(x, mean, jnp.maximum(variances, 0.0), axes)


class _Ratio(Diffusion):
    """A Diffusion whose log_prob is Σ w_i log(r_i/f), given what its factors expect."""

    def __init__(self, site: Diffusion, expected: list[_Expected], noisy: Level, clean: Level) -> None:
        super().__init__(site.potential, site.bound_level())
        self.expected, self.noisy, self.clean = expected, noisy, clean

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        value = jnp.asarray(value)

        def ratio(x: jax.Array, expected: list[_Expected]) -> jax.Array:
            pairs = zip(factors(self.potential), expected, strict=True)
            terms = [f.weight * _log_ratio(x[f.slices], e, self.noisy, self.clean) for f, e in pairs]
            return sum(terms, jnp.zeros(()))

        for _ in range(value.ndim - self.event_dim):
            ratio = jax.vmap(ratio)
        return ratio(value, self.expected)


def _log_ratio(x: jax.Array, expected: _Expected, noisy: Level, clean: Level) -> jax.Array:
    """log r(x | x')/f(x' | x) of one factor."""
    delta = lost_share(noisy, clean)
    kept = clean.sigma / noisy.sigma * jnp.exp((noisy.log_snr - clean.log_snr) / 2)
    away = (x - kept * expected.x_noisy - clean.alpha * delta * expected.mean).reshape(-1)
    std = clean.sigma * jnp.sqrt(delta) * jnp.ones_like(away)
    if expected.variances is not None and expected.axes is not None:
        away = expected.axes.T @ away
        std = jnp.sqrt(clean.sigma**2 * delta + (clean.alpha * delta) ** 2 * expected.variances)
    log_reverse = jnp.sum(norm.logpdf(away / std) - jnp.log(std))
    return log_reverse - log_forward(x, expected.x_noisy, noisy, clean)


class _Gaussians(Diffusion):
    """A Diffusion whose log_prob is Σ w_i log N(x; moments of p_i)."""

    def __init__(self, site: Diffusion) -> None:
        super().__init__(site.potential, site.bound_level())

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        def density(x: jax.Array) -> jax.Array:
            terms = [(f, f.potential.moments(self.bound_level())) for f in factors(self.potential)]
            return sum((f.weight * jnp.sum(norm.logpdf(x[f.slices], m.mean, m.std)) for f, m in terms), jnp.zeros(()))

        return self.over_events(density, value)


def _over_events(site: Any, function: Any) -> Any:
    """``function(diffusion, event)`` over the events of a site."""
    (d,) = diffusions(site["fn"])
    value = site["value"]
    mapped = lambda event: function(d, event)  # noqa: E731
    for _ in range(jnp.ndim(value) - d.event_dim):
        mapped = jax.vmap(mapped)
    return mapped(value)


def _shift(
    path: Path, position: Position, gradient: Position, root: jax.Array, t: ArrayLike, noisy: Level, clean: Level
) -> jax.Array:
    """How far the likelihood's gradient moves the proposal, in units of its root."""
    if not path.other_sites:
        return jnp.zeros(root.shape[0])
    own = jax.grad(path.as_scores().unknown)(position, t)
    pull = ravel_pytree({k: gradient[k] - own[k] for k in path.diffusion_sites})[0]
    pull = pull * noisy.alpha / clean.alpha * jnp.exp(clean.log_snr - noisy.log_snr)
    return jnp.clip(jnp.nan_to_num(_times(root, pull)), -LARGEST_SHIFT, LARGEST_SHIFT)


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """The product of a symmetric matrix, (D, D) or diagonal (D,), with a vector."""
    return matrix @ vector if matrix.ndim == 2 else matrix * vector
