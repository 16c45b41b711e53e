"""A path made ready for the level loop: its structure and its data, with what is static and the levels."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lehr.annealing.keys import is_key
from lehr.annealing.ladder import Ladder
from lehr.annealing.loop import advance
from lehr.annealing.plan import Plan
from lehr.annealing.session import Part, Session
from lehr.annealing.state import Anneal, State, begin_run, finish, num_stages
from lehr.annealing.tuning import Tuning
from lehr.programs.closure import ALWAYS, Constants, Structure, close
from lehr.programs.path import Path
from lehr.programs.ratios import Level, is_small

__all__ = ["Program", "digest"]

_begin = jax.jit(begin_run, static_argnums=(0, 1))
_advance = jax.jit(advance, static_argnums=(0, 1))
_finish = jax.jit(finish, static_argnums=0)


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

    def facts(self, **others: Any) -> dict[str, Any]:
        """What determines a run: the model, its data, the plan and the levels, and ``others``; in JSON's types."""
        plan = {name: value for name, value in self.plan._asdict().items() if name != "layout"}
        plan |= {name: repr(plan[name]) for name in ("kernel", "predictor")}
        times = np.asarray(self.ladder.times)
        return {
            "model": self.structure.digest,
            "data": digest(self.constants),
            "num_levels": times.size,
            "ladder": digest(times),
            "precision": str(times.dtype),
            **plan,
            **others,
        }

    def anneal(
        self, plan: Plan, tuning: Tuning, rng_key: jax.Array, threshold: float, session: Session, part: str
    ) -> State:
        """The level loop from its beginning to its end, as one part of a session."""
        times, layout = self.ladder.times, plan.layout
        noise = Level.of(self.path.schedule, times)
        sigma = np.exp(-np.asarray(noise.log_snr) / 2)
        constants, times, noise, tuning, rng_key, share = layout.shared(
            (self.constants, times, noise, tuning, rng_key, jnp.asarray(threshold, float))
        )
        start = partial(_begin, self.structure, plan, constants, times, tuning, rng_key)

        def go_on(state: State, stop: int) -> State:
            to = layout.shared(jnp.asarray(stop))
            return _advance(self.structure, plan, constants, times, noise, tuning, rng_key, share, state, to)

        def stand(state: State) -> dict[str, float]:
            k = min(int(state.done), len(self.ladder)) - 1
            acceptance, ess = np.asarray(state.levels.acceptance_rate), np.asarray(state.levels.ess)
            known = plan.num_steps > 0 and ("unknown" not in self.structure or plan.kernel.integrates_score)
            return {
                "sigma": float(sigma[k]),
                "acceptance_rate": float(acceptance[k]) if known else float("nan"),
                "ess": float(ess[k]) / plan.num_chains,
            }

        total = num_stages(plan, len(self.ladder))
        like = partial(layout.like, start)
        return session.run(Part(part, total, start, like, go_on, stand))

    def outcome(self, plan: Plan, rng_key: jax.Array, state: State) -> Anneal:
        """What is left of a run that has ended, as numpy arrays."""
        return plan.layout.gathered(_finish(plan, plan.layout.shared(rng_key), state))


def digest(tree: Any) -> str:
    """A hash of all numbers in ``tree``."""
    seen, said = set(), hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if id(leaf) not in seen:  # functions share their constants
            seen.add(id(leaf))
            value = _numbers(leaf)
            said.update(f"{value.dtype}{value.shape}".encode())
            said.update(np.ascontiguousarray(value).tobytes())
    return said.hexdigest()[:16]


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(_numbers(a), _numbers(b))


def _numbers(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def _needed(path: Path, plan: Plan) -> list[str]:
    """What the loop needs of a path besides what every run needs."""
    needed = ["unknown"] if path.score_sites else []
    if plan.follows_path:
        needed += ["expect", "reverse_step", "start_density"] + (["others"] if path.other_sites else [])
        needed += ["correction"] if plan.weights == "path" and is_small(path) else []
    elif plan.predictor is not None:
        needed += ["copies"] if plan.counts_noise else ["copies", "moments"]
    return needed
