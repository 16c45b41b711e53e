"""Randomness by name: a key for every stage, level, step and chain, folded from one seed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_key", "is_key", "per_chain"]


def as_key(rng_key: Any) -> jax.Array:
    """A typed key, from one, from a raw ``PRNGKey``, or from an integer seed.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(rng_key, int | np.integer):
        return jax.random.key(rng_key)
    if not isinstance(rng_key, jax.Array):
        raise TypeError(f"rng_key must be a JAX key, as from jax.random.key(0), or an integer; got {rng_key!r}.")
    return rng_key if is_key(rng_key) else jax.random.wrap_key_data(rng_key)


def is_key(leaf: Any) -> bool:
    """Whether ``leaf`` is a typed key, or an array of them."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def per_chain(rng_key: jax.Array, n: int) -> jax.Array:
    """One key for each of n chains, whatever their layout."""
    return jax.vmap(lambda i: jax.random.fold_in(rng_key, i))(jnp.arange(n))
