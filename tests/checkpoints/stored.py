"""The stored checkpoints, and how they are evaluated and compared."""

import functools
from pathlib import Path

import jax
import numpy as np

import lehr

DATA = Path(__file__).parent / "data"
DIGITS, RANDOM = DATA / "digits8", DATA / "tiny-random"


def compiled(function, *arguments):
    """``function`` for such ``arguments``, not optimised: compiling is what takes the time."""
    return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})


@functools.cache
def original():
    return lehr.load(RANDOM)


def same(p, atol=0.0):
    """Whether ``p`` has the parameters of the stored model with random weights."""
    for a, b in zip(jax.tree.leaves(p.network), jax.tree.leaves(original().network), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
