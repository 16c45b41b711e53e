r"""A potential as a NumPyro distribution, and the handler that gives it its noise level.

``Diffusion(p)`` is a family of densities, one for each t; it has a log density only once a
level is bound. The level is bound by ``noise_level``, an effect handler: it hands every
``Diffusion`` site, however deep inside plates, masks and expansions, the same t, and leaves
alone those that were bound by hand with ``.at(t)``. Distributions are pytrees, and a
``Diffusion`` is one whose leaves are the potential's arrays and t, so it crosses ``jit``
and ``vmap`` as any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpy.typing import ArrayLike
from numpyro.distributions import ExpandedDistribution, Independent, MaskedDistribution, constraints
from numpyro.primitives import _PYRO_STACK, Messenger, apply_stack

from lehr.potentials.analytic import ExactPotential
from lehr.potentials.base import EnergyPotential, Potential, check_time
from lehr.potentials.flow import draw
from lehr.potentials.reschedule import with_schedule
from lehr.schedules import Schedule

__all__ = ["Diffusion", "base", "current_level", "diffusions", "map_diffusions", "noise_level"]


class Diffusion(dist.Distribution):
    """The NumPyro distribution over a potential: ``numpyro.sample("x", lehr.Diffusion(p * q))``.

    Args:
        potential: the potential; its ``event_shape`` is the distribution's.
        t: the noise level, a scalar in [0, 1]; usually left to :func:`noise_level` or a driver.

    Raises:
        TypeError: if ``potential`` is not a :class:`~lehr.Potential`.
        ValueError: if t lies outside [0, 1].

    Example:
        >>> import jax, numpyro, lehr
        >>> def model():
        ...     return numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jax.numpy.zeros(2))))
        >>> with numpyro.handlers.seed(rng_seed=0), lehr.noise_level(t=0.5):
        ...     model().shape
        (2,)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("potential", "t")
    reparametrized_params: ClassVar[list[str]] = []

    def __init__(self, potential: Potential, t: ArrayLike | None = None, *, validate_args: bool | None = None) -> None:
        if not isinstance(potential, Potential):
            raise TypeError(f"Diffusion needs a lehr potential; got a {type(potential).__name__}.")
        self.potential = potential
        self.t = None if t is None else check_time(t)
        super().__init__(batch_shape=(), event_shape=potential.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    def at(self, t: ArrayLike) -> Diffusion:
        """The same distribution, bound to the level t."""
        bound = copy.copy(self)
        bound.t = check_time(t)
        return bound

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """log p_t(value) up to c(t); ``value`` has shape ``batch + event_shape``.

        Raises:
            RuntimeError: if no noise level is bound.
            TypeError: if the potential is a score, which has no log density.
            ValueError: if the trailing dimensions of ``value`` are not the event's.
        """
        potential, t = self.potential, self.bound_level()
        if not isinstance(potential, EnergyPotential):
            potential.at(t)  # says why, and what to do
        return self.over_events(lambda x: potential.log_density(x, t), value)  # type: ignore[attr-defined]

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws at the bound level, of the data (t = 0) where none is: exact where the potential is, by
        reverse diffusion where it is a diffusion model.

        Raises:
            NotImplementedError: for products and what is made of them; a driver samples those.
        """
        t = jnp.zeros(()) if self.t is None else self.t
        if isinstance(self.potential, ExactPotential):
            return self.potential.sample(key, t, tuple(sample_shape))
        if not self.potential.is_diffusion or not np.all(self.potential.covered):
            raise NotImplementedError(
                f"a {type(self.potential).__name__} cannot be drawn from by reverse diffusion: it is not the noised "
                "density of any data. Sample it with lehr.AnnealedMCMC or lehr.AnnealedSMC, and pass the draws to "
                "NumPyro, e.g. by numpyro.handlers.substitute or Predictive(posterior_samples=...)."
            )
        keys = jax.random.split(key, math.prod(sample_shape))
        draws = jax.lax.map(lambda key: draw(key, self.potential, t), keys, batch_size=256)
        return draws.reshape(*sample_shape, *self.event_shape)

    def bound_level(self) -> jax.Array:
        """t.

        Raises:
            RuntimeError: if no noise level is bound.
        """
        if self.t is None:
            raise RuntimeError(
                "this Diffusion has no noise level, and without one no density. Wrap the model in "
                "lehr.noise_level(model, t), bind the distribution with .at(t), or hand the model to "
                "lehr.AnnealedMCMC or lehr.AnnealedSMC, which bind every level in turn."
            )
        return self.t

    def over_events(self, function: Callable[[jax.Array], jax.Array], value: ArrayLike) -> jax.Array:
        """``function`` of one event, mapped over the leading dimensions of ``value``."""
        value = jnp.asarray(value, float)
        lead = value.ndim - self.event_dim
        if lead < 0 or value.shape[lead:] != self.event_shape:
            raise ValueError(
                f"Diffusion over events of shape {self.event_shape} was given a value of shape {value.shape}; "
                "its trailing dimensions must be the event's."
            )
        for _ in range(lead):
            function = jax.vmap(function)
        return function(value)


def map_diffusions(function: Callable[[Diffusion], Any], fn: Any) -> Any:
    """``fn`` with ``function`` applied to each Diffusion in it, however it is wrapped."""
    return jax.tree.map(
        lambda d: function(d) if isinstance(d, Diffusion) else d, fn, is_leaf=lambda d: isinstance(d, Diffusion)
    )


def base(fn: Any) -> Any:
    """What is left of a distribution when expansions, masks and reinterpreted batches are taken off."""
    while isinstance(fn, ExpandedDistribution | Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn


def diffusions(fn: Any) -> list[Diffusion]:
    """The Diffusions inside a site's distribution: none for an ordinary site."""
    leaves = jax.tree.leaves(fn, is_leaf=lambda d: isinstance(d, Diffusion))
    return [leaf for leaf in leaves if isinstance(leaf, Diffusion)]


def current_level() -> jax.Array:
    """The noise level t at which the model is being run, for likelihoods that were trained on noisy x.

    A classifier of (x_t, t) is guided by ``numpyro.sample("label", dist.Categorical(logits=classifier(x,
    lehr.current_level())), obs=3)`` and ``guidance={"label": lehr.guidance.Raw()}``. Where a strategy
    lets the site read a denoised x, the level is that of the end of the ladder.

    Raises:
        RuntimeError: outside of a model that is run at a level.
    """
    message = {"type": "current_level", "fn": lambda: None, "args": (), "kwargs": {}, "value": None}
    level = apply_stack(message)["value"] if _PYRO_STACK else None
    if level is None:
        raise RuntimeError(
            "there is no noise level here: lehr.current_level() is for models that a lehr driver or "
            "lehr.noise_level(model, t) runs."
        )
    return level


class noise_level(Messenger):  # noqa: N801
    """Effect handler that reads every ``Diffusion`` site of a model at noise level t.

    With it a model is plain NumPyro at a fixed level:
    ``MCMC(NUTS(lehr.noise_level(model, 0.02)), ...)``. The innermost handler wins, and a site
    bound with ``.at(t)`` keeps its own level. Sites of different schedules are all seen through
    one, matched by log-SNR: t is never asked of two schedules at once.

    Args:
        fn: the model; leave it out to use the handler as a context manager.
        t: the level, a scalar in [0, 1]; may be traced.
        schedule: what t refers to; the schedule of the first ``Diffusion`` site by default.

    Raises:
        ValueError: if t is missing or lies outside [0, 1].
    """

    def __init__(
        self, fn: Callable[..., Any] | None = None, t: ArrayLike | None = None, schedule: Schedule | None = None
    ) -> None:
        if t is None:
            raise ValueError("noise_level needs a level: lehr.noise_level(model, t) with t in [0, 1].")
        self.t, self.schedule = check_time(t), schedule
        super().__init__(fn)

    def __enter__(self) -> Any:
        self._seen_through = self.schedule
        return super().__enter__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            msg["fn"] = map_diffusions(self._bind, msg["fn"])
        elif msg["type"] == "current_level" and msg["value"] is None:
            msg["value"] = self.t

    def _bind(self, site: Diffusion) -> Diffusion:
        if site.t is not None:
            return site
        if self._seen_through is None:
            self._seen_through = site.potential.schedule
        bound = site.at(self.t)
        bound.potential = with_schedule(site.potential, self._seen_through)
        return bound
