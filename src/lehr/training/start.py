r"""What a training starts from: an untrained potential with the data's own scales written in.

The exact density that an energy corrects is made of what samples tell directly: a few Gaussians for each
class, one for each cluster that k-means finds in it,

    q(x | k) = Σ_j w_kj N(m_kj, S_kj + δ² I),
    S_kj = shrunk(Σ_kj, n_kj, shrunk(Σ_k, n_k, Σ)),        shrunk(Σ, n, prior) = (n Σ + ν prior)/(n + ν),

of which Σ_kj is the cluster's own covariance, Σ_k the mean of these over the class and Σ that over all: a cluster
has few examples for its many pixels, and what is known of its kin counts as ν = 2 d examples more. Every component
widens with the noise exactly as it should. Of 8×8 digits not seen before such a density knows, at σ = .3, all but
two of the nats that a trained network does, and beyond σ = 1 all of them: so little is left for the network there
that its time derivative has little to get wrong. Less shrinkage (ν = d/2) is the better density by itself, and worse
to start from: it knows its examples by heart, which a network does not unlearn.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike
from scipy.cluster.vq import ClusterError, kmeans2

from lehr.networks import Described, ElementwiseMLP, PatchMixer, ResidualMLP
from lehr.potentials.analytic import ExactPotential, Gaussian, GaussianMixture
from lehr.potentials.network import EnergyNetwork
from lehr.potentials.score_network import ScoreNetwork
from lehr.predictions import Prediction
from lehr.schedules import Schedule, VPCosine

__all__ = ["gaussian_base", "suitable_network", "untrained_energy", "untrained_score"]

COMPONENTS = 5  # for each class, where it has examples enough
EXAMPLES = 25  # of a class for each of its components
PRIOR = 2.0  # ν/d
MOST_NUMBERS = 2**18  # in all their covariances: each is a multiplication whenever the density is evaluated
RESTARTS = 10  # of k-means, the tightest of which is kept
LEAST_STD = 1e-3  # δ, for pixels that never change, in data units
MOST_DIMENSIONS = 256  # of events whose covariances are written in: they are as many as the dimensions squared
IMAGE_SIDE = 12  # images at least as large are for a mixer of patches, others for a perceptron


def gaussian_base(events: ArrayLike, labels: ArrayLike | None = None) -> ExactPotential:
    """The Gaussians of the data, a density of the flattened event.

    Args:
        events: x₀, shape (N, *event_shape).
        labels: 0 to K − 1, each present, shape (N,); none for one class.

    Returns:
        Of one component a :class:`~lehr.Gaussian`; otherwise a :class:`~lehr.GaussianMixture`, whose components lie
        class after class, as many of each.

    Raises:
        ValueError: if a class is missing.
    """
    x = np.asarray(events, np.float64)
    x = x.reshape(len(x), -1)
    y = np.zeros(len(x), int) if labels is None else np.asarray(labels)
    counts = np.bincount(y)
    if np.any(counts == 0):
        raise ValueError(f"every class needs examples; there are none of {np.flatnonzero(counts == 0).tolist()}.")
    (num_classes,), d = counts.shape, x.shape[1]
    most = min(counts.min() // EXAMPLES, MOST_NUMBERS // (num_classes * d**2), COMPONENTS)
    rng = np.random.default_rng(0)
    clusters = [part for k in range(num_classes) for part in _clusters(x[y == k], max(int(most), 1), rng)]
    locs = np.stack([part.mean(0) for part in clusters])
    own = np.stack([np.atleast_2d(np.cov(part.T, bias=True)) for part in clusters]).reshape(num_classes, -1, d, d)
    sizes = np.array([len(part) for part in clusters]).reshape(num_classes, -1)
    of_class = np.einsum("kj,kjab->kab", sizes / counts[:, None], own)
    of_all = np.tensordot(counts / len(x), of_class, 1)
    shrunk = _shrunk(own, sizes, _shrunk(of_class, counts, of_all)[:, None]).reshape(-1, d, d)
    factors = np.linalg.cholesky(shrunk + LEAST_STD**2 * np.eye(d))
    return Gaussian(locs[0], factors[0]) if len(locs) == 1 else GaussianMixture(locs, factors, sizes.ravel() / len(x))


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


def _shrunk(covariances: np.ndarray, sizes: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(n Σ + ν prior)/(n + ν) for each n of ``sizes``, the covariances' leading axes."""
    share = (sizes / (sizes + PRIOR * covariances.shape[-1]))[..., None, None]
    return share * covariances + (1 - share) * prior


def _clusters(x: np.ndarray, k: int, rng: np.random.Generator) -> list[np.ndarray]:
    """x in k parts, none empty, whose members lie near each other."""
    best, least = np.arange(len(x)) % k, np.inf
    for _ in range(RESTARTS if k > 1 else 0):
        try:
            centres, of = kmeans2(x, rng.choice(x, k, replace=False), iter=50, minit="matrix", missing="raise")
        except ClusterError:
            continue
        spread = float(np.sum((x - centres[of]) ** 2))
        if spread < least:
            best, least = of, spread
    return [x[best == j] for j in range(k)]


def _pooled_std(x: np.ndarray) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.var(x, 0))))
