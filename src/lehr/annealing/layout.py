r"""How chains lie on devices and in memory.

What is done to each chain by itself is mapped over a device's own chains, all at once or, where memory is
short, a batch at a time (:meth:`Layout.over`). No device waits there for another: a chain of NUTS that
turns late holds up its own device only. Means, quantiles and resampling are taken over the whole
array, and XLA moves what they need.

Chains of several processes lie on one mesh over all of their devices; what a host is to see is gathered first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lehr.annealing.keys import is_key

__all__ = ["AXIS", "Layout", "as_layout"]

AXIS = "chains"


class Layout(NamedTuple):
    """Hashable, static under ``jit``.

    Attributes:
        mesh: of devices, over one axis of which chains are spread; None for one device.
        axis: its name.
        max_batch: the most chains of a device that are worked on at once; None for all.
    """

    mesh: Mesh | None = None
    axis: str = AXIS
    max_batch: int | None = None

    @property
    def num_shards(self) -> int:
        """How many parts the chains are in."""
        return 1 if self.mesh is None else self.mesh.shape[self.axis]

    def over(self, function: Callable[..., Any], in_batches: bool = True) -> Callable[..., Any]:
        """``function`` of one chain as one of all chains, leaves (N, ...); what it closes over is every chain's."""

        def mapped(*arguments: Any) -> Any:
            n = jax.tree.leaves(arguments)[0].shape[0]
            if not in_batches or self.max_batch is None or self.max_batch >= n:
                return jax.vmap(function)(*arguments)
            return jax.lax.map(lambda each: function(*each), arguments, batch_size=_even(n, self.max_batch))

        if self.mesh is None:
            return mapped
        spec = PartitionSpec(self.axis)
        return jax.shard_map(mapped, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def shared(self, tree: Any) -> Any:
        """``tree`` on every device."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if not self.mesh.is_multi_process:
            return jax.device_put(tree, sharding)

        def one(leaf: Any) -> jax.Array:
            if is_key(leaf):
                return jax.jit(jax.random.wrap_key_data, static_argnames="impl")(
                    one(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
                )
            value = np.asarray(leaf)
            return jax.make_array_from_callback(value.shape, sharding, lambda where: value[where])

        return jax.tree.map(one, tree)

    def spread(self, tree: Any, axis: int | None = 0) -> Any:
        """``tree``, within a compiled program, with the chains along ``axis`` of its leaves spread over the devices.

        Without an axis it is on every device.
        """
        if self.mesh is None:
            return tree
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, self.axis)
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree)

    def like(self, make: Callable[[], Any]) -> Any:
        """What a tree that was kept is read onto: the shapes of what ``make`` makes; on a mesh, where it lies too."""
        return jax.eval_shape(make) if self.mesh is None else make()

    def gathered(self, tree: Any) -> Any:
        """``tree`` as numpy arrays, all of it in every process."""
        if self.mesh is not None and self.mesh.is_multi_process:
            return multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(np.asarray, tree)


def as_layout(sharding: Mesh | NamedSharding | None, max_batch: int | None, num_chains: int) -> Layout:
    """The layout that a user asked for.

    Args:
        sharding: a mesh with an axis ``"chains"``, or a sharding whose first dimension is spread over one axis.
        max_batch: the most chains of a device that are worked on at once, or None for all.
        num_chains: N.

    Raises:
        TypeError: for a sharding of another kind.
        ValueError: if it spreads no chains, or N is no multiple of its devices, or ``max_batch`` is not positive.
    """
    if max_batch is not None and (not isinstance(max_batch, int) or isinstance(max_batch, bool) or max_batch < 1):
        raise ValueError(f"max_batch is how many chains are worked on at once, at least 1, or None; got {max_batch!r}.")
    if sharding is None:
        return Layout(max_batch=max_batch)
    if isinstance(sharding, NamedSharding):
        mesh, axis = sharding.mesh, (tuple(sharding.spec) or (None,))[0]
    elif isinstance(sharding, Mesh):
        mesh, axis = sharding, AXIS
    else:
        raise TypeError(
            f"sharding must be a jax.sharding.Mesh or NamedSharding; got {sharding!r}. For all devices: "
            'jax.make_mesh((jax.device_count(),), ("chains",)).'
        )
    if not isinstance(axis, str) or axis not in mesh.shape:
        raise ValueError(
            f'chains are spread over one axis, named "{AXIS}" in a mesh and first in a NamedSharding; got {sharding}.'
        )
    if num_chains % mesh.shape[axis]:
        raise ValueError(
            f"{num_chains} chains do not divide evenly among the {mesh.shape[axis]} devices along {axis!r}; take a "
            "multiple."
        )
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return Layout(automatic, axis, max_batch)


def _even(n: int, most: int) -> int:
    """A batch of at most ``most`` that divides n, if there is one that is not much smaller."""
    return next((b for b in range(most, most // 2, -1) if n % b == 0), most)
