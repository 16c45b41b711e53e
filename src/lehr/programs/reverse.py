r"""From one level to the next by the reverse kernels of the diffusion models themselves.

For a path with factors p_i^{w_i}, with f the forward and r_i the reverse kernels of :mod:`lehr.programs.ratios`,
the target ratio between a noisy level t' and the next cleaner one t is Π (r_i/f)^{w_i}, and the backward kernel of
the extended target is f, so that a proposal K has the incremental weight

    Π_i (r_i/f)^{w_i} · f/K · L_t(x, θ)/L_t'(x', θ).

All of r_i and f being Gaussian, so is G = f Π (r_i/f)^{w_i} as a function of x. K is G, normalised:
then the weight does not depend on where x falls, and is ∫ G dx. Where there is a likelihood, K
is moved along its gradient at x', by no more than a few of its own standard deviations. A
likelihood that reads x_t without asking the models (a strategy with ``uses_score = False``) can be
looked at anywhere: K is then Laplace's approximation of G L_t, its precision at most twice that
of G, so that weights keep a variance.

The ratio holds for any pair of points, so a chain may also stay where it is, x = x', and gain
Π (r_i/f)^{w_i} there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm
from numpy.typing import ArrayLike

from lehr.potentials.product import factors
from lehr.programs.diffusion import Diffusion, diffusions, map_diffusions
from lehr.programs.path import Path, Position, total_log_prob
from lehr.programs.ratios import (
    Expected,
    Level,
    ReverseKernel,
    by_event,
    is_small,
    log_forward,
    lost_share,
    over_factors,
    reverse_kernel,
)

__all__ = ["ReverseStep", "reverse_step", "start_density"]

LARGEST_SHIFT = 3.0  # by which a likelihood may move a proposal, in its standard deviations
NEWTON_STEPS = 2
FLATTEST = 1e-3  # precision of a proposal, of that of the forward kernel


class ReverseStep(NamedTuple):
    """A proposal for all of x at the cleaner level, flat: mean + root · (narrow · noise + shift).

    Attributes:
        x_noisy: where it starts, shape (D,).
        mean: of K without the likelihood, shape (D,).
        root: the symmetric square root of its covariance, which unlike others is a smooth function of it: (D, D), or
            (D,) where it is diagonal.
        log_det: the logarithm of its determinant.
        shift: by which the likelihood moves it, in units of ``root``, shape (D,).
        narrow: what the likelihood makes of a unit of noise, laid out as ``root``.
        log_narrow: the logarithm of its determinant.
        log_weight: log ∫ G dx.
        log_stay: log Π (r_i/f)^{w_i} for a chain that stays where it is: the change of log density there.
        excess: what had to be added to the precision of G to make a density of it, laid out as ``root``:
            zeros, but for powers and contrasts that are none.
        kernels: r_i, for each factor of each site.
    """

    x_noisy: jax.Array
    mean: jax.Array
    root: jax.Array
    log_det: jax.Array
    shift: jax.Array
    narrow: jax.Array
    log_narrow: jax.Array
    log_weight: jax.Array
    log_stay: jax.Array
    excess: jax.Array
    kernels: dict[str, list[ReverseKernel]]

    def draw(self, rng_key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x, flat, and log G(x) − log K(x), and log K(x)."""
        noise = jax.random.normal(rng_key, self.mean.shape)
        moved = _times(self.narrow, noise) + self.shift
        x = self.mean + _times(self.root, moved)
        away = x - self.x_noisy
        log_ratio = self.log_weight + (jnp.sum(noise**2 - moved**2) + jnp.dot(away, _times(self.excess, away))) / 2
        return x, log_ratio + self.log_narrow, jnp.sum(norm.logpdf(noise)) - self.log_det - self.log_narrow


def reverse_step(
    path: Path,
    position: Position,
    expected: dict[str, list[Expected]],
    gradient: Position,
    t_from: ArrayLike,
    t_to: ArrayLike,
) -> ReverseStep:
    """The proposal for x at ``t_to``, from a position at ``t_from``.

    Args:
        path: bound, of diffusion models.
        position: the whole of it, at ``t_from``.
        expected: behind it.
        gradient: ∇ log π there; used for what a likelihood that asks the models adds to their own.
        t_from: the noisier level.
        t_to: the cleaner level.
    """
    noisy, clean = Level.of(path.schedule, t_from), Level.of(path.schedule, t_to)
    flat, unravel = ravel_pytree({name: position[name] for name in path.diffusion_sites})
    kernels = by_event(path, position, t_to, lambda d, x, es: [reverse_kernel(e, noisy, clean) for e in es], expected)

    def log_g(to: jax.Array) -> jax.Array:
        ratios = over_factors(path, position | unravel(to), t_to, kernels, lambda x, r: r.log_ratio(x, noisy, clean))
        return ratios + log_forward(to, flat, noisy, clean)

    constant, slope = jax.value_and_grad(log_g)(flat)  # about x', where no term is larger than what counts
    own = 1 / (clean.sigma**2 * lost_share(noisy, clean))  # the precision of f
    if is_small(path):
        bare, vectors = jnp.linalg.eigh(-jax.hessian(log_g)(flat))
        values = _proper(bare, own)
        root, excess = ((vectors * c) @ vectors.T for c in (values**-0.5, values - bare))
    else:
        bare = slope - jax.grad(log_g)(flat + 1)
        values = _proper(bare, own)
        root, excess = values**-0.5, values - bare
    ahead, log_det = _times(root, _times(root, slope)), jnp.sum(jnp.log(values))
    mean = flat + ahead
    log_weight = constant + jnp.dot(slope, ahead) / 2 + (flat.size * math.log(2 * math.pi) - log_det) / 2
    pull = _pull(path, position, expected, gradient, t_from, noisy, clean)
    shift, narrow, log_narrow = _towards(
        lambda w: path.aside(position | unravel(mean + _times(root, w)), t_to), _times(root, pull), root
    )
    log_stay = constant - log_forward(flat, flat, noisy, clean)
    return ReverseStep(flat, mean, root, -log_det / 2, shift, narrow, log_narrow, log_weight, log_stay, excess, kernels)


