r"""One function out of any network, whatever it was written in.

    f(x, c) = apply(θ, x, c),    θ a pytree of arrays,   ``apply`` a static function.

The arrays of a Flax NNX or Equinox module are separated from its structure once, here, so
that inside loops a network is an ordinary pytree of arrays: traced, differentiable, and
replaceable without another compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx

__all__ = ["Network", "wrap"]


class Network(eqx.Module):
    """A network as parameters and a function of them.

    Attributes:
        params: θ, a pytree of arrays.
        apply: called as ``apply(params, *inputs)``; static, equal for networks of one structure.
    """

    params: Any
    apply: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """The network's output at ``inputs``."""
        return self.apply(self.params, *inputs)

    @property
    def module(self) -> nnx.Module | None:
        """The Flax NNX module that it was, with its weights as they are now; None for other frameworks'."""
        return nnx.merge(self.apply.graphdef, self.params) if isinstance(self.apply, _FlaxNNX) else None


def wrap(network: Any) -> Network:
    """``network`` as one function of its parameters and inputs.

    Args:
        network: a Flax NNX module; a Flax Linen module with its variables, ``(module, variables)``;
            an Equinox module; or ``(apply, params)`` with ``apply(params, x, c)``. Modules are called
            as ``module(x, c)``, and all of them with the label last if they are class-conditional.
            Switch dropout off first, by the framework's own means.

    Raises:
        TypeError: for anything else.
    """
    match network:
        case Network():
            return network
        case nnx.Module():
            graphdef, state = nnx.split(network)
            return Network(state, _FlaxNNX(graphdef))
        case eqx.Module() if callable(network):
            params, static = eqx.partition(network, eqx.is_array)
            return Network(params, _Equinox(static))
        case (linen.Module() as module, variables):
            return Network(jax.tree.map(jnp.asarray, variables), _FlaxLinen(module))
        case (function, params) if callable(function):
            return Network(jax.tree.map(jnp.asarray, params), function)
    raise TypeError(
        "a network is a Flax NNX module, a Flax Linen (module, variables), an Equinox module, or (apply, params) "
        f"with apply(params, x, c); got {type(network).__name__}: {network!r:.200}. A function without parameters "
        "is (lambda _, x, c: f(x, c), ())."
    )


@dataclasses.dataclass(frozen=True)
class _FlaxNNX:
    graphdef: Any

    def __call__(self, state: Any, *inputs: jax.Array) -> Any:
        return nnx.merge(self.graphdef, state)(*inputs)


@dataclasses.dataclass(frozen=True)
class _FlaxLinen:
    module: linen.Module

    def __call__(self, variables: Any, *inputs: jax.Array) -> Any:
        return self.module.apply(variables, *inputs)


@dataclasses.dataclass(frozen=True)
class _Equinox:
    static: Any

    def __call__(self, params: Any, *inputs: jax.Array) -> Any:
        return eqx.combine(params, self.static)(*inputs)
