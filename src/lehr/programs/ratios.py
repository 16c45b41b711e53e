r"""What the score alone tells of densities: their ratio between two noise levels.

Between a noisy level t' and the next cleaner one t, with a = α'/α and δ = 1 − exp(λ' − λ),

    forward   f(x' | x)  = N(x'; a x, σ'² δ)
    reverse   r_i(x | x') = N(x; κ x' + α δ x̂₀ᵢ(x'), σ² δ + α² δ² C_i),   κ = (σ/σ') e^{(λ' − λ)/2}

where x̂₀ᵢ and C_i = (σ'²/α') ∂x̂₀ᵢ/∂x' are the mean and covariance of x₀ given x' under model i.
By Bayes' rule p_t(x)/p_t'(x') = r_i(x | x')/f(x' | x): the score alone gives a *ratio of densities*
between two levels, the one thing that weights need. It is exact for Gaussians and as steps shrink;
without C_i (the usual form) it is of first order in the step only.

Where the derivatives of x̂₀ᵢ are known at x too, they tell how far the ratio is off there. Its
logarithm errs by some e_i(x), of which ∇e_i and ∇²e_i are known: those of log p_t less those of
log r_i/f. By Edgeworth's series around r_i, of mean m and covariance S, with the third cumulant κ
of x in units of S,

    e_i = κ·H₃/6 + (fourth cumulant)·H₄/24 − ‖κ‖²/12 + ...,

H_n the Hermite polynomials, the first of which outweighs the rest and averages out, while the
constant adds up along the way. H_n is an eigenfunction of uᵀ∇ − tr(S∇²), of eigenvalue n, and
‖κ‖² is what tr((S∇²e_i)²) is on average. So the *correction* is

    e_i(x) ≈ ⅓ (uᵀ∇e_i − tr(S∇²e_i)) − (1/12) tr((S∇²e_i)²),   u = x − m.

The covariance costs one derivative of the denoiser for each coordinate of an event, each counted as an evaluation. It
is used for events of up to :data:`SMALL` numbers.

References:
    Wu, Trippe, Naesseth, Blei & Cunningham, Practical and asymptotically exact conditional sampling in
    diffusion models, NeurIPS 2023 (twisted proposals).
    Skreta et al., Feynman-Kac correctors in diffusion, ICML 2025 (the limit of small steps).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from numpy.typing import ArrayLike

from lehr.potentials.product import factors
from lehr.predictions import TINY
from lehr.programs.diffusion import Diffusion, diffusions, map_diffusions
from lehr.programs.path import Path, Position, total_log_prob
from lehr.schedules import Schedule

__all__ = [
    "SMALL", "Expected", "Level", "ReverseKernel", "by_event", "correction", "expect", "is_small", "log_forward",
    "lost_share", "num_derivatives", "over_factors", "reverse_kernel",
]  # fmt: skip

SMALL = 16
LARGEST_CORRECTION = 1.0  # of a factor's log ratio, in nats: more than that is no correction


class Level(NamedTuple):
    """A noise level: α, σ and λ = 2 log(α/σ), scalars or one of each for every level of a ladder."""

    alpha: jax.Array
    sigma: jax.Array
    log_snr: jax.Array

    @classmethod
    def of(cls, schedule: Schedule, t: ArrayLike) -> Level:
        t = jnp.asarray(t)
        return cls(*(jnp.broadcast_to(f(t), t.shape) for f in (schedule.alpha, schedule.sigma, schedule.log_snr)))


class Expected(NamedTuple):
    """What one factor of a potential expects behind a noisy event, or the part of it that it sees.

    Attributes:
        x: what it sees.
        mean: x̂₀, shaped as that.
        covariance: C, flat; None for large events.
    """

    x: jax.Array
    mean: jax.Array
    covariance: jax.Array | None

    def score(self, level: Level) -> jax.Array:
        """∇ log p at x, by Tweedie's formula, flat."""
        return (level.alpha * self.mean - self.x).reshape(-1) / level.sigma**2

    def bend(self, level: Level) -> jax.Array:
        """∇² log p at x, by its second order, flat; for small events."""
        assert self.covariance is not None
        return ((level.alpha / level.sigma) ** 2 * self.covariance - jnp.eye(self.x.size)) / level.sigma**2


class ReverseKernel(NamedTuple):
    """r_i: its mean, the eigenvalues of its covariance and their axes (None where it is diagonal), flat; and x'."""

    mean: jax.Array
    variances: jax.Array
    axes: jax.Array | None
    x_noisy: jax.Array

    def log_ratio(self, x: jax.Array, noisy: Level, clean: Level) -> jax.Array:
        """log r_i(x | x')/f(x' | x)."""
        away = x.reshape(-1) - self.mean
        away = away if self.axes is None else self.axes.T @ away
        std = jnp.sqrt(self.variances)
        log_reverse = jnp.sum(norm.logpdf(away / std) - jnp.log(std))
        return log_reverse - log_forward(x.reshape(-1), self.x_noisy, noisy, clean)


def is_small(path: Path) -> bool:
    """Whether x is small enough for covariances."""
    return num_derivatives(path) > 0


def num_derivatives(path: Path) -> int:
    """How many derivatives of the denoiser a covariance takes, each an evaluation; 0 where it is not used."""
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(path.origin)))
    return size if size <= SMALL else 0


def expect(path: Path, position: Position, t: ArrayLike) -> dict[str, list[Expected]]:
    """What the factors of each ``Diffusion`` site expect behind x at level t: the one call of the networks that a
    reverse step from there needs."""
    noisy, small = Level.of(path.schedule, t), is_small(path)
    return by_event(path, position, t, lambda d, x: [_expect(f, x, t, noisy, small) for f in factors(d.potential)])