def start_density(path: Path, position: Position, t: ArrayLike) -> jax.Array:
    """log π_t at the first level, with each model a Gaussian of its moments: normalised, as the models are."""
    x = {name: position[name] for name in path.diffusion_sites}
    sites = [site for site in path.trace(position, x, t) if diffusions(site["fn"])]
    gaussians = total_log_prob(site | {"fn": map_diffusions(_Gaussians, site["fn"])} for site in sites)
    return gaussians + (path.others(position, t) if path.other_sites else 0.0)


class _Gaussians(Diffusion):
    """A Diffusion whose log_prob is Σ w_i log N(x; moments of p_i)."""

    def __init__(self, site: Diffusion) -> None:
        super().__init__(site.potential, site.bound_level())

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        def density(x: jax.Array) -> jax.Array:
            terms = [(f, f.potential.moments(self.bound_level())) for f in factors(self.potential)]
            return sum((f.weight * jnp.sum(norm.logpdf(x[f.slices], m.mean, m.std)) for f, m in terms), jnp.zeros(()))

        return self.over_events(density, value)


def _pull(
    path: Path,
    position: Position,
    expected: dict[str, list[Expected]],
    gradient: Position,
    t: ArrayLike,
    noisy: Level,
    clean: Level,
) -> jax.Array:
    """What a likelihood that asks the models adds to the gradient, as at the cleaner level."""
    if not path.other_sites:
        return jnp.zeros(sum(position[name].size for name in path.diffusion_sites))

    def rest(position: Position) -> jax.Array:
        models = over_factors(path, position, t, expected, lambda x, e: jnp.dot(x.reshape(-1), e.score(noisy)))
        aside = path.aside(position, t)
        return models if aside is None else models + aside

    own = jax.grad(rest)(position)
    pull = ravel_pytree({k: gradient[k] - own[k] for k in path.diffusion_sites})[0]
    return pull * noisy.alpha / clean.alpha * jnp.exp(clean.log_snr - noisy.log_snr)


def _towards(
    aside: Callable[[jax.Array], jax.Array | None], pull: jax.Array, root: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shift, narrowing and its log determinant, for a likelihood with a gradient and a part that can be asked anywhere,
    both as functions of w in N(0, 1)."""

    def bounded(w: jax.Array) -> jax.Array:
        return jnp.clip(jnp.nan_to_num(w), -LARGEST_SHIFT, LARGEST_SHIFT)

    shift, zero = bounded(pull), jnp.zeros(())
    slope = jax.grad(lambda w: jnp.asarray(aside(w)))
    if aside(shift) is None:
        return shift, jnp.eye(shift.size) if root.ndim == 2 else jnp.ones_like(shift), zero
    if root.ndim == 1:
        return bounded(pull + slope(shift)), jnp.ones_like(shift), zero

    def curved(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, axes = jnp.linalg.eigh(jnp.nan_to_num(-jax.jacfwd(slope)(w)))
        return jnp.clip(values, 0.0, 1.0), axes

    for _ in range(NEWTON_STEPS):
        values, axes = curved(shift)
        shift += (axes / (1 + values)) @ (axes.T @ (jnp.nan_to_num(slope(shift)) + pull - shift))
        shift = bounded(shift)
    values, axes = curved(shift)
    return shift, (axes * (1 + values) ** -0.5) @ axes.T, -jnp.sum(jnp.log1p(values)) / 2


def _proper(precisions: jax.Array, own: jax.Array) -> jax.Array:
    """Those of G where it is a density; f's own where a power or a contrast leaves none, and its ratio holds nearby."""
    return jnp.where(precisions > FLATTEST * own, precisions, own)


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """The product of a symmetric matrix, (D, D) or diagonal (D,), with a vector."""
    return matrix @ vector if matrix.ndim == 2 else matrix * vector
