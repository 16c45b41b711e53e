"""A NumPyro model bound to its arguments: which sites it has, of what kind, and how to run it at a level.

The model is traced once, abstractly, to find its sites; what a path could not follow is refused
there, before anything is compiled. What depends on what is read off the traced program.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import is_identically_one

from lehr.potentials.base import SCORE_IS_NO_ENERGY
from lehr.programs.checks import check_connections, check_event, is_one_model, is_reversible, refuse_hole, refuse_nan
from lehr.programs.dependence import dependence
from lehr.programs.diffusion import diffusions, noise_level
from lehr.programs.enumeration import joint_support
from lehr.programs.reading import Quadratic, is_energy, quadratic
from lehr.schedules import Schedule

__all__ = ["Binding", "Position", "Site", "total_log_prob"]

Position = dict[str, jax.Array]
Site = dict[str, Any]


class Binding:
    """A model, and once it is bound its arguments and what is known of its sites.

    Attributes:
        model: the NumPyro model.
        diffusion_sites: the names of the latent ``Diffusion`` sites: x.
        latent_sites: of the ordinary continuous latents: θ.
        other_sites: of all sites that are not diffusions, latent or observed.
        factor_sites: of all diffusions, latent or observed.
        score_sites: of those among them that are known through a score.
        without_denoiser: of those that have no reverse kernel.
        sinks: of the ordinary sites that nothing else depends on.
        discrete: the discrete latents, each with all of its values.
        observations: what is observed, by site.
        schedule: the noise of the first diffusion.
        is_calibrated: whether all factors are calibrated.
        is_normalised: whether x has a normalised density at every level.
    """

    model: Callable[..., Any]
    diffusion_sites: tuple[str, ...]
    latent_sites: tuple[str, ...]
    other_sites: tuple[str, ...]
    factor_sites: tuple[str, ...]
    score_sites: tuple[str, ...]
    without_denoiser: tuple[str, ...]
    sinks: tuple[str, ...]
    discrete: Position
    observations: dict[str, Any]
    schedule: Schedule
    is_calibrated: bool
    is_normalised: bool

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.discrete = {}
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def is_bound(self) -> bool:
        return self._arguments is not None

    def bound_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments.

        Raises:
            TypeError: if the path is unbound.
        """
        if self._arguments is None:
            raise TypeError(
                "this Path is not bound to data: call it with the model's arguments, as in "
                "path = lehr.Path(model)(y=y), or Path(model)() if the model takes none."
            )
        return self._arguments

    def with_data(self, exchange: Callable[[Any], Any]) -> Self:
        """The same, with other arrays in place of those of its arguments and observations.

        Args:
            exchange: of a tree, gives that tree with other arrays of the same shapes and types.
        """
        binding = copy.copy(self)
        binding._arguments = exchange(self.bound_arguments())
        binding.observations = exchange(self.observations)
        return binding

    def refuse_scores(self, who: str) -> None:
        """Raise the TypeError of :meth:`Potential.at` if a factor is known through its score only."""
        self.bound_arguments()
        if self.score_sites:
            raise TypeError(
                f"{who} needs log densities, and the Diffusion site{'s' * (len(self.score_sites) > 1)} "
                f"{', '.join(map(repr, self.score_sites))} is known through a score only. {SCORE_IS_NO_ENERGY}"
            )

    def refuse_without_denoiser(self, who: str) -> None:
        """Raise a TypeError if a factor is not a diffusion model, and so has no reverse kernel."""
        self.bound_arguments()
        if self.without_denoiser:
            raise TypeError(
                f"{who} needs the denoiser of every factor, E[x₀ | x_t], and the site {self.without_denoiser[0]!r} has "
                "none: its density is not the noised density of any data (a floor under a density, a mixture of "
                'products), or a discrete latent is summed out of it. Use weights="energy", or build the site from '
                "models, products of models and lehr.Mixture of models; from a mixture's x its label can be drawn."
            )

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Site]:
        """Find and check the model's sites; returns those that are not diffusions, as they were traced."""
        args, kwargs = jax.tree.map(_as_data, (args, kwargs))
        for where, leaf in jax.tree_util.tree_flatten_with_path((args, kwargs))[0]:
            refuse_nan(f"the model's argument {jax.tree_util.keystr(where[1:])}", leaf)
        self._arguments = (args, kwargs)
        self.discrete = {}
        sites = self._discover()
        self.diffusion_sites = tuple(s["name"] for s in sites if diffusions(s["fn"]) and not s["is_observed"])
        if not self.diffusion_sites:
            found = ", ".join(repr(s["name"]) for s in sites) or "none"
            raise ValueError(
                "the model has no latent Diffusion site, so there is nothing to anneal: declare one by "
                f'numpyro.sample("x", lehr.Diffusion(potential)). Its sample sites are: {found}. For a model '
                "without one, use numpyro.infer.MCMC."
            )
        others = [s for s in sites if not diffusions(s["fn"])]
        latents = [s for s in others if not s["is_observed"]]
        self.discrete = joint_support([s for s in latents if s["fn"].support.is_discrete])
        self.latent_sites = tuple(s["name"] for s in latents if s["name"] not in self.discrete)
        self.other_sites = tuple(s["name"] for s in others)
        self.observations = {s["name"]: s["value"] for s in sites if s["is_observed"]}
        potentials = [d.potential for s in sites for d in diffusions(s["fn"])]
        self.schedule: Schedule = potentials[0].schedule
        self.is_calibrated = all(p.is_calibrated for p in potentials)
        self.factor_sites = tuple(s["name"] for s in sites if diffusions(s["fn"]))
        self.score_sites = tuple(s["name"] for s in sites if not all(is_energy(d) for d in diffusions(s["fn"])))
        self.without_denoiser = tuple(s["name"] for s in sites if diffusions(s["fn"]) and not is_reversible(s["fn"]))
        depends = dependence(self._parts, {s["name"]: s["value"] for s in sites if not s["is_observed"]})
        check_connections(sites, depends, self.discrete)
        self.without_denoiser += tuple(name for name in self.factor_sites if depends[name] & set(self.discrete))
        if not all(np.all(d.potential.covered) for s in sites for d in diffusions(s["fn"]) if not s["is_observed"]):
            drawn = self.draw_latents(jax.random.key(0), jnp.ones(()))
            for name, precision in self._curvature("moments", drawn, 1.0)[1].items():
                refuse_hole(name, np.asarray(precision > 0))
        factor = [s for s in sites if diffusions(s["fn"])]
        self.is_normalised = all(not s["is_observed"] and s["scale"] is None and is_one_model(s["fn"]) for s in factor)
        others_need = set().union(*(depends[name] - {name} for name in depends))
        self.sinks = tuple(name for name in self.other_sites if name not in others_need)
        return {s["name"]: s for s in others}

    def _discover(self) -> list[Site]:
        """The model's sample sites, found by tracing it once with nothing computed."""
        found: list[Site] = []

        def run(rng_key: jax.Array) -> None:
            sites = self.trace({}, None, 1.0, rng_key=rng_key)
            found.extend(sites)

        try:
            jax.eval_shape(run, jax.random.key(0))
        except AssertionError as error:  # handlers.trace
            raise ValueError(f"the model has two sites of one name: {error}.") from error
        for site in found:
            if site["is_observed"]:
                refuse_nan(f"the observation at site {site['name']!r}", site["value"])
            check_event(site)
        self._shapes = {s["name"]: jnp.shape(s["value"]) for s in found if diffusions(s["fn"]) and not s["is_observed"]}
        return found

    def _parts(self, values: Position) -> dict[str, Any]:
        """By site, the arrays that its distribution is made of, and its value, where latents are ``values``."""
        args, kwargs = self.bound_arguments()
        model = handlers.substitute(handlers.seed(self.model, 0), data=values)
        with handlers.trace() as trace, noise_level(t=1.0, schedule=self.schedule):
            model(*args, **kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
        return {name: (jax.tree.leaves(site["fn"]), site["value"]) for name, site in sites.items()}

    # Running the model

    def trace(
        self, position: Position, x: Position | None, t: ArrayLike, rng_key: jax.Array | None = None
    ) -> list[Site]:
        """The sample sites of one run of the model, with x at its diffusions, read at level t.

        ``x=None`` puts zeros there. What ``position`` does not hold is drawn from its prior with ``rng_key``.
        """
        args, kwargs = self.bound_arguments()

        def value(site: Site) -> jax.Array | None:
            if site["type"] != "sample" or site["is_observed"]:
                return None
            name = site["name"]
            if diffusions(site["fn"]):
                return jnp.zeros(site["fn"].shape()) if x is None else x[name]
            if name in self.discrete:
                return position.get(name, None if rng_key is not None else self.discrete[name][0])
            if name in position:
                return biject_to(site["fn"].support)(position[name])
            if rng_key is None and name in self.latent_sites:
                raise KeyError(f"the position has no value for the latent site {name!r}; it has {sorted(position)}.")
            return None

        model = self.model if rng_key is None else handlers.seed(self.model, rng_key)
        schedule = getattr(self, "schedule", None)
        with handlers.trace() as trace, handlers.substitute(substitute_fn=value), noise_level(t=t, schedule=schedule):
            model(*args, **kwargs)
        return [site for site in trace.values() if site["type"] == "sample"]

    def origin(self) -> Position:
        self.bound_arguments()
        return {name: jnp.zeros(self._shapes[name]) for name in self.diffusion_sites}

    def quadratic(self, kind: Quadratic, position: Position, t: ArrayLike) -> tuple[Position, Position]:
        """Mean and precision, coordinate by coordinate, of the sum of a quadratic reading of all
        diffusion sites, as a function of x."""
        slope, precision = self._curvature(kind, position, t)
        precision = jax.tree.map(lambda p: jnp.where(p > 0, p, 1.0), precision)
        return jax.tree.map(jnp.divide, slope, precision), precision

    def _curvature(self, kind: Quadratic, position: Position, t: ArrayLike) -> tuple[Position, Position]:
        """Slope at x = 0, and minus the curvature, of that sum."""

        def total(x: Position) -> jax.Array:
            sites = self.trace(position, x, t)
            factors = (site for site in sites if diffusions(site["fn"]))
            return total_log_prob(site | {"fn": quadratic(site["fn"], kind)} for site in factors)

        origin = self.origin()
        slope = jax.grad(total)(origin)
        moved = jax.grad(total)(jax.tree.map(jnp.ones_like, origin))
        return slope, jax.tree.map(jnp.subtract, slope, moved)

    def log_jacobian(self, sites: list[Site], position: Position) -> jax.Array:
        """Σ log |∂ value/∂ unconstrained| of the ordinary latents among ``sites``."""
        total = jnp.zeros(())
        for site in sites:
            if site["name"] in self.latent_sites:
                transform = biject_to(site["fn"].support)
                total += jnp.sum(transform.log_abs_det_jacobian(position[site["name"]], site["value"]))
        return total

    def draw_latents(self, rng_key: jax.Array, t: jax.Array) -> Position:
        """The ordinary latents from their prior, with x = 0; unconstrained, and the discrete ones too."""
        sites = self.trace({}, self.origin(), t, rng_key=rng_key)
        drawn = {site["name"]: site["value"] for site in sites if site["name"] in self.discrete}
        latents = (site for site in sites if site["name"] in self.latent_sites)
        return drawn | {site["name"]: biject_to(site["fn"].support).inv(site["value"]) for site in latents}


def total_log_prob(sites: Any) -> jax.Array:
    """Σ log p over sites, with the scales that NumPyro's handlers and plates gave them."""
    total = jnp.zeros(())
    for site in sites:
        log_prob = site["fn"].log_prob(site["value"])
        scale = site["scale"]
        total += jnp.sum(log_prob if scale is None or is_identically_one(scale) else scale * log_prob)
    return total


def _as_data(leaf: Any) -> Any:
    """Arrays and floats become JAX arrays, traced by the driver; integers and all else stay."""
    if isinstance(leaf, float):
        return jnp.asarray(leaf)
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "fc":
        return jnp.asarray(leaf)
    return leaf
