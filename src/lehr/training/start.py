r"""What a training starts from: an untrained potential with the data's own scales written in.

The exact density that an energy corrects is made of what samples tell directly: one Gaussian
for each class,

    q(x | k) = N(m_k, (1 − ρ) Σ_k + ρ W + δ² I),        W = Σ_k π_k Σ_k,

whose covariance is drawn towards W, the mean of all classes', since a class has few
examples for its many pixels. Without classes it is the one Gaussian N(m, Σ + δ² I). On 8×8
digits it gains 64 nats of held-out log density on N(m, s² I) at σ = .05, and keeps each
class's constant right far into the noise, so that the network has little left to calibrate.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from lehr.networks import Described, ElementwiseMLP, PatchMixer, ResidualMLP
from lehr.potentials.analytic import ExactPotential, Gaussian, GaussianMixture
from lehr.potentials.network import EnergyNetwork
from lehr.potentials.score_network import ScoreNetwork
from lehr.predictions import Prediction
from lehr.schedules import Schedule, VPCosine

__all__ = ["gaussian_base", "suitable_network", "untrained_energy", "untrained_score"]

SHRINKAGE = 0.3  # ρ
LEAST_STD = 1e-3  # δ, for pixels that never change, in data units
MOST_DIMENSIONS = 256  # of events whose covariances are written in: they are as many as the dimensions squared
IMAGE_SIDE = 12  # images at least as large are for a mixer of patches, others for a perceptron


def gaussian_base(events: ArrayLike, labels: ArrayLike | None = None) -> ExactPotential:
    """The Gaussians of the data, a density of the flattened event.

    Args:
        events: x₀, shape (N, *event_shape).
        labels: 0 to K − 1, each present, shape (N,); none for one Gaussian.

    Raises:
        ValueError: if a class is missing.
    """
    x = np.asarray(events, np.float64).reshape(len(np.asarray(events)), -1)
    floor = LEAST_STD**2 * np.eye(x.shape[1])
    if labels is None:
        return Gaussian(x.mean(0), np.linalg.cholesky(_covariance(x) + floor))
    y = np.asarray(labels)
    counts = np.bincount(y)
    if np.any(counts == 0):
        raise ValueError(f"every class needs examples; there are none of {np.flatnonzero(counts == 0).tolist()}.")
    each = np.stack([_covariance(x[y == k]) for k in range(len(counts))])
    within = np.tensordot(counts / counts.sum(), each, 1)
    factors = np.linalg.cholesky((1 - SHRINKAGE) * each + SHRINKAGE * within + floor)
    return GaussianMixture(np.stack([x[y == k].mean(0) for k in range(len(counts))]), factors, counts / counts.sum())


def untrained_energy(
    network: Described, events: ArrayLike, labels: ArrayLike | None = None, **arguments: Any
) -> EnergyNetwork:
    """An energy that is, as yet, the Gaussians of the data; of large events the one of mean and pooled spread.

    Args:
        network: the network, in its first weights; a scalar :class:`~lehr.networks.ElementwiseMLP`, which sees all
            elements about one common mean, or any with an output of the event's shape.
        events: x₀, shape (N, *event_shape).
        labels: the classes, if the network has some.
        arguments: further ones of :class:`~lehr.EnergyNetwork`.
    """
    x = np.asarray(events)
    alike = isinstance(network, ElementwiseMLP)
    return EnergyNetwork(
        network,
        event_shape=x.shape[1:],
        mean=x.mean() if alike else x.mean(0),
        std=_pooled_std(x),
        base=gaussian_base(x, labels) if x[0].size <= MOST_DIMENSIONS else None,
        **{"head": "scalar" if alike else "inner", **arguments},
    )


def untrained_score(
    network: Described,
    events: ArrayLike,
    prediction: Prediction = "v",
    schedule: Schedule | None = None,
    **arguments: Any,
) -> ScoreNetwork:
    """A score with the data's mean and standard deviation.

    Args:
        network: the network, in its first weights.
        events: x₀, shape (N, *event_shape).
        prediction: what its output is; v̂ has unit variance at every level.
        schedule: the noise; the cosine by default.
        arguments: further ones of :class:`~lehr.ScoreNetwork`.
    """
    x = np.asarray(events)
    return ScoreNetwork(
        network,
        VPCosine() if schedule is None else schedule,
        x.shape[1:],
        prediction=prediction,
        mean=x.mean(0),
        std=_pooled_std(x),
        **arguments,
    )


def suitable_network(
    event_shape: tuple[int, ...], num_classes: int, std: float, seed: int = 0, *, alike: bool = False
) -> Described:
    """A network for events of this shape: a mixer for images of some size, else a perceptron.

    Args:
        event_shape: of x.
        num_classes: K, or 0.
        std: of the data, pooled.
        seed: of the first weights.
        alike: whether the events' elements are alike, as pixels are; of small events it is then an energy's network.
    """
    rngs = nnx.Rngs(seed)
    if len(event_shape) >= 2 and min(event_shape[:2]) >= IMAGE_SIDE:
        patch = next((p for p in (4, 3, 2) if event_shape[0] % p == 0 and event_shape[1] % p == 0), 1)
        return PatchMixer(event_shape, patch=patch, num_classes=num_classes, rngs=rngs)
    d = int(np.prod(event_shape))
    if alike:
        return ElementwiseMLP(d, data_std=std, num_classes=num_classes, rngs=rngs)
    return ResidualMLP(
        d,
        d,
        width=256,
        num_frequencies=4 * d,
        bandwidth=1.5,
        axis_aligned=True,
        reach=6.0,
        limit=2.0,
        data_std=std,
        num_classes=num_classes,
        rngs=rngs,
    )


def _covariance(x: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(x.T, bias=True))


def _pooled_std(x: np.ndarray) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.var(x, 0))))
