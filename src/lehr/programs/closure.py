r"""From a path that closes over data to a program that takes data.

A NumPyro model is a Python function that closes over its potentials, weights and
observations. Compiled as it stands, every array it touches would be a constant of the
program, and another observation another compilation. So the path's functions are traced to
jaxprs; the arrays that they close over become arguments, and what remains is the model's
*structure*. Two structures are equal when their jaxprs read the same, that of the gradient
included (custom derivative rules, which are opaque in the function's own jaxpr, are spelt
out there): then the compiled program of one may serve the other.

Arrays that a ``jax.jit`` or a custom derivative rule inside the model closes over cannot be
taken out; they belong to the structure, by value.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from lehr.programs.path import Path
from lehr.programs.ratios import correction, expect
from lehr.programs.reverse import reverse_step, start_density

__all__ = ["ALWAYS", "Constants", "Structure", "close"]

ALWAYS = ("log_density", "init", "log_start", "widths")  # what every run needs of a path

Constants = dict[str, list[Any]]


class Structure:
    """The functions of a path without its data; hashable, equal when the computations are.

    Each takes the constants first, and then what the path's own function takes; there are those that it was
    closed with. ``log_density`` is :meth:`Path.surrogate`.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]], diffusion_sites: tuple[str, ...], digest: str) -> None:
        self._functions = functions
        self.diffusion_sites = diffusion_sites
        self.digest = digest

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.__dict__["_functions"][name]
        except KeyError:
            raise AttributeError(f"this structure was closed without {name!r}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.digest == other.digest


def close(path: Path, names: Iterable[str] = ALWAYS) -> tuple[Structure, Constants]:
    """A bound path as structure and data.

    Args:
        path: bound.
        names: the functions to trace: those of :data:`ALWAYS`, and ``"unknown"``, ``"others"``, ``"copies"``,
            ``"moments"``, ``"expect"``, ``"reverse_step"``, ``"correction"``, ``"start_density"``.
    """
    key, t = jax.random.key(0), jax.numpy.ones(())
    position = jax.eval_shape(path.init, key, t)
    functions: dict[str, Callable[..., Any]] = {}
    constants: dict[str, list[Any]] = {}
    digest = hashlib.sha256()
    names = list(names)
    expected = kernels = None
    if "expect" in names:
        expected = jax.eval_shape(functools.partial(expect, path), position, t)
    if "correction" in names:
        kernels = jax.eval_shape(functools.partial(reverse_step, path), position, expected, position, t, t).kernels
    signatures = _signatures(path, position, key, t, expected, kernels)
    for name in names:
        function, arguments = signatures[name]
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        constants[name] = list(traced.consts)
        functions[name] = _open(name, traced.jaxpr, jax.tree.structure(shapes))
        differentiated = name in ("log_density", "unknown")
        spelt_out = jax.value_and_grad(functions[name], 1) if differentiated else functions[name]
        program = jax.make_jaxpr(spelt_out)(constants, *arguments)
        digest.update(name.encode() + re.sub(r"0x[0-9a-f]+", "", str(program)).encode())
        for unread in _unread(program):
            digest.update(unread)
    digest.update(repr(path.diffusion_sites).encode())
    return Structure(functions, path.diffusion_sites, digest.hexdigest()), constants


def _signatures(
    path: Path, position: Any, key: Any, t: Any, expected: Any, kernels: Any
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    return {
        "log_density": (path.surrogate, (position, t)),
        "init": (path.init, (key, t)),
        "log_start": (path.log_start, (position, t)),
        "widths": (path.widths, (position, t)),
        "unknown": (path.unknown, (position, t)),
        "others": (path.others, (position, t)),
        "copies": (path.copies, (position, t)),
        "moments": (path.moments, (position, t)),
        "expect": (functools.partial(expect, path), (position, t)),
        "reverse_step": (functools.partial(reverse_step, path), (position, expected, position, t, t)),
        "correction": (functools.partial(correction, path), (kernels, position, expected, t, t)),
        "start_density": (functools.partial(start_density, path), (position, t)),
    }


def _open(name: str, jaxpr: Any, treedef: Any) -> Callable[..., Any]:
    """``jaxpr`` as a function of the constants and of its own arguments."""

    def function(constants: Constants, *arguments: Any) -> Any:
        told, leaves = _within((constants[name], jax.tree.leaves(arguments)))
        return jax.tree.unflatten(treedef, jaxpr_as_fun(ClosedJaxpr(jaxpr, told))(*leaves))

    return function


def _within(tree: Any) -> Any:
    """``tree`` as a device sees it: within a ``shard_map`` what is closed over is still typed by the mesh outside, and
    a jaxpr, unlike a function of ``jax.numpy``, does not mend that."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    return jax.tree.map(jax.lax.optimization_barrier, tree)  # one by one: what has no derivative is to keep none


def _unread(program: Any) -> Iterator[bytes]:
    """What the text of a jaxpr leaves out: the arrays that it and the jaxprs in it hold, and who is called back."""
    for constant in getattr(program, "consts", ()):
        is_key = jax.numpy.issubdtype(constant.dtype, jax.dtypes.prng_key)
        yield np.asarray(jax.random.key_data(constant) if is_key else constant).tobytes()
    for equation in program.eqns:
        if "callback" in equation.params:
            yield str(equation.params["callback"]).encode()
        for inner in jax.tree.leaves(list(equation.params.values())):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from _unread(inner)
