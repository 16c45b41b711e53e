"""Class labels: 0 to K − 1, and K for "any class"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from lehr.potentials.base import concrete

__all__ = ["check_label"]


def check_label(label: ArrayLike, num_classes: int) -> jax.Array:
    """``label`` as a scalar integer array; refused when it is known now and is no class.

    Args:
        label: 0 to K − 1, or K, the null label, for any class; it may be traced.
        num_classes: K.

    Raises:
        ValueError: if there are no classes, for a label that is no scalar, or out of range.
        TypeError: for a label that is not an integer.
    """
    if num_classes == 0:
        raise ValueError("this network was made without classes (num_classes = 0), so there is no label to fix.")
    label = jnp.asarray(label)
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(f"a label is an integer from 0 to {num_classes}; got one of type {label.dtype}.")
    if label.shape != ():
        raise ValueError(f"expected one label, a scalar; got shape {label.shape}. Use jax.vmap for several.")
    known = concrete(label)
    if known is not None and not 0 <= known <= num_classes:
        raise ValueError(
            f"labels run from 0 to {num_classes - 1}, and {num_classes} means any class; got {int(known)}."
        )
    return label
