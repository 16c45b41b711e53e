r"""HMC and its relatives, all from BlackJAX's HMC kernel.

    momentum   p ~ N(0, M),  M⁻¹ the squared scale of each coordinate
    leapfrog   L steps of size ε
    test       accept with probability min(1, exp(−ΔH)), or always

MALA is HMC with L = 1 (BlackJAX's own MALA takes ε²/2 and no mass matrix; the move and its
acceptance are the same). GHMC keeps part of its momentum, p ← ρ p + √(1 − ρ²) ξ, and turns it
round when a proposal is rejected: without that turn, N(0, 1) comes out with E[x²] = 1.42 at
ε = 1.6, L = 3, ρ = .9. NUTS finds L for itself. Without the test HMC is U-HMC and MALA is ULA:
unadjusted, biased by the step size.

For a score, ``metropolis="line-integral"`` replaces the test's log density by the integral of the
score along the trajectory (:mod:`lehr.kernels.line_integral`). It needs shorter steps than an exact
test: tuned to MALA's usual acceptance of .57, three nodes put 50 % on the second moment of a ring of
eight modes, at .85 nothing that 2,000 chains could show. So .85 is what such kernels are tuned for.

References:
    Neal, MCMC using Hamiltonian dynamics, 2011.
    Roberts & Tweedie, Exponential convergence of Langevin distributions, 1996.
    Horowitz, A generalized guided Monte Carlo algorithm, 1991 (GHMC).
    Hoffman & Gelman, The No-U-Turn sampler, JMLR 2014.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc import hmc, integrators, metrics, nuts

from lehr.kernels.base import LogDensity, Stats, Step, TunedKernel
from lehr.kernels.line_integral import NODES, line_integral, refreshed, reset

__all__ = ["GHMC", "HMC", "MALA", "NUTS", "UHMC", "ULA"]

Metropolis = Literal["exact", "line-integral"]
CHOSEN = -1.0
INTEGRATED_ACCEPTANCE = 0.85  # below it, three nodes do not resolve the score along a step: bias, with no sign of it


@dataclass(frozen=True)
class _Hamiltonian(TunedKernel):
    """What all of them share: leapfrog steps, and a state of position, log density and gradient."""

    @property
    def _steps(self) -> int:
        return getattr(self, "num_integration_steps", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self, "num_integration_steps"):
            self._check_count("num_integration_steps")

    def init(self, rng_key: jax.Array, position: Any, logdensity_fn: LogDensity) -> Any:
        return hmc.HMCState(position, *self._evaluate(position, logdensity_fn))

    def refresh(self, state: Any, logdensity_fn: LogDensity) -> Any:
        value, gradient = self._evaluate(state.position, logdensity_fn)
        return state._replace(logdensity=value, logdensity_grad=gradient)

    def _evaluate(self, position: Any, logdensity_fn: Any) -> tuple[jax.Array, Any]:
        if self.integrates_score:
            return refreshed(position, logdensity_fn)
        value, gradient = jax.value_and_grad(logdensity_fn)(position)
        return jnp.asarray(value), gradient

    def gradient(self, state: Any) -> Any:
        return state.logdensity_grad.whole if self.integrates_score else state.logdensity_grad

    def _guess(self, dimension: int) -> float:
        return 1.2 * dimension ** (-1 / 6 if self._steps == 1 else -1 / 4)


@dataclass(frozen=True)
class _Adjusted(_Hamiltonian):
    """A Hamiltonian kernel with a Metropolis test.

    Args:
        metropolis: ``"exact"`` needs energies; ``"line-integral"`` is for scores.
        num_nodes: of the line integral's quadrature on each leapfrog step, 2 to 5.
        integrate_energies: integrate the gradients of energies too, as if they were scores: to
            compare the two tests.
    """

    metropolis: Metropolis = field(default="exact", kw_only=True)
    num_nodes: int = field(default=3, kw_only=True)
    integrate_energies: bool = field(default=False, kw_only=True)
    target_acceptance: float = field(default=CHOSEN, kw_only=True)
    is_adjusted = True
    _best_acceptance = 0.75

    def __post_init__(self) -> None:
        if self.target_acceptance == CHOSEN:
            target = max(self._best_acceptance, INTEGRATED_ACCEPTANCE if self.integrates_score else 0.0)
            object.__setattr__(self, "target_acceptance", target)
        super().__post_init__()
        if self.metropolis not in ("exact", "line-integral"):
            raise ValueError(f'metropolis must be "exact" or "line-integral"; got {self.metropolis!r}.')
        if self.num_nodes not in NODES:
            raise ValueError(f"num_nodes must be 2, 3, 4 or 5; got {self.num_nodes!r}.")
        if self.integrate_energies and not self.integrates_score:
            raise ValueError('integrate_energies=True is an option of metropolis="line-integral".')

    @property
    def integrates_score(self) -> bool:  # type: ignore[override]
        return self.metropolis == "line-integral"

    @property
    def _integrator(self) -> Any:
        return line_integral(self.num_nodes) if self.integrates_score else integrators.velocity_verlet

    @property
    def _calls(self) -> int:
        """Network calls in one leapfrog step."""
        return self.num_nodes - 1 if self.integrates_score else 1

    def _begin(self, state: Any) -> Any:
        return reset(state) if self.integrates_score else state


@dataclass(frozen=True)
class HMC(_Adjusted):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    Args:
        num_integration_steps: L ≥ 1, leapfrog steps and gradient evaluations in a transition.
        step_size: ε, in units of each coordinate's scale; the start of its tuning. Chosen if None.
        target_acceptance: the mean acceptance to tune for; chosen if left out.
        metropolis: ``"exact"`` for energies, ``"line-integral"`` for scores.
        num_nodes: of the line integral, 2 to 5; each above 2 costs a network call for each leapfrog step.
        integrate_energies: treat energies as scores, to compare the two tests.

    Raises:
        ValueError: for a step size, count, target or option out of range.
    """

    num_integration_steps: int = 3
    _best_acceptance = 0.75

    def build(self) -> Step:
        kernel = hmc.build_kernel(integrator=self._integrator)
        return _step(self, lambda *arguments: kernel(*arguments, self._steps))


