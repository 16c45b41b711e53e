r"""Levels where a pilot's particles can follow: the times of :meth:`lehr.Ladder.adaptive`.

From level t' the next one, t, is the farthest at which (Σ W w)²/Σ W w² ≥ ess, with W the
normalised weights and w(t) the incremental ones, found by bisection in log-SNR under common random
numbers. What particles see of a long step may be too good to be true: path weights of a lone score are 1 however far
it goes, though their reverse kernels are approximations; and in many dimensions a proposal that misses modes is weighed
where it goes and not where it does not. So a step is at most :data:`LONGEST` in log-SNR. By path weights it is no
longer than what their correction, which tells how far off reverse kernels are, allows: :data:`FARTHEST_OFF`, root
mean square. Where modes part, that makes steps of .7 or so (by steps of .9 a rare event's evidence from scores gained
.015), and far from there long ones. Where nothing tells, a step by path weights is at most :data:`LONGEST_UNTOLD`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lehr.annealing.driver import PILOT_CHAINS
from lehr.annealing.drivers import AnnealedSMC
from lehr.annealing.entry import Entry, conditional_ess, target_at
from lehr.annealing.keys import as_key
from lehr.annealing.ladder import check_count, noisy_end
from lehr.annealing.mover import Mover
from lehr.annealing.plan import Plan
from lehr.annealing.start import begin
from lehr.annealing.tuning import SHORT_SHARE, curvature, pooled_scale
from lehr.annealing.weights import Weights, weigh
from lehr.kernels import Kernel
from lehr.programs.closure import Constants, Structure
from lehr.programs.ratios import Level, is_small

__all__ = ["adaptive_times"]

LONGEST, LONGEST_TOLD, LONGEST_UNTOLD = 1.0, 1.4, 0.5  # by energies; by path weights with a correction, without
FARTHEST_OFF = 0.1  # nats: of two modes that part, the log evidence is then .007 off
BISECTIONS = 9
WARMUP = 3


def adaptive_times(
    path: Any,
    ess: float,
    kernel: Kernel | None,
    weights: Weights | None,
    num_particles: int,
    num_steps: int | None,
    t_min: float | None,
    t_max: float,
    max_levels: int,
    rng_key: Any,
) -> np.ndarray:
    """The times of the levels, noisiest first; see :meth:`lehr.Ladder.adaptive`."""
    if not 0 < ess < 1:
        raise ValueError(f"ess is a share of the particles, between 0 and 1; got {ess!r}.")
    check_count("max_levels", max_levels)
    how: dict[str, Any] = {"num_steps": num_steps, "num_particles": num_particles, "weights": weights}
    driver = AnnealedSMC(path, kernel, **how, progress=False)
    program = driver.prepare(driver.path, t_min)
    path, structure, constants, plan = program.path, program.structure, program.constants, program.plan
    plan = plan._replace(num_warmup=WARMUP)
    schedule = path.schedule
    end, here = float(np.asarray(program.ladder.times)[-1]), noisy_end(schedule, t_max)
    finish = float(schedule.log_snr(end))
    longest = (LONGEST_TOLD if is_small(path) else LONGEST_UNTOLD) if plan.weights == "path" else LONGEST
    key = as_key(rng_key)
    log_step = jnp.log(jnp.asarray(plan.kernel.initial_step_size(program.dimension), float))
    times = [float(schedule.time(here))]

    def rungs(*log_snr: float) -> tuple[jax.Array, Level]:
        t = jnp.asarray([end if v == finish else float(schedule.time(v)) for v in log_snr], float)
        return t, Level.of(schedule, t)

    state = _begin(structure, plan, constants, rungs(here)[0][0], jax.random.fold_in(key, 0), log_step)
    state = _settle(structure, plan, constants, *rungs(here, here), jnp.asarray(0), state, jax.random.fold_in(key, 0))
    while here < finish:
        if len(times) >= max_levels:
            raise ValueError(
                f"{max_levels} levels lead down to t = {times[-1]:.3g} only, of {end:.3g}: the density changes too "
                f"fast for ess = {ess}. Ask for less, or look at the model: a likelihood may be too sharp far up."
            )
        key_level = jax.random.fold_in(key, len(times))

        def follow(there: float) -> bool:
            kept, correction = _step(structure, plan, constants, *rungs(here, there), state, key_level)  # noqa: B023
            return bool((kept >= ess) & (correction <= FARTHEST_OFF))

        near, far = here, min(finish, here + longest)
        if not follow(far):
            for _ in range(BISECTIONS):
                middle = (near + far) / 2
                near, far = (middle, far) if follow(middle) else (near, middle)
            far = max(near, here + (far - here) / 4)  # the least that is taken, whatever the share
        state = _settle(structure, plan, constants, *rungs(here, far), jnp.asarray(1), state, key_level)
        here = far
        times.append(end if here == finish else float(schedule.time(here)))
    return np.asarray(times)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
    structure: Structure, plan: Plan, constants: Constants, t: jax.Array, rng_key: jax.Array, log_step: jax.Array
) -> Any:
    """Particles at the start, a step, a curvature, and the variance of the start."""
    particles = begin(structure, plan, constants, t, rng_key)
    start = particles.chains.position
    flat = ravel_pytree(jax.tree.map(lambda q: q[0], start))[0]
    return particles, log_step, jnp.ones_like(flat), jax.tree.map(lambda q: jnp.var(q, 0), start)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    structure: Structure,
    plan: Plan,
    constants: Constants,
    times: jax.Array,
    levels: Level,
    state: Any,
    rng_key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The conditional ESS of a step from the first of two times to the second, and its correction."""
    particles, _, bend, _ = state
    enter = Entry(structure, plan, constants, times, levels)
    entered = enter(jnp.asarray(1), particles, bend, None, jax.random.fold_in(rng_key, 0))
    kept = conditional_ess(particles.log_weights, entered.increment)
    return kept, entered.typical_correction(particles.log_weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _settle(
    structure: Structure,
    plan: Plan,
    constants: Constants,
    times: jax.Array,
    levels: Level,
    k: jax.Array,
    state: Any,
    rng_key: jax.Array,
) -> Any:
    """That step made: weighed, resampled, tuned and moved."""
    particles, log_step, bend, variance = state
    keys = [jax.random.fold_in(rng_key, i) for i in range(4)]
    entered = Entry(structure, plan, constants, times, levels)(k, particles, bend, None, keys[0])
    particles = particles._replace(chains=entered.chains)
    particles, _, _ = weigh(particles, entered.increment, keys[1], jnp.asarray(0.5), plan.layout)
    inverse_mass = pooled_scale(structure, constants, particles.chains.position, times[k], variance)
    target = target_at(structure, constants, times[k])
    move = Mover(plan, SHORT_SHARE)
    chains, log_step, _ = move(
        keys[2], particles.chains, target, log_step, inverse_mass, plan.num_warmup, plan.num_steps
    )
    if plan.is_informed:
        few = jax.tree.map(lambda leaf: leaf[:PILOT_CHAINS], chains)  # what a run's own pilot will know, and no more
        bend = curvature(plan.kernel, few, target, inverse_mass, keys[3], plan.layout)
    return particles._replace(chains=chains), log_step, bend, variance
