r"""Networks that take less memory: half the bits, or activations computed twice.

A gradient through a deep network keeps the activations of every layer until it comes back to it. With *remat* each
block keeps its input only and is computed again on the way back: memory falls from that of all layers to
that of one and the blocks' inputs, for about a third more time. XLA on CPU schedules for speed and undoes most of it,
unless told not to by ``XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false``.

In bfloat16 a network has eight bits of mantissa. What it is told of the noise, its fixed frequencies and what
it returns stay in float32, and so does all that is made of it: energies, scores, weights.

References:
    Chen et al., Training deep nets with sublinear memory cost, 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lehr.networks.wrap import Network, wrap

__all__ = ["lighten"]

T = TypeVar("T")


def lighten(potential: T, *, dtype: DTypeLike | None = None, remat: bool = False) -> T:
    """A potential whose networks take less memory, and otherwise the same.

    Args:
        potential: any, or a product or mixture of them: every network in it is lightened.
        dtype: of the networks' weights and activations, such as ``jnp.bfloat16``; as they are if None. Weights
            are converted; x on its way in, the output back to float32. A network that mixes in float32 numbers of its
            own computes in float32 from there on; those of this package do not.
        remat: compute the activations of each block again for its gradient, rather than keep them. Of Flax NNX
            modules that hold their blocks in ``nnx.List``, as all of this package do.

    Raises:
        TypeError: if there is no network in it, ``dtype`` is no floating-point type, or ``remat`` is asked of a
            network of another framework, which has a remat of its own.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type such as jnp.bfloat16; got {dtype!r}.")
    leaves, treedef = jax.tree.flatten(potential, is_leaf=_is_network)
    if not any(map(_is_network, leaves)):
        raise TypeError(f"there is no network in {potential!r:.200} to lighten.")
    lighter = [_lighten(leaf, dtype, remat) if _is_network(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, lighter)


def _is_network(node: Any) -> bool:
    return isinstance(node, Network)


def _lighten(network: Network, dtype: DTypeLike | None, remat: bool) -> Network:
    if remat:
        module = network.module
        if module is None:
            raise TypeError("remat is for Flax NNX modules; other frameworks have one of their own, to be used before.")
        _recompute(module)
        network = wrap(module)
    if dtype is None:
        return network
    is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return Network(
        jax.tree.map(lambda leaf: _cast(leaf, dtype), network.params, is_leaf=is_param), _Cast(network.apply, dtype)
    )


def _cast(leaf: Any, dtype: DTypeLike) -> Any:
    """Trained weights in ``dtype``; what a module fixed, such as frequencies, as it is."""
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(_cast(leaf[...], dtype)) if isinstance(leaf, nnx.Param) else leaf
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@dataclasses.dataclass(frozen=True)
class _Cast:
    """A network in a type of its own: x goes in as that, and what comes out is float32 again."""

    apply: Any
    dtype: Any

    def __call__(self, params: Any, x: jax.Array, *told: jax.Array) -> jax.Array:
        return self.apply(params, x.astype(self.dtype), *told).astype(x.dtype)


def _recompute(module: nnx.Module) -> None:
    """Put every block of ``module``, however deep, behind a :class:`_Recomputed`; in place."""
    for _, value in list(vars(module).items()):
        if isinstance(value, nnx.List):
            for i, block in enumerate(value):
                if any(isinstance(part, nnx.List) for part in vars(block).values()):
                    _recompute(block)
                else:
                    value[i] = _Recomputed(block)
        elif isinstance(value, nnx.Module):
            _recompute(value)


class _Recomputed(nnx.Module):
    """A block whose activations are not kept."""

    def __init__(self, block: nnx.Module) -> None:
        self.block = block

    def __call__(self, *inputs: Any) -> Any:
        graphdef, state = nnx.split(self.block)
        return jax.checkpoint(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))(state, *inputs)