@dataclass(frozen=True)
class MALA(_Adjusted):
    """The Metropolis-adjusted Langevin algorithm: one leapfrog step of ε, x + ε²s/2 + εξ.

    Args:
        step_size: ε, in HMC's convention: BlackJAX's own MALA would be given ε²/2.
        target_acceptance: the mean acceptance to tune for; chosen if left out.
        metropolis: as for :class:`HMC`, and so ``num_nodes`` and ``integrate_energies``.

    Raises:
        ValueError: for a step size, target or option out of range.
    """

    _best_acceptance = 0.57

    build = HMC.build


@dataclass(frozen=True)
class NUTS(_Adjusted):
    """The No-U-Turn sampler: leapfrog steps until the trajectory turns back.

    Side by side on one device all chains wait for the one with the longest trajectory.

    Args:
        max_num_doublings: at most 2^this − 1 leapfrog steps in a transition.
        step_size: as for :class:`HMC`, and so the other options.

    Raises:
        ValueError: for a step size, count, target or option out of range.
    """

    max_num_doublings: int = 6
    _best_acceptance = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("max_num_doublings")

    def build(self) -> Step:
        kernel = nuts.build_kernel(integrator=self._integrator)
        return _step(self, lambda *arguments: kernel(*arguments, self.max_num_doublings))


class GHMCState(NamedTuple):
    """A chain with a momentum, in units of its standard deviation so that it outlives a change of scale."""

    position: Any
    logdensity: jax.Array
    logdensity_grad: Any
    momentum: jax.Array


