r"""The path of a model: one density at each noise level, over all of its latent sites.

With θ the ordinary latents, unconstrained and with their log-Jacobian, and x_t the value
of the ``Diffusion`` sites,

    log π_t(x_t, θ) = Σ_i w_i log p_i,t(x_t; θ) + log p(θ) + log L(y | x̂₀(x_t), θ).

The model itself is plain NumPyro and says nothing of levels. The path runs it twice: once
with x_t, and takes the factors of the ``Diffusion`` sites (latent or observed) at level t;
once with what the guidance says in place of x_t, and takes all other sites. No ``Diffusion``
ever reads a denoised value. At the end of the ladder both runs read x, and the density is
the user's own joint.

Chains start from θ ~ p(θ | x = 0) and x ~ N(m, 1/τ), where m and τ collect the Gaussian
summaries of all ``Diffusion`` sites at the first level; its density is known, so the first
weight corrects for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions import MaskedDistribution
from numpyro.infer.util import constrain_fn

from lehr.potentials.base import Potential, check_time
from lehr.predictions import TINY
from lehr.programs.binding import Binding, Position, Site, total_log_prob
from lehr.programs.diffusion import Diffusion, diffusions, noise_level
from lehr.programs.guidance import Guidance, Noisy, Tweedie
from lehr.programs.reading import known, unknown

__all__ = ["Path", "Position", "total_log_prob"]

Guidances = Guidance | Mapping[str, Guidance] | Mapping[str | None, Guidance]


def _unasked(x: Position) -> Position:
    raise TypeError(
        "a guidance strategy with uses_score = False asked for the denoiser, and so for a score. Set "
        "uses_score = True, or read noisy.x only."
    )


class Path(Binding):
    """π_t over the latent sites of a NumPyro model, or over the x of one potential.

    ``Path(model)`` is unbound; calling it with the model's arguments binds it, and checks the
    model. ``Path(potential)`` is bound at once, with the one site ``"x"``.

    Args:
        model: a NumPyro model with at least one latent ``Diffusion`` site, or a potential.
        guidance: how the other sites read x on the way down: one strategy for all, or a mapping
            from names of observed sites to strategies; :class:`~lehr.guidance.Tweedie` otherwise.

    Raises:
        TypeError: if ``model`` is neither, or ``guidance`` is not a strategy.
    """

    def __init__(self, model: Callable[..., Any] | Potential, guidance: Guidances | None = None) -> None:
        if not callable(model) and not isinstance(model, Potential):
            raise TypeError(f"Path needs a NumPyro model or a lehr potential; got a {type(model).__name__}.")
        super().__init__(_Prior(model) if isinstance(model, Potential) else model)
        self.guidance = _per_site(guidance)
        self.end = jnp.zeros(())
        self.forgets = False
        if isinstance(model, Potential):
            self._bind((), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        """The path bound to the model's arguments. Arrays and floats are data, all else is structure.

        Raises:
            ValueError: if the model has no latent Diffusion site, if data or observations are NaN,
                if a latent site is discrete, or if ``guidance`` names a site that the model lacks.
        """
        bound = copy.copy(self)
        bound._bind(args, kwargs)
        return bound

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Site]:
        """As of a :class:`Binding`, and give each site that is not a diffusion its strategy."""
        others = super()._bind(args, kwargs)
        self._strategies = self._assign(self.guidance, others)
        return others

    def ending_at(self, t: ArrayLike) -> Path:
        """The same path for a ladder that ends at t: there, every site reads x itself."""
        path = copy.copy(self)
        path.end = jnp.asarray(t, float)
        return path

    def as_scores(self) -> Path:
        """The same path with its energies known through their scores only."""
        path = copy.copy(self)
        path.forgets = True
        path.score_sites = path.factor_sites
        return path

    def prior(self) -> Path:
        """The same path without its likelihood: the observed sites that are not diffusions left out."""
        self.bound_arguments()
        path = copy.copy(self)
        unobserved = {*self.latent_sites, *self.discrete}
        kept = {strategy: names & unobserved for strategy, names in self._strategies.items()}
        path._strategies = {strategy: names for strategy, names in kept.items() if names}
        path.other_sites = tuple(name for name in self.other_sites if name in unobserved)
        path.observations = {k: v for k, v in self.observations.items() if k in self.factor_sites}
        return path

    def log_density(self, position: Position, t: ArrayLike) -> jax.Array:
        """log π_t at an unconstrained position, a scalar.

        Raises:
            TypeError: if the path is unbound, or a factor is a score and has no log density.
        """
        self.refuse_scores("Path.log_density")
        return self.surrogate(position, t)

    def surrogate(self, position: Position, t: ArrayLike) -> jax.Array:
        """log π_t where every factor is an energy. Where some are scores its gradient is right and
        their part of its value is missing: for unadjusted kernels and line integrals only."""
        t = check_time(t)
        if not self._listed(position):
            return jax.nn.logsumexp(jax.vmap(lambda z: self.surrogate(position | z, t))(self.discrete))
        x = {name: position[name] for name in self.diffusion_sites}

        def models(x: Position) -> jax.Array:
            sites = self.trace(position, x, t)
            factors = (site for site in sites if diffusions(site["fn"]))
            return total_log_prob(site | {"fn": known(site["fn"], self.forgets)} for site in factors)

        if not self.other_sites:
            return models(x)
        if not any(strategy.uses_score for strategy in self._strategies):
            return models(x) + self._read(self._noisy(position, x, t), self._strategies)
        value, score = jax.value_and_grad(models)(x)
        noisy = self._noisy(position, x, t, jax.grad(models), score)
        return value + self._read(noisy, self._strategies)

    def aside(self, position: Position, t: ArrayLike) -> jax.Array | None:
        """The part of log π_t that reads x_t without asking the models for a score; None if there is none."""
        strategies = {strategy: names for strategy, names in self._strategies.items() if not strategy.uses_score}
        if not strategies:
            return None
        x = {name: position[name] for name in self.diffusion_sites}
        return self._read(self._noisy(position, x, check_time(t)), strategies)

    def _noisy(
        self,
        position: Position,
        x: Position,
        t: jax.Array,
        score: Callable[[Position], Position] = _unasked,
        here: Position | None = None,
    ) -> Noisy:
        """What a strategy is shown of level t, given the models' score, and what that is here; without, x_t itself
        is in the place of what is denoised."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        at_end = t <= self.end
        share = jnp.where(at_end, 1.0, alpha**2 / (alpha**2 + sigma**2))
        scale = jnp.where(at_end, 1.0, jnp.maximum(alpha, TINY))
        copies = jax.tree.map(jnp.ones_like, x) if here is None else self.copies(position, t)
        gain = {k: jnp.where(at_end, 0.0, sigma**2 / jnp.where(w > 0, w, 1.0) / scale) for k, w in copies.items()}

        def moved(x: Position, score: Position) -> Position:
            return {k: x[k] / scale + gain[k] * score[k] for k in x}

        def sites(x: Position, t: jax.Array) -> list[Site]:
            return self.trace(position, x, t)

        def log_prob(sites: Iterable[Site]) -> jax.Array:
            sites = list(sites)
            return total_log_prob(sites) + self.log_jacobian(sites, position)

        denoised = x if here is None else moved(x, here)
        return Noisy(x, denoised, lambda x: moved(x, score(x)), gain, share, t, self.end, sites, log_prob)

    def _read(self, noisy: Noisy, strategies: Mapping[Guidance, set[str]]) -> jax.Array:
        """Σ over the ordinary sites, each weighed as its strategy has it."""
        total = jnp.zeros(())
        for strategy, names in strategies.items():

            def sites(x: Position, t: jax.Array, names: set[str] = names) -> list[Site]:
                return [site for site in noisy.sites(x, t) if site["name"] in names]

            denoised = noisy.denoised if strategy.uses_score else noisy.x
            total += strategy.log_prob(noisy._replace(denoised=denoised, sites=sites))
        return total

    def unknown(self, position: Position, t: ArrayLike) -> jax.Array:
        """Zero, with the gradient of the part of log π_t that :meth:`surrogate` lacks the value of."""
        x = {name: position[name] for name in self.diffusion_sites}
        sites = self.trace(position, x, check_time(t))
        factors = (site for site in sites if diffusions(site["fn"]))
        return total_log_prob(site | {"fn": unknown(site["fn"], self.forgets)} for site in factors)

    def others(self, position: Position, t: ArrayLike) -> jax.Array:
        """The part of log π_t that no diffusion model has a share in: log p(θ) + log L(y | x̂₀, θ)."""
        return self.as_scores().surrogate(position, t)

    def init(self, rng_key: jax.Array, t: ArrayLike = 1.0) -> Position:
        """One draw of where chains start at level t: an unconstrained position."""
        t = check_time(t)
        key_latent, key_x = jax.random.split(rng_key)
        position = self.draw_latents(key_latent, t)
        means, precisions = self.quadratic("moments", position, t)
        for i, name in enumerate(self.diffusion_sites):
            key = jax.random.fold_in(key_x, i)
            noise = jax.random.normal(key, means[name].shape)
            position[name] = means[name] + noise * precisions[name] ** -0.5
        return {name: value for name, value in position.items() if name not in self.discrete}

    def log_start(self, position: Position, t: ArrayLike = 1.0) -> jax.Array:
        """The log density, normalised, of what :meth:`init` draws at level t."""
        t = check_time(t)
        if not self._listed(position):
            return jax.nn.logsumexp(jax.vmap(lambda z: self.log_start(position | z, t))(self.discrete))
        sites = self.trace(position, self.origin(), t)
        drawn = {*self.latent_sites, *self.discrete}
        log_prior = total_log_prob(_as_drawn(site) for site in sites if site["name"] in drawn)
        log_prior += self.log_jacobian(sites, position)
        means, precisions = self.quadratic("moments", position, t)
        gaussian = [
            jnp.sum(jnp.log(precisions[k] / (2 * math.pi)) - precisions[k] * (position[k] - means[k]) ** 2) / 2
            for k in self.diffusion_sites
        ]
        return sum(gaussian, log_prior)

    def widths(self, position: Position, t: ArrayLike) -> Position:
        """The scale of steps at level t, coordinate by coordinate; infinite for ordinary latents,
        of which the path knows none."""
        _, precisions = self.quadratic("width", position, check_time(t))
        return {
            k: precisions[k] ** -0.5 if k in precisions else jnp.full(v.shape, jnp.inf) for k, v in position.items()
        }

    def copies(self, position: Position, t: ArrayLike) -> Position:
        """How often the noise is counted at each coordinate of x: Σ w_i over the factors that see it."""
        return self.quadratic("noise", position, check_time(t))[1]

    def moments(self, position: Position, t: ArrayLike) -> tuple[Position, Position]:
        """Mean and standard deviation of x at level t, from the Gaussian summaries of all factors."""
        means, precisions = self.quadratic("moments", position, check_time(t))
        return means, {k: p**-0.5 for k, p in precisions.items()}

    def constrain(self, position: Any, batch_ndims: int = 0) -> dict[str, jax.Array]:
        """The sites' own values at a position, with the deterministic ones; discrete latents are drawn.

        Args:
            position: unconstrained, each leaf with ``batch_ndims`` leading dimensions.
            batch_ndims: how many.
        """
        args, kwargs = self.bound_arguments()
        model = noise_level(self.model, self.end, self.schedule)  # models may ask for it
        if not self.discrete:
            return constrain_fn(model, args, kwargs, position, return_deterministic=True, batch_ndims=batch_ndims)

        def one(rng_key: jax.Array, position: Position) -> dict[str, jax.Array]:
            z = self._draw_discrete(rng_key, position)
            drawn = handlers.substitute(model, data=z)
            return z | constrain_fn(drawn, args, kwargs, position, return_deterministic=True)

        shape = jax.tree.leaves(position)[0].shape[:batch_ndims]
        for _ in shape:
            one = jax.vmap(one)
        return one(jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0), position)

    def log_likelihood(self, samples: Mapping[str, Any], batch_ndims: int = 0) -> dict[str, jax.Array]:
        """log p of what was observed, by observed site that is no diffusion, for draws of the latents.

        Args:
            samples: the latents' own values, as :meth:`constrain` returns them, each with ``batch_ndims`` leading
                dimensions.
            batch_ndims: how many.
        """
        args, kwargs = self.bound_arguments()
        latents = {*self.diffusion_sites, *self.latent_sites, *self.discrete}

        def one(values: Position) -> dict[str, jax.Array]:
            model = handlers.substitute(self.model, data=values)
            with handlers.trace() as trace, noise_level(t=self.end, schedule=self.schedule):
                model(*args, **kwargs)
            sites = {name: trace[name] for name in self.other_sites if trace[name]["is_observed"]}
            return {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()}

        values = {name: jnp.asarray(value) for name, value in samples.items() if name in latents}
        shape = jax.tree.leaves(values)[0].shape[:batch_ndims]
        flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[batch_ndims:]), values)
        found = jax.lax.map(one, flat, batch_size=1024)
        return jax.tree.map(lambda v: v.reshape(*shape, *v.shape[1:]), found)

    def _draw_discrete(self, rng_key: jax.Array, position: Position) -> Position:
        """The discrete latents from their conditional at the end of the ladder."""
        logits = jax.vmap(lambda z: self.surrogate(position | z, self.end))(self.discrete)
        drawn = jax.random.categorical(rng_key, logits)
        return jax.tree.map(lambda values: values[drawn], self.discrete)

    def _listed(self, position: Position) -> bool:
        """Whether the position says what the discrete latents are."""
        return all(name in position for name in self.discrete)

    def _assign(self, guidance: dict[str | None, Guidance], found: dict[str, Site]) -> dict[Guidance, set[str]]:
        """Which strategy reads for which of the sites that are not diffusions."""
        unknown = [name for name in guidance if name is not None and name not in self.other_sites]
        if unknown:
            raise ValueError(
                f"guidance names the site {unknown[0]!r}, which the model does not have as an ordinary site; "
                f"it has {', '.join(map(repr, self.other_sites)) or 'none'}."
            )
        assigned: dict[Guidance, set[str]] = {}
        for name in self.other_sites:
            strategy = guidance.get(name, guidance[None])
            strategy.check(found[name])
            assigned.setdefault(strategy, set()).add(name)
        return assigned


class _Prior:
    """The model of one potential."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential

    def __call__(self) -> jax.Array:
        import numpyro

        return numpyro.sample("x", Diffusion(self.potential))


def _as_drawn(site: Site) -> Site:
    """An ordinary latent with the density that it is drawn from: scales and masks weigh sites, not draws."""

    def unmasked(fn: Any) -> Any:
        masked = MaskedDistribution
        return jax.tree.map(
            lambda d: unmasked(d.base_dist) if isinstance(d, masked) else d, fn, is_leaf=lambda d: isinstance(d, masked)
        )

    return site | {"fn": unmasked(site["fn"]), "scale": None}


def _per_site(guidance: Guidances | None) -> dict[str | None, Guidance]:
    if guidance is None:
        return {None: Tweedie()}
    if isinstance(guidance, Guidance):
        return {None: guidance}
    if isinstance(guidance, Mapping) and all(isinstance(g, Guidance) for g in guidance.values()):
        return {None: Tweedie()} | {name: strategy for name, strategy in guidance.items()}
    raise TypeError(
        "guidance must be a strategy such as lehr.guidance.Tweedie(), or a mapping from site names to "
        f"strategies; got {guidance!r}."
    )
