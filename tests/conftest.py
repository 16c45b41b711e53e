"""Settings shared by all tests: a persistent compilation cache, and the figures' common targets."""

import os
import warnings
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # each module forgets, see below
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
os.environ.setdefault("MPLBACKEND", "Agg")
# XLA's pool of threads for matrix products on CPU has been seen to stand still for ever (docs/libraries.md).
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ 0.x announces its successor when it is first imported
    import arviz  # noqa: F401

import gc

import jax
import jax.numpy as jnp
import pytest

import lehr


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of a module's compiled programs: a process may map only so many pieces of code (65,530 by default)."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def ring() -> lehr.GaussianMixture:
    """Eight Gaussians of std .03 on a circle of radius .5."""
    angle = 2 * jnp.pi * jnp.arange(8) / 8
    return lehr.GaussianMixture(0.5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1), 0.03)


@pytest.fixture(scope="session")
def bar() -> lehr.Uniform:
    """Uniform on |x| < .2, |y| < 1."""
    return lehr.Uniform([-0.2, -1.0], [0.2, 1.0])