@dataclass(frozen=True)
class GHMC(_Adjusted):
    """Generalised HMC: the momentum is refreshed in part, and turned round on rejection.

    Args:
        num_integration_steps: L ≥ 1.
        damping: ρ in [0, 1), the share of the momentum that is kept; 0 is HMC.
        step_size: as for :class:`HMC`, and so the other options.

    Raises:
        ValueError: for a step size, count, damping, target or option out of range.
    """

    num_integration_steps: int = 1
    damping: float = 0.7
    _best_acceptance = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping must lie in [0, 1); got {self.damping!r}.")

    def init(self, rng_key: jax.Array, position: Any, logdensity_fn: LogDensity) -> GHMCState:
        size = sum(leaf.size for leaf in jax.tree.leaves(position))
        return GHMCState(position, *self._evaluate(position, logdensity_fn), jax.random.normal(rng_key, (size,)))

    def build(self) -> Step:
        def step(
            rng_key: jax.Array, state: Any, logdensity_fn: LogDensity, step_size: jax.Array, inverse_mass: jax.Array
        ) -> tuple[Any, Stats]:
            state = self._begin(state)
            key_momentum, key_test = jax.random.split(rng_key)
            metric = metrics.default_metric(inverse_mass)
            noise = jax.random.normal(key_momentum, state.momentum.shape)
            unit = self.damping * state.momentum + jnp.sqrt(1 - self.damping**2) * noise
            _, unravel = jax.flatten_util.ravel_pytree(state.position)
            start = integrators.IntegratorState(
                state.position, unravel(unit * inverse_mass**-0.5), state.logdensity, state.logdensity_grad
            )
            propose = hmc.hmc_proposal(
                self._integrator(logdensity_fn, metric.kinetic_energy), metric.kinetic_energy, step_size, self._steps
            )
            proposal, info, _ = propose(key_test, start)
            end = hmc.flip_momentum(proposal)  # the proposal ends flipped, so this turns rejected chains only
            unit = jax.flatten_util.ravel_pytree(end.momentum)[0] * inverse_mass**0.5
            state = GHMCState(end.position, end.logdensity, end.logdensity_grad, unit)
            return state, Stats(jnp.nan_to_num(info.acceptance_rate), info.is_divergent, self._steps * self._calls)

        return step


@dataclass(frozen=True)
class UHMC(_Hamiltonian):
    """HMC without the Metropolis test: biased, but in need of a score only. Arguments as for :class:`HMC`;
    the acceptance that is tuned and reported is the one a test would have had. For a score there is
    none, and the step size is used as it is."""

    num_integration_steps: int = 3
    target_acceptance: float = field(default=0.95, kw_only=True)
    is_adjusted = False
    _calls = 1

    def build(self) -> Step:
        kernel = hmc.build_kernel(build_proposal=functools.partial(hmc.hmc_proposal, sample_proposal=_always_accept))
        return _step(self, lambda *arguments: kernel(*arguments, self._steps))

    def _begin(self, state: Any) -> Any:
        return state


@dataclass(frozen=True)
class ULA(UHMC):
    """The unadjusted Langevin algorithm: MALA without the test. Arguments as for :class:`MALA`."""

    num_integration_steps: int = field(default=1, init=False, repr=False)
    target_acceptance: float = field(default=0.9, kw_only=True)


def _step(kernel: Any, transition: Any) -> Step:
    """A BlackJAX kernel of the HMC family, with its arguments and statistics in lehr's order."""

    def step(
        rng_key: jax.Array, state: Any, logdensity_fn: LogDensity, step_size: jax.Array, inverse_mass: jax.Array
    ) -> tuple[Any, Stats]:
        state, info = transition(rng_key, kernel._begin(state), logdensity_fn, step_size, inverse_mass)
        evaluations = info.num_integration_steps * kernel._calls
        return state, Stats(jnp.nan_to_num(info.acceptance_rate), info.is_divergent, evaluations)

    return step


def _always_accept(rng_key: jax.Array, delta_energy: jax.Array, old: Any, new: Any) -> tuple[Any, tuple[Any, ...]]:
    """Accept every proposal that is finite; report what a test would have said."""
    finite = jnp.isfinite(delta_energy)
    chosen = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return chosen, (finite, jnp.clip(jnp.exp(delta_energy), max=1.0), None)
