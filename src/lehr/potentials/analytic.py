r"""Potentials whose diffused density is known in closed form.

Noise adds its covariance and scales the data, so that for every t

    N(m, Σ)          ↦  N(α m, α² Σ + σ² I),
    Σ_k w_k N_k      ↦  the mixture of the N_k so changed,
    a box on [a, b]  ↦  Π_i [Φ((x_i − α a_i)/σ) − Φ((x_i − α b_i)/σ)] / (α (b_i − a_i))
                        (see :mod:`~lehr.potentials.box`).

All three are normalised at every t (c(t) = 0) and can be drawn from exactly. They are
what a sampler is judged against.
"""

from __future__ import annotations

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from lehr.potentials.base import EnergyPotential, Moments, check_positive, check_time, replace
from lehr.potentials.box import log_box, log_box_slope, mean_in_box
from lehr.schedules import Schedule, VPCosine

__all__ = ["ExactPotential", "Gaussian", "GaussianMixture", "Uniform"]

LOG_ROOT_2PI = math.log(2 * math.pi) / 2


class ExactPotential(EnergyPotential):
    """An energy potential that can also be drawn from at any t."""

    def sample(self, rng_key: jax.Array, t: ArrayLike = 0.0, shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent exact draws of x_t, shape ``shape + event_shape``."""
        t = check_time(t)
        key_data, key_noise = jax.random.split(rng_key)
        data = self._sample_data(key_data, shape)
        noise = jax.random.normal(key_noise, data.shape)
        return self.schedule.alpha(t) * data + self.schedule.sigma(t) * noise

    @property
    def is_calibrated(self) -> bool:
        return True

    def reschedule(self, schedule: Schedule) -> ExactPotential:
        """The same data under another schedule: exact."""
        return replace(self, schedule=schedule)

    @abc.abstractmethod
    def log_density_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """log density of α x₀ + σ ε at x, for any pair (α, σ), whatever the schedule."""

    @abc.abstractmethod
    def score_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """Its gradient by x."""

    @abc.abstractmethod
    def denoise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """E[x₀ | x] there."""

    @abc.abstractmethod
    def noise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """E[ε | x] there."""

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.log_density_at(x, self.schedule.alpha(t), self.schedule.sigma(t))

    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.score_at(x, self.schedule.alpha(t), self.schedule.sigma(t))

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.denoise_at(x, self.schedule.alpha(t), self.schedule.sigma(t))

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.noise_at(x, self.schedule.alpha(t), self.schedule.sigma(t))

    @abc.abstractmethod
    def _sample_data(self, rng_key: jax.Array, shape: tuple[int, ...]) -> jax.Array: ...


class Gaussian(ExactPotential):
    """N(loc, scale²) diffused.

    Args:
        loc: m, the mean; its shape is the event's.
        scale: standard deviation, () or event-shaped; or, for an event of shape (d,), a
            lower-triangular (d, d) factor L with covariance L Lᵀ.
        schedule: defaults to :class:`~lehr.VPCosine`.

    Raises:
        ValueError: if the shapes do not fit, or a scale is not positive.
    """

    loc: jax.Array
    stds: jax.Array
    basis: jax.Array | None
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, loc: ArrayLike, scale: ArrayLike = 1.0, schedule: Schedule | None = None) -> None:
        loc, scale = jnp.asarray(loc, float), jnp.asarray(scale, float)
        shape = jnp.shape(loc)
        if jnp.ndim(loc) == 1 and scale.shape == shape * 2:
            self.basis, self.stds = principal_axes(scale)
        elif scale.shape in ((), shape):
            self.basis, self.stds = None, jnp.broadcast_to(check_positive("Gaussian scale", scale), shape)
        else:
            raise ValueError(
                f"Gaussian scale must have shape (), the event's {shape}, or (d, d) for an event of shape "
                f"(d,); got {scale.shape}."
            )
        self.loc = loc
        self.schedule = VPCosine() if schedule is None else schedule
        self.event_shape = shape

    @property
    def covariance(self) -> jax.Array:
        """Σ of the data, (d, d) over the flattened event."""
        if self.basis is None:
            return jnp.diag(self.stds.ravel() ** 2)
        return (self.basis * self.stds**2) @ self.basis.T

    def moments(self, t: ArrayLike) -> Moments:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return Moments(alpha * self.loc, jnp.sqrt(alpha**2 * marginal_variance(self.stds, self.basis) + sigma**2))

    def width(self, t: ArrayLike) -> jax.Array:
        return jnp.hypot(self.schedule.alpha(t) * jnp.min(self.stds), self.schedule.sigma(t))

    def _frame(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, ...]:
        """The offset from the mean on the principal axes, and the variances there."""
        offset = x - alpha * self.loc
        offset = offset if self.basis is None else self.basis.T @ offset
        return offset, (alpha * self.stds) ** 2 + sigma**2

    def _back(self, offset: jax.Array) -> jax.Array:
        return offset if self.basis is None else self.basis @ offset

    def log_density_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        offset, variance = self._frame(x, alpha, sigma)
        return -jnp.sum(offset**2 / variance + jnp.log(2 * math.pi * variance)) / 2

    def score_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        offset, variance = self._frame(x, alpha, sigma)
        return -self._back(offset / variance)

    def denoise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        offset, variance = self._frame(x, alpha, sigma)
        return self.loc + self._back(alpha * self.stds**2 / variance * offset)

    def noise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        offset, variance = self._frame(x, alpha, sigma)
        return sigma * self._back(offset / variance)

    def _sample_data(self, rng_key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        draws = self.stds * jax.random.normal(rng_key, shape + self.event_shape)
        return self.loc + (draws if self.basis is None else draws @ self.basis.T)


class GaussianMixture(ExactPotential):
    """Σ_k w_k N(m_k, Σ_k) diffused.

    Args:
        locs: m_k, the means, shape (k, d).
        scales: standard deviations: () for all, (k,) one for each component, (k, d) diagonal; or
            (k, d, d) lower-triangular factors. A square (k, d, d) is always read as factors.
        weights: w_k > 0, shape (k,), normalised here; equal by default.
        schedule: defaults to :class:`~lehr.VPCosine`.

    Raises:
        ValueError: if the shapes do not fit, or a scale or weight is not positive.
    """

    locs: jax.Array
    stds: jax.Array
    basis: jax.Array | None
    log_weights: jax.Array
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        locs: ArrayLike,
        scales: ArrayLike = 1.0,
        weights: ArrayLike | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        locs, scales = jnp.asarray(locs, float), jnp.asarray(scales, float)
        if locs.ndim != 2:
            raise ValueError(f"GaussianMixture locs must have shape (k, d); got {locs.shape}.")
        k, d = locs.shape
        if scales.shape == (k, d, d):
            self.basis, self.stds = jax.vmap(principal_axes)(scales)
        elif scales.shape in ((), (k,), (k, d)):
            scales = check_positive("GaussianMixture scales", scales)
            self.basis = None
            self.stds = jnp.broadcast_to(scales if scales.ndim != 1 else scales[:, None], (k, d))
        else:
            raise ValueError(
                f"GaussianMixture scales must have shape (), ({k},), ({k}, {d}) or ({k}, {d}, {d}) for locs "
                f"of shape ({k}, {d}); got {scales.shape}."
            )
        weights = check_positive("GaussianMixture weights", jnp.ones(k) if weights is None else weights)
        if weights.shape != (k,):
            raise ValueError(f"GaussianMixture weights must have shape ({k},); got {weights.shape}.")
        self.locs = locs
        self.log_weights = jnp.log(weights / jnp.sum(weights))
        self.schedule = VPCosine() if schedule is None else schedule
        self.event_shape = (d,)

    def given(self, label: ArrayLike, num_classes: int | None = None) -> GaussianMixture:
        """The components of one class alone; the mixture itself where the label is K, one more than the last.

        Args:
            label: 0 to K, may be traced.
            num_classes: K, which divides the number of components: the first of them are of class 0, as many
                after them of class 1, and so on. Each is a class by itself by default.
        """
        k = self.log_weights.size
        classes = k if num_classes is None else num_classes
        own = jnp.arange(k) // (k // classes) == label
        alone = jnp.where(own, self.log_weights - jax.nn.logsumexp(self.log_weights, where=own), -jnp.inf)
        return replace(self, log_weights=jnp.where(jnp.asarray(label) == classes, self.log_weights, alone))

    def moments(self, t: ArrayLike) -> Moments:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        weights = jnp.exp(self.log_weights)[:, None]
        mean = jnp.sum(weights * self.locs, 0)
        variance = jnp.sum(weights * (marginal_variance(self.stds, self.basis) + (self.locs - mean) ** 2), 0)
        return Moments(alpha * mean, jnp.sqrt(alpha**2 * variance + sigma**2))

    def width(self, t: ArrayLike) -> jax.Array:
        return jnp.hypot(self.schedule.alpha(t) * jnp.min(self.stds), self.schedule.sigma(t))

    def _frame(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, ...]:
        """The offsets from the means on their principal axes, the variances there, and log w_k N_k(x)."""
        offset = x - alpha * self.locs
        offset = offset if self.basis is None else jnp.einsum("kij,ki->kj", self.basis, offset)
        variance = (alpha * self.stds) ** 2 + sigma**2
        joint = self.log_weights - jnp.sum(offset**2 / variance + jnp.log(2 * math.pi * variance), -1) / 2
        return offset, variance, joint

    def _average(self, joint: jax.Array, offset: jax.Array) -> jax.Array:
        """Σ_k r_k (offset of component k, turned back), r the responsibilities."""
        back = offset if self.basis is None else jnp.einsum("kij,kj->ki", self.basis, offset)
        return jax.nn.softmax(joint) @ back

    def log_density_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(self._frame(x, alpha, sigma)[2])

    def score_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        offset, variance, joint = self._frame(x, alpha, sigma)
        return -self._average(joint, offset / variance)

    def denoise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        offset, variance, joint = self._frame(x, alpha, sigma)
        return jax.nn.softmax(joint) @ self.locs + self._average(joint, alpha * self.stds**2 / variance * offset)

    def noise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        offset, variance, joint = self._frame(x, alpha, sigma)
        return sigma * self._average(joint, offset / variance)

    def _sample_data(self, rng_key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        key_component, key_normal = jax.random.split(rng_key)
        k = jax.random.categorical(key_component, self.log_weights, shape=shape)
        draws = self.stds[k] * jax.random.normal(key_normal, shape + self.event_shape)
        if self.basis is not None:
            draws = jnp.einsum("...ij,...j->...i", self.basis[k], draws)
        return self.locs[k] + draws


class Uniform(ExactPotential):
    """The uniform density on the box [low, high], diffused.

    Args:
        low: a, lower corner, event-shaped.
        high: b > a, upper corner, event-shaped.
        schedule: defaults to :class:`~lehr.VPCosine`.

    Raises:
        ValueError: if the corners differ in shape or ``low < high`` fails anywhere.
    """

    low: jax.Array
    high: jax.Array
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, low: ArrayLike, high: ArrayLike, schedule: Schedule | None = None) -> None:
        low, high = jnp.asarray(low, float), jnp.asarray(high, float)
        if low.shape != high.shape:
            raise ValueError(f"Uniform low and high must have one shape; got {low.shape} and {high.shape}.")
        check_positive("Uniform high - low", high - low)
        self.low, self.high = low, high
        self.schedule = VPCosine() if schedule is None else schedule
        self.event_shape = low.shape

    def moments(self, t: ArrayLike) -> Moments:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        std = jnp.hypot(alpha * (self.high - self.low) / math.sqrt(12), sigma)
        return Moments(alpha * (self.low + self.high) / 2, std)

    def width(self, t: ArrayLike) -> jax.Array:
        narrowest = jnp.min(self.high - self.low) / math.sqrt(12)
        return jnp.hypot(self.schedule.alpha(t) * narrowest, self.schedule.sigma(t))

    def _frame(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, ...]:
        sigma = jnp.maximum(sigma, 1e-6)
        centre = (x - alpha * (self.low + self.high) / 2) / sigma
        return centre, alpha * (self.high - self.low) / 2 / sigma, sigma

    def log_density_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        centre, half, sigma = self._frame(x, alpha, sigma)
        return jnp.sum(log_box(centre, half)) - math.prod(self.event_shape) * jnp.log(sigma)

    def score_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        centre, half, sigma = self._frame(x, alpha, sigma)
        return log_box_slope(centre, half) / sigma

    def denoise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        centre, half, _ = self._frame(x, alpha, sigma)
        place = jnp.clip(mean_in_box(centre, half), -1.0, 1.0)
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * place

    def noise_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        centre, half, _ = self._frame(x, alpha, sigma)
        return -log_box_slope(centre, half)

    def _sample_data(self, rng_key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(rng_key, shape + self.event_shape, minval=self.low, maxval=self.high)


def principal_axes(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors (as columns) and standard deviations of L Lᵀ, from the factor L."""
    basis, stds, _ = jnp.linalg.svd(factor)
    return basis, check_positive("the standard deviations of L Lᵀ", stds)


def marginal_variance(stds: jax.Array, basis: jax.Array | None) -> jax.Array:
    """The diagonal of U diag(s²) Uᵀ, over the last axes."""
    return stds**2 if basis is None else jnp.einsum("...ij,...j->...i", basis**2, stds**2)
