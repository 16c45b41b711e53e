"""More events than there are: each moved along the lines to events that are like it.

A network that is trained long enough on few events learns them by heart: its density is then
that of the training set, too sure of every event that it has not seen. What is put in instead
are

    x + u (x' − x),      u uniform in [−r, r],    x' one of the k nearest of the same class,

so that the cloud around each event lies along the manifold of the data, which the lines to its
neighbours span, and not across it. The mean stays; the covariance grows by r²/3 times that of
neighbours' differences. Each coordinate stays within the range that it has in the data.

The further the reach r, the less a network holds on to each event, and the less it knows of where
the data end; from a long one to a shorter one it learns both.

Reference:
    Vincent & Bengio, Manifold Parzen windows, NeurIPS 2003.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import KDTree

__all__ = ["nearest", "spread"]


def nearest(events: np.ndarray, labels: np.ndarray | None, k: int) -> np.ndarray:
    """The k nearest other events of the same class, by Euclidean distance.

    Args:
        events: shape (N, *event_shape).
        labels: shape (N,), or None for one class.
        k: how many.

    Returns:
        Their indices, shape (N, k).

    Raises:
        ValueError: if a class has no more than k events.
    """
    flat = np.asarray(events).reshape(len(events), -1)
    classes = np.zeros(len(flat), int) if labels is None else np.asarray(labels)
    found = np.empty((len(flat), k), int)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        if len(members) <= k:
            raise ValueError(f"class {label} has {len(members)} events; each needs {k} neighbours beside itself.")
        near = KDTree(flat[members]).query(flat[members], range(1, k + 2))[1]
        others = [row[row != own][:k] for own, row in enumerate(near)]  # an event may have a twin at distance 0
        found[members] = members[np.stack(others)]
    return found


def spread(
    rng_key: jax.Array, n: int, events: jax.Array, near: np.ndarray, reach: float
) -> tuple[jax.Array, jax.Array]:
    """n events drawn with replacement and moved.

    Args:
        rng_key: a JAX key.
        n: how many.
        events: shape (N, *event_shape).
        near: indices of their neighbours, shape (N, k).
        reach: r, of the way to a neighbour, there or away from it.

    Returns:
        The indices of the events that were drawn, shape (n,), and where they went, shape (n, *event_shape).
    """
    key_event, key_neighbour, key_way = jax.random.split(rng_key, 3)
    i = jax.random.randint(key_event, (n,), 0, events.shape[0])
    j = jnp.asarray(near)[i, jax.random.randint(key_neighbour, (n,), 0, near.shape[1])]
    way = jax.random.uniform(key_way, (n,), minval=-reach, maxval=reach)
    moved = events[i] + way.reshape(n, *[1] * (events.ndim - 1)) * (events[j] - events[i])
    return i, jnp.clip(moved, events.min(0), events.max(0))