def reverse_kernel(e: Expected, noisy: Level, clean: Level) -> ReverseKernel:
    """r_i, from what factor i expects at the noisier level."""
    delta = lost_share(noisy, clean)
    kept = clean.sigma / noisy.sigma * jnp.exp((noisy.log_snr - clean.log_snr) / 2)
    x_noisy = e.x.reshape(-1)
    mean = kept * x_noisy + clean.alpha * delta * e.mean.reshape(-1)
    variances, axes = clean.sigma**2 * delta * jnp.ones_like(mean), None
    if e.covariance is not None:
        spread, axes = jnp.linalg.eigh(e.covariance)
        variances += (clean.alpha * delta) ** 2 * jnp.maximum(spread, 0.0)
    return ReverseKernel(mean, variances, axes, x_noisy)


def correction(
    path: Path,
    kernels: dict[str, list[ReverseKernel]],
    position: Position,
    expected: dict[str, list[Expected]],
    t_from: ArrayLike,
    t_to: ArrayLike,
) -> jax.Array:
    """By how much log Π (r_i/f)^{w_i} falls short at a position; for small events.

    Args:
        path: bound, of diffusion models.
        kernels: r_i, of the step that began at ``t_from``.
        position: where it ended, at ``t_to``.
        expected: behind it.
        t_from: the noisier level.
        t_to: the cleaner level.
    """
    noisy, clean = Level.of(path.schedule, t_from), Level.of(path.schedule, t_to)
    pairs = jax.tree.map(lambda *pair: pair, kernels, expected, is_leaf=lambda r: isinstance(r, ReverseKernel))

    return over_factors(path, position, t_to, pairs, lambda x, pair: _shortfall(pair[0], pair[1], noisy, clean))


def lost_share(noisy: Level, clean: Level) -> jax.Array:
    """δ: which share of the noise at the noisier level has come since the cleaner one."""
    return -jnp.expm1(noisy.log_snr - clean.log_snr)


def log_forward(x: jax.Array, x_noisy: jax.Array, noisy: Level, clean: Level) -> jax.Array:
    """log f(x' | x): how x gains noise."""
    std = noisy.sigma * jnp.sqrt(lost_share(noisy, clean))
    return jnp.sum(norm.logpdf(x_noisy, noisy.alpha / clean.alpha * x, std))


def over_factors(path: Path, position: Position, t: ArrayLike, known: Any, term: Callable[..., jax.Array]) -> jax.Array:
    """Σ w_i term over the factors of all ``Diffusion`` sites."""
    x = {name: position[name] for name in path.diffusion_sites}
    sites = (site for site in path.trace(position, x, t) if diffusions(site["fn"]))
    return total_log_prob(
        site | {"fn": map_diffusions(lambda d: _Terms(d, known[site["name"]], term), site["fn"])}  # noqa: B023
        for site in sites
    )


def by_event(path: Path, position: Position, t: ArrayLike, function: Callable[..., Any], *more: Any) -> dict[str, Any]:
    """``function(diffusion, event, ...)`` for each event of each ``Diffusion`` site, with what ``more`` has of it."""
    found, x = {}, {name: position[name] for name in path.diffusion_sites}
    for site in path.trace(position, x, t):
        for d in diffusions(site["fn"]):
            mapped = functools.partial(function, d)
            for _ in range(jnp.ndim(site["value"]) - d.event_dim):
                mapped = jax.vmap(mapped)
            found[site["name"]] = mapped(site["value"], *(each[site["name"]] for each in more))
    return found


def _expect(factor: Any, x: jax.Array, t: ArrayLike, noisy: Level, with_covariance: bool) -> Expected:
    p, seen = factor.potential, x[factor.slices]
    mean = p.denoise(seen, t)
    if not with_covariance:
        return Expected(seen, mean, None)
    slope = jax.jacfwd(lambda v: p.denoise(v.reshape(seen.shape), t).reshape(-1))(seen.reshape(-1))
    return Expected(seen, mean, noisy.sigma**2 / jnp.maximum(noisy.alpha, TINY) * (slope + slope.mT) / 2)


def _shortfall(r: ReverseKernel, to: Expected, noisy: Level, clean: Level) -> jax.Array:
    """What log r_i/f lacks, by the derivatives of its error at x."""
    assert r.axes is not None
    x, forward = to.x.reshape(-1), noisy.sigma**2 * lost_share(noisy, clean)
    kept = noisy.alpha / clean.alpha
    away, precision = x - r.mean, (r.axes / r.variances) @ r.axes.T
    slope = to.score(clean) + precision @ away + kept * (r.x_noisy - kept * x) / forward
    bend = to.bend(clean) + precision - kept**2 / forward * jnp.eye(x.size)
    relative = (r.axes * r.variances) @ r.axes.T @ bend
    lacks = (away @ slope - jnp.trace(relative)) / 3 - jnp.sum(relative * relative.T) / 12
    return jnp.clip(jnp.nan_to_num(lacks), -LARGEST_CORRECTION, LARGEST_CORRECTION)


class _Terms(Diffusion):
    """A Diffusion whose log_prob is Σ w_i term(x as factor i sees it, what is known of factor i)."""

    def __init__(self, site: Diffusion, known: list[Any], term: Callable[[jax.Array, Any], jax.Array]) -> None:
        super().__init__(site.potential, site.bound_level())
        self.known, self.term = known, term

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        value = jnp.asarray(value)

        def total(x: jax.Array, known: list[Any]) -> jax.Array:
            pairs = zip(factors(self.potential), known, strict=True)
            return sum((f.weight * self.term(x[f.slices], k) for f, k in pairs), jnp.zeros(()))

        for _ in range(value.ndim - self.event_dim):
            total = jax.vmap(total)
        return total(value, self.known)
