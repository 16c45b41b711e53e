"""What every run in stages does to its state, a tree of arrays."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["put", "strong"]


def put(rows: Any, row: Any, i: jax.Array) -> Any:
    """``rows`` with ``row`` as the ith of each leaf."""
    return jax.tree.map(lambda all_, one: all_.at[i].set(one), rows, row)


def strong(state: Any) -> Any:
    """The same numbers without weak types, which would make the first segment of a run a program of its own."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state)
