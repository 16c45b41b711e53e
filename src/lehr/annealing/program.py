"""A path made ready for the level loop: its structure and its data, with what is static and the levels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lehr.annealing.ladder import Ladder
from lehr.annealing.loop import Anneal, anneal
from lehr.annealing.plan import Plan
from lehr.annealing.tuning import Tuning
from lehr.programs.closure import ALWAYS, Constants, Structure, close
from lehr.programs.path import Path
from lehr.programs.reverse import Level

__all__ = ["Program"]

_compiled = jax.jit(anneal, static_argnames=("structure", "plan"))


class Program(NamedTuple):
    """What is known of a run before it is compiled.

    Attributes:
        path: bound, and ending where the ladder does.
        plan: what is static.
        ladder: the levels.
        structure: the path's functions.
        constants: its data.
    """

    path: Path
    plan: Plan
    ladder: Ladder
    structure: Structure
    constants: Constants

    @classmethod
    def of(cls, path: Path, plan: Plan, ladder: Ladder, *optional: str) -> Program:
        """The program of a path that ends where the ladder does.

        Args:
            path: bound.
            plan: what is static.
            ladder: the levels.
            optional: functions of the path besides those that the plan needs.
        """
        return cls(path, plan, ladder, *close(path, (*ALWAYS, *_needed(path, plan), *optional)))

    def exchange(self, old: Any, new: Any) -> Program:
        """The same program with other data: what is an array of ``old`` gives place to that of ``new``.

        Args:
            old: arrays among the arguments of the path; any tree.
            new: others of the same shapes and types.

        An array that the model made of ``old`` before it was traced stays as it is; :meth:`is_like` tells.
        """
        places = {id(a): b for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)}
        swap = lambda tree: jax.tree.map(lambda leaf: places.get(id(leaf), leaf), tree)  # noqa: E731
        return self._replace(path=self.path.with_data(swap), constants=swap(self.constants))

    def is_like(self, other: Program) -> bool:
        """Whether the two compute the same, with the same data."""
        mine, theirs = (jax.tree.leaves((p.constants, p.ladder.times)) for p in (self, other))
        return (
            self.structure == other.structure
            and self.plan == other.plan
            and len(mine) == len(theirs)
            and all(_same(a, b) for a, b in zip(mine, theirs, strict=True))
        )

    @property
    def dimension(self) -> int:
        """D: how many numbers a position has, over all latent sites."""
        start = jax.eval_shape(self.structure.init, self.constants, jax.random.key(0), jnp.ones(()))
        return sum(leaf.size for leaf in jax.tree.leaves(start))

    def anneal(self, plan: Plan, tuning: Tuning, rng_key: jax.Array, threshold: float) -> Anneal:
        """The level loop, compiled if it is new, and run to its end; see :func:`~lehr.annealing.loop.anneal`."""
        times = self.ladder.times
        return jax.block_until_ready(
            _compiled(
                structure=self.structure,
                plan=plan,
                constants=self.constants,
                times=times,
                levels=Level.of(self.path.schedule, times),
                tuning=tuning,
                rng_key=rng_key,
                threshold=jnp.asarray(threshold, float),
            )
        )


def _same(a: Any, b: Any) -> bool:
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(np.asarray(a), np.asarray(b))


def _needed(path: Path, plan: Plan) -> list[str]:
    """What the loop needs of a path besides what every run needs."""
    needed = ["unknown"] if path.score_sites else []
    if plan.follows_path:
        needed += ["reverse_step", "start_density"] + (["others"] if path.other_sites else [])
    elif plan.predictor is not None:
        needed += ["copies"] if plan.counts_noise else ["copies", "moments"]
    return needed
