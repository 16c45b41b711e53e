r"""Discrete latents, summed out and drawn back.

With z the discrete latents of finite support, each level of the path is

    log π_t(x, θ) = log Σ_z exp log π_t(x, θ, z),

one term for each of their joint values, side by side in one batch. Gradients, steps and weights
then see no z at all; at the end z is drawn from its conditional given x and θ. What a term costs
is an evaluation of every factor that depends on z, so the joint support must be small; and it asks
for energies of known normalisers, since a score knows nothing of the mass of its label.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["LARGEST", "joint_support"]

LARGEST = 256  # joint values of the discrete latents
Values = dict[str, jax.Array]


def joint_support(sites: list[Any]) -> Values:
    """All joint values of the discrete latents: by name, an array (n, *shape of the site).

    Raises:
        ValueError: where there are infinitely many, or more than :data:`LARGEST`.
    """
    names, axes, shapes = [], [], []
    for site in sites:
        name, shape = site["name"], jnp.shape(site["value"])
        if site["fn"].event_shape:
            raise ValueError(f"the discrete latent site {name!r} is a vector; write it as scalars in a plate.")
        try:
            support = np.asarray(site["fn"].enumerate_support(expand=False)).ravel()
        except (NotImplementedError, jax.errors.JAXTypeError) as error:
            raise ValueError(
                f"the discrete latent site {name!r}, a {type(site['fn']).__name__}, has a support that cannot be "
                "listed, and gradients cannot move it: bound it (a Categorical, a DiscreteUniform), or sum it out in "
                "the model, for instance by numpyro.distributions.MixtureGeneral."
            ) from error
        names.append(name)
        axes += [support] * math.prod(shape)
        shapes.append(shape)
    total = math.prod(len(axis) for axis in axes)
    if total > LARGEST:
        listed = ", ".join(f"{n!r} of shape {s}" for n, s in zip(names, shapes, strict=True))
        raise ValueError(
            f"the discrete latents ({listed}) have {total:,} joint values, more than the {LARGEST} that can be summed "
            "over at every step. Where they are independent given the rest, sum each out in the model by "
            "numpyro.distributions.MixtureGeneral or MixtureSameFamily, or by lehr.Mixture."
        )
    table = np.array(list(itertools.product(*axes))).reshape(total, -1)
    values, start = {}, 0
    for name, shape in zip(names, shapes, strict=True):
        stop = start + math.prod(shape)
        values[name] = jnp.asarray(table[:, start:stop].reshape(total, *shape))
        start = stop
    return values
