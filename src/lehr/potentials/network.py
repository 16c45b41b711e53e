r"""Energies made of a network.

With the data's mean m and standard deviation s written in by hand,

    log p_t(x) = log N(x; α m, v) − (α s/σ)(s² α²/v) F_θ(z, c) ,    v = α² s² + σ²,
    z = (x − α m)/√v,    c = log(σ/α),

so that the network F learns only what is not Gaussian, on an input of unit variance. The
prefactor makes F of order one everywhere: near the data a log density grows like 1/σ, and
far into the noise the third cumulant, the first that a Gaussian lacks, decays like
(α s/σ)³. The density therefore ends, at t = 1, in a Gaussian whose constant is known; if
the time derivative is trained too (:mod:`lehr.training.dual`), the energy comes out
normalised. c is clipped to the range that was trained.

References:
    Du et al., Reduce, reuse, recycle, ICML 2023 (energy parametrisations).
    Karras et al., Elucidating the design space of diffusion models, NeurIPS 2022 (preconditioning).
    Guth, Kadkhodaie & Simoncelli, Learning normalized image densities via dual score
    matching, 2025 (arXiv 2506.05310).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from numpy.typing import ArrayLike

from lehr.potentials.base import EnergyPotential, Moments, check_positive, replace
from lehr.schedules import Schedule, VPCosine

__all__ = ["EnergyNetwork"]

HEADS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "scalar": lambda z, f: f,
    "inner": lambda z, f: jnp.vdot(z, f),
    "l2": lambda z, f: jnp.vdot(f, f) / 2,
    "dae": lambda z, f: jnp.vdot(z - f, z - f) / 2,
}


class EnergyNetwork(EnergyPotential):
    """A scalar energy made of a Flax NNX network and of the Gaussian that it corrects.

    Args:
        network: a module called as ``network(z, c)`` with z of shape ``event_shape`` and unit
            variance and c = log(σ/α) a scalar; it returns a scalar (``head="scalar"``) or an
            array of the shape of z (the other heads).
        schedule: the schedule through which it is seen. The network knows only σ/α, so any will do.
        event_shape: shape of x.
        head: how the output becomes a scalar F: ``"scalar"`` F = f, ``"inner"`` ⟨z, f⟩,
            ``"l2"`` ½‖f‖², ``"dae"`` ½‖z − f‖².
        mean: m, the data's mean, () or event-shaped, in data units.
        std: s > 0, the data's standard deviation, pooled over coordinates, in data units.
        feature_scale: standard deviation of the data's finest feature, in data units; sets the
            step size at the clean end. Defaults to ``std``.
        sigma_range: the trained range of σ/α, which c is clipped to.
        calibrated: whether the time derivative was trained too, so that c(t) = 0.

    Raises:
        ValueError: for an unknown head, or scales that are not positive.
    """

    graphdef: Any = eqx.field(static=True)
    state: Any
    mean: jax.Array
    std: jax.Array
    feature_scale: jax.Array
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)
    head: str = eqx.field(static=True)
    sigma_range: tuple[float, float] = eqx.field(static=True)
    calibrated: bool = eqx.field(static=True)

    def __init__(
        self,
        network: nnx.Module,
        schedule: Schedule | None = None,
        event_shape: tuple[int, ...] = (2,),
        *,
        head: Literal["scalar", "inner", "l2", "dae"] = "scalar",
        mean: ArrayLike = 0.0,
        std: ArrayLike = 1.0,
        feature_scale: ArrayLike | None = None,
        sigma_range: tuple[float, float] = (2e-3, 20.0),
        calibrated: bool = False,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"unknown energy head {head!r}; expected one of {', '.join(HEADS)}.")
        if not 0 < sigma_range[0] < sigma_range[1]:
            raise ValueError(f"sigma_range must be 0 < low < high; got {sigma_range}.")
        self.graphdef, self.state = nnx.split(network)
        self.mean = jnp.broadcast_to(jnp.asarray(mean, float), event_shape)
        self.std = check_positive("std", std)
        if self.std.shape != ():
            raise ValueError(f"std is pooled over coordinates, a scalar; got shape {self.std.shape}.")
        self.feature_scale = check_positive("feature_scale", std if feature_scale is None else feature_scale)
        self.schedule = VPCosine() if schedule is None else schedule
        self.event_shape = tuple(event_shape)
        self.head = head
        self.sigma_range = (float(sigma_range[0]), float(sigma_range[1]))
        self.calibrated = calibrated

    @property
    def is_calibrated(self) -> bool:
        return self.calibrated

    def log_density_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """log density of α x₀ + σ ε at x, as a function of α and σ.

        α = 1 is the frame in which the energy is trained: its derivative by log σ there is the
        one that dual score matching regresses.
        """
        z, root, sigma = self._standardised(x, alpha, sigma)
        gaussian = -jnp.vdot(z, z) / 2 - math.prod(self.event_shape) * jnp.log(root * math.sqrt(2 * math.pi))
        return gaussian - self._prefactor(alpha, sigma, root) * self._residual(z, alpha, sigma)

    def moments(self, t: ArrayLike) -> Moments:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        std = jnp.sqrt((alpha * self.std) ** 2 + sigma**2)
        return Moments(alpha * self.mean, jnp.broadcast_to(std, self.event_shape))

    def width(self, t: ArrayLike) -> jax.Array:
        return jnp.hypot(self.schedule.alpha(t) * self.feature_scale, self.schedule.sigma(t))

    def reschedule(self, schedule: Schedule) -> EnergyNetwork:
        """The same network seen through another schedule: exact, since it knows only σ/α."""
        return replace(self, schedule=schedule)

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.log_density_at(x, self.schedule.alpha(t), self.schedule.sigma(t))

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        alpha = self.schedule.alpha(t)
        z, root, sigma = self._standardised(x, alpha, self.schedule.sigma(t))
        slope = jax.grad(self._residual)(z, alpha, sigma)
        signal = alpha * self.std / root
        return self.mean + self.std * (signal * z - sigma / root * signal**2 * slope)

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        alpha = self.schedule.alpha(t)
        z, root, sigma = self._standardised(x, alpha, self.schedule.sigma(t))
        slope = jax.grad(self._residual)(z, alpha, sigma)
        return sigma / root * (z + self._prefactor(alpha, sigma, root) * slope)

    def _standardised(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, ...]:
        """z, √v, and σ kept within what was trained: below σ_min the density is that of σ_min."""
        sigma = jnp.maximum(sigma, alpha * self.sigma_range[0])
        root = jnp.hypot(alpha * self.std, sigma)
        return (x - alpha * self.mean) / root, root, sigma

    def _prefactor(self, alpha: jax.Array, sigma: jax.Array, root: jax.Array) -> jax.Array:
        return alpha * self.std / sigma * (alpha * self.std / root) ** 2

    def _residual(self, z: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        low, high = self.sigma_range
        condition = jnp.clip(jnp.log(sigma / alpha), math.log(low), math.log(high))
        f = nnx.merge(self.graphdef, self.state)(z, condition)
        return HEADS[self.head](z, f)
