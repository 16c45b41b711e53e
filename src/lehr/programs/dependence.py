"""Which sites of a model depend on which: read off its jaxpr, with nothing computed.

A jaxpr that calls another (a jitted function, a loop) is taken at its word: what comes out of the
call depends on all that goes in. So a dependence may be seen that is none, and none is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Literal

__all__ = ["connected", "dependence"]


def dependence(function: Callable[[Any], Mapping[str, Any]], inputs: Mapping[str, Any]) -> dict[str, set[str]]:
    """The names of the inputs that each named output of ``function`` depends on.

    Args:
        function: from a dict of arrays to a dict of pytrees.
        inputs: arrays, or what has their shape and type, by name.
    """
    abstract = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in inputs.items()}
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(abstract)
    names = sorted(inputs)  # the order of a dict's leaves
    sources: dict[Any, set[str]] = {var: {name} for var, name in zip(traced.jaxpr.invars, names, strict=True)}

    def of(atoms: Any) -> set[str]:
        return set().union(*(sources.get(a, set()) for a in atoms if not isinstance(a, Literal)))

    for equation in traced.jaxpr.eqns:
        found = of(equation.invars)
        sources |= {var: found for var in equation.outvars}
    outputs = iter(traced.jaxpr.outvars)
    return {name: of([next(outputs) for _ in jax.tree.leaves(shapes[name])]) for name in sorted(shapes)}


def connected(links: Mapping[str, set[str]], start: set[str]) -> set[str]:
    """All names that can be reached from ``start``, where each link ties a name to a set of others."""
    reached, grown = set(start), True
    while grown:
        grown = False
        for name, others in links.items():
            tied = {name} | others
            if tied & reached and not tied <= reached:
                reached |= tied
                grown = True
    return reached
