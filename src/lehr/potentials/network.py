r"""Energies made of a network.

With the data's mean m, standard deviation s, and an exact density q written in by hand,

    log p_t(x) = log q_t(x) − (α s/σ)(s² α²/v) F_θ(z, c) ,    v = α² s² + σ²,
    z = (x − α m)/√v,    c = log(σ/α),

so that the network F learns only what q lacks, on an input of unit variance. Where no data are a network
says anything, and at little noise it says it loudly: F can be bounded, F/√(1 + (F/limit)²), so that far
from the data log p is log q and no more than limit · s/σ. q is N(m, s²)
unless something nearer to the data is known: its Gaussian with all covariances, or a mixture
of such Gaussians, one or several for each class. The prefactor makes F of order one everywhere: near the data a log
density grows like 1/σ, and far into the noise the third cumulant, the first that a Gaussian
lacks, decays like (α s/σ)³. The density therefore ends, at t = 1, in one whose constant is
known; if the time derivative is trained too (:mod:`lehr.training.dual`), the energy comes
out normalised. c is clipped to the range that was trained. What is then still wrong with its
normaliser is a function of the noise level only, log Z(c), and can be measured and taken away
(:mod:`lehr.training.normalise`): ``log_normalizer`` holds it at levels uniform in c.

**Classes.** One network holds p(x | label) for K labels and, under the null label K, p(x).
:meth:`EnergyNetwork.given` fixes the label, a traceable integer.

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
from numpy.typing import ArrayLike

from lehr.networks.mlp import saturate
from lehr.networks.wrap import Network, wrap
from lehr.potentials.analytic import ExactPotential, Gaussian, GaussianMixture
from lehr.potentials.base import EnergyPotential, Moments, check_positive, replace
from lehr.potentials.labels import check_label
from lehr.schedules import Schedule, VPCosine

__all__ = ["EnergyNetwork"]

HEADS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "scalar": lambda z, f: f,
    "inner": lambda z, f: jnp.vdot(z, f),
    "l2": lambda z, f: jnp.vdot(f, f) / 2,
    "dae": lambda z, f: jnp.vdot(z - f, z - f) / 2,
}


class EnergyNetwork(EnergyPotential):
    """A scalar energy made of a Flax NNX network and of the exact density that it corrects.

    Args:
        network: a module called as ``network(z, c)`` with z of shape ``event_shape`` and unit
            variance and c = log(σ/α) a scalar; it returns a scalar (``head="scalar"``) or an
            array of the shape of z (the other heads). One with an attribute ``num_classes`` = K > 0
            is called as ``network(z, c, label)``, with the label K for "any class".
        schedule: the schedule through which it is seen. The network knows only σ/α, so any will do.
        event_shape: shape of x.
        head: how the output becomes a scalar F: ``"scalar"`` F = f, ``"inner"`` ⟨z, f⟩,
            ``"l2"`` ½‖f‖², ``"dae"`` ½‖z − f‖².
        mean: m, the data's mean, () or event-shaped, in data units.
        std: s > 0, the data's standard deviation, pooled over coordinates, in data units.
        base: q, an exact density of the flattened event in data units; N(m, s²) by default. For a
            network with classes a :class:`~lehr.GaussianMixture` has as many components for each of
            the K classes, which lie class after class.
        feature_scale: standard deviation of the data's finest feature, in data units; sets the
            step size at the clean end. Defaults to ``std``.
        sigma_range: the trained range of σ/α, which c is clipped to.
        limit: where F begins to saturate; it is not bounded if left out. Of a trained network it stays what it was in
            the training.
        num_classes: K, of a class-conditional network; by default what the network itself says, or 0.
        calibrated: whether the time derivative was trained too, so that c(t) = 0.
        log_normalizer: log Z at L ≥ 2 values of log σ/α, uniform over ``sigma_range`` and rising, shape (L,), or
            (K + 1, L) for a network with classes; it is subtracted, interpolated linearly. Zero if left out.

    Raises:
        ValueError: for an unknown head, scales that are not positive, a base of another size, or a
            ``log_normalizer`` that does not fit the classes.
    """

    network: Network
    base: ExactPotential
    mean: jax.Array
    std: jax.Array
    feature_scale: jax.Array
    label: jax.Array | None
    log_normalizer: jax.Array | None
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)
    head: str = eqx.field(static=True)
    sigma_range: tuple[float, float] = eqx.field(static=True)
    limit: float | None = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    calibrated: bool = eqx.field(static=True)

    def __init__(
        self,
        network: Any,
        schedule: Schedule | None = None,
        event_shape: tuple[int, ...] = (2,),
        *,
        head: Literal["scalar", "inner", "l2", "dae"] = "scalar",
        mean: ArrayLike = 0.0,
        std: ArrayLike = 1.0,
        base: ExactPotential | None = None,
        feature_scale: ArrayLike | None = None,
        sigma_range: tuple[float, float] = (2e-3, 20.0),
        limit: float | None = None,
        num_classes: int | None = None,
        calibrated: bool = False,
        log_normalizer: ArrayLike | None = None,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"unknown energy head {head!r}; expected one of {', '.join(HEADS)}.")
        if not 0 < sigma_range[0] < sigma_range[1]:
            raise ValueError(f"sigma_range must be 0 < low < high; got {sigma_range}.")
        if limit is not None and not limit > 0:
            raise ValueError(f"limit must be positive, or None for no bound; got {limit}.")
        self.network = wrap(network)
        self.num_classes = getattr(network, "num_classes", 0) if num_classes is None else num_classes
        self.mean = jnp.broadcast_to(jnp.asarray(mean, float), event_shape)
        self.std = check_positive("std", std)
        if self.std.shape != ():
            raise ValueError(f"std is pooled over coordinates, a scalar; got shape {self.std.shape}.")
        self.feature_scale = check_positive("feature_scale", std if feature_scale is None else feature_scale)
        self.schedule = VPCosine() if schedule is None else schedule
        self.event_shape = tuple(event_shape)
        if base is None:
            base = Gaussian(self.mean.ravel(), self.std)
        if base.event_shape != (self.mean.size,):
            raise ValueError(
                f"the base must be a density of the flattened event, of shape ({self.mean.size},); got "
                f"{type(base).__name__} of {base.event_shape}."
            )
        if self.num_classes and isinstance(base, GaussianMixture) and base.log_weights.size % self.num_classes:
            raise ValueError(
                f"a mixture as the base has as many components for each of the {self.num_classes} classes as for "
                f"every other; got {base.log_weights.size} in all. Give one Gaussian to use the same for all."
            )
        self.base = base.reschedule(self.schedule)
        self.label = None if self.num_classes == 0 else jnp.asarray(self.num_classes)
        self.log_normalizer = None if log_normalizer is None else jnp.asarray(log_normalizer, float)
        if self.log_normalizer is not None:
            rows, levels = self.log_normalizer.shape[:-1], self.log_normalizer.shape[-1:]
            expected = (self.num_classes + 1,) if self.num_classes else ()
            if rows != expected or levels < (2,):
                raise ValueError(
                    f"log_normalizer must have shape {(*expected, 'L')} with L >= 2 levels; got "
                    f"{self.log_normalizer.shape}."
                )
        self.head = head
        self.sigma_range = (float(sigma_range[0]), float(sigma_range[1]))
        self.limit = None if limit is None else float(limit)
        self.calibrated = calibrated

    @property
    def is_calibrated(self) -> bool:
        return self.calibrated

    def given(self, label: ArrayLike) -> EnergyNetwork:
        """p_t(x | label), the density of one class.

        Args:
            label: 0 to K − 1, or K for any class; a scalar integer, which may be traced.

        Raises:
            ValueError, TypeError: if the network has no classes, or the label is none of them.
        """
        return replace(self, label=check_label(label, self.num_classes))

    def log_density_at(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """log density of α x₀ + σ ε at x, as a function of α and σ.

        α = 1 is the frame in which the energy is trained: its derivative by log σ there is the
        one that dual score matching regresses.
        """
        z, root, sigma = self._standardised(x, alpha, sigma)
        exact = self._base().log_density_at(x.ravel(), alpha, sigma)
        return exact - self._prefactor(alpha, sigma, root) * self._residual(z, alpha, sigma) - self._log_z(alpha, sigma)

    def moments(self, t: ArrayLike) -> Moments:
        return jax.tree.map(lambda m: m.reshape(self.event_shape), self._base().moments(t))

    def width(self, t: ArrayLike) -> jax.Array:
        return jnp.hypot(self.schedule.alpha(t) * self.feature_scale, self.schedule.sigma(t))

    def reschedule(self, schedule: Schedule) -> EnergyNetwork:
        """The same network seen through another schedule: exact, since it knows only σ/α."""
        return replace(self, schedule=schedule, base=self.base.reschedule(schedule))

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.log_density_at(x, self.schedule.alpha(t), self.schedule.sigma(t))

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        alpha = self.schedule.alpha(t)
        z, root, sigma = self._standardised(x, alpha, self.schedule.sigma(t))
        slope = jax.grad(self._residual)(z, alpha, sigma)
        exact = self._base().denoise_at(x.ravel(), alpha, sigma).reshape(x.shape)
        return exact - self.std * sigma / root * (alpha * self.std / root) ** 2 * slope

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        alpha = self.schedule.alpha(t)
        z, root, sigma = self._standardised(x, alpha, self.schedule.sigma(t))
        slope = jax.grad(self._residual)(z, alpha, sigma)
        exact = self._base().noise_at(x.ravel(), alpha, sigma).reshape(x.shape)
        return exact + sigma / root * self._prefactor(alpha, sigma, root) * slope

    def _base(self) -> ExactPotential:
        """q, of the label's class where it is known by class."""
        if self.label is None or not isinstance(self.base, GaussianMixture):
            return self.base
        return self.base.given(self.label, self.num_classes)

    def _standardised(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, ...]:
        """z, √v, and σ kept within what was trained: below σ_min the density is that of σ_min."""
        sigma = jnp.maximum(sigma, alpha * self.sigma_range[0])
        root = jnp.hypot(alpha * self.std, sigma)
        return (x - alpha * self.mean) / root, root, sigma

    def _log_z(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        if self.log_normalizer is None:
            return jnp.zeros(())
        known = self.log_normalizer if self.label is None else self.log_normalizer[self.label]
        low, high = (math.log(s) for s in self.sigma_range)
        return jnp.interp(jnp.log(sigma / alpha), jnp.linspace(low, high, known.size), known)

    def _prefactor(self, alpha: jax.Array, sigma: jax.Array, root: jax.Array) -> jax.Array:
        return alpha * self.std / sigma * (alpha * self.std / root) ** 2

    def _residual(self, z: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        low, high = self.sigma_range
        condition = jnp.clip(jnp.log(sigma / alpha), math.log(low), math.log(high))
        told = (z, condition) if self.label is None else (z, condition, self.label)
        return saturate(HEADS[self.head](z, self.network(*told)), self.limit)
