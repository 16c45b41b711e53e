r"""Moves between two levels of a ladder: what takes x from a noisy level t' to a cleaner one t.

All of them follow ∇ log π_t', the gradient g of the whole path, as if it were the score of one
diffusion. W counts the noise (1 for one model, Σ w_i for a product), and with
δ = 1 − exp(λ' − λ),

    x̂₀ = (x' + σ'² g/W)/α',    ε̂ = −σ' g/W

    ancestral  x ~ N(κ x' + α δ x̂₀, σ² δ)  for W = 1                   (Ho et al., 2020)
    ddim       x = α x̂₀ + σ ε̂                                          (Song et al., 2021)
    heun       the same with the mean of ε̂ at both ends                (Karras et al., 2022)
    restart    heun; then noise is added back, and the step made again  (Xu et al., 2023)

For W ≠ 1 the ancestral kernel is the normalised product of the forward kernel, once, and the
reverse over the forward kernel, W times: N of the precision (W e^λ + (1 − W) e^λ')/(α² δ).

A product's own path is no diffusion and none of these moves stays on it. A Markov kernel at the
level just reached, a *corrector*, brings chains back; weights account for it exactly.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lehr.programs.ratios import Level, lost_share

__all__ = ["DDIM", "PREDICTORS", "Ancestral", "Departure", "Heun", "Predictor", "Restart", "as_predictor"]


class Departure(NamedTuple):
    """What a move starts from: a point at the noisier level, and the level to reach.

    Attributes:
        x: all of x', flat, shape (D,).
        gradient: g = ∇ log π_t'(x'), shape (D,).
        copies: W for each coordinate, shape (D,).
        noisy: the level left.
        clean: the level to reach.
        gradient_at: ``gradient_at(x, is_clean)``, ∇ log π at another x, at the cleaner level or the noisier.
    """

    x: jax.Array
    gradient: jax.Array
    copies: jax.Array
    noisy: Level
    clean: Level
    gradient_at: Callable[[jax.Array, bool], jax.Array]

    @property
    def counted(self) -> jax.Array:
        """W where the noise is counted at all, and 1 elsewhere."""
        return jnp.where(self.copies > 0, self.copies, 1.0)

    @property
    def denoised(self) -> jax.Array:
        """x̂₀."""
        return (self.x + self.noisy.sigma**2 * self.gradient / self.counted) / self.noisy.alpha

    @property
    def noise(self) -> jax.Array:
        """ε̂."""
        return -self.noisy.sigma * self.gradient / self.counted


class Predictor(abc.ABC):
    """A move of x from one level to the next; subclasses are frozen dataclasses, static under ``jit``.

    Attributes:
        evaluations: gradients that it takes besides the one at the start.
    """

    evaluations: int = 0

    @abc.abstractmethod
    def move(self, rng_key: jax.Array, start: Departure) -> jax.Array:
        """x at the cleaner level, flat, shape (D,).

        Args:
            rng_key: for what is random.
            start: the point to move, and between which levels.
        """


@dataclass(frozen=True)
class Ancestral(Predictor):
    """The reverse kernel of denoising diffusion models (Ho, Jain & Abbeel, NeurIPS 2020)."""

    def move(self, rng_key: jax.Array, start: Departure) -> jax.Array:
        mean, std = self.kernel(start)
        return mean + std * jax.random.normal(rng_key, start.x.shape)

    def kernel(self, start: Departure) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the proposal."""
        noisy, clean, copies = start.noisy, start.clean, start.copies
        delta = lost_share(noisy, clean)
        kept = clean.sigma / noisy.sigma * jnp.exp((noisy.log_snr - clean.log_snr) / 2)
        mean = kept * start.x + clean.alpha * delta * start.denoised
        ratio = jnp.exp(noisy.log_snr - clean.log_snr)
        scale = copies + (1 - copies) * ratio  # the precision, over 1/(σ² δ)
        safe = jnp.maximum(scale, 0.1)
        forward = clean.alpha / noisy.alpha * ratio * start.x
        return (copies * mean + (1 - copies) * forward) / safe, clean.sigma * jnp.sqrt(delta / safe)

    def informed(self, start: Departure, curvature: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same, given H', the mean curvature of −log π_t', shape (D,).

        K(x) ∝ π_t(x) f(x' | x) has the precision H + a²/b², with b² = σ'² δ. W diffusion models of data
        with variance s² bend by W/(α² s² + σ²), which gives s² from H', and H from s². They never bend by
        more than W/σ'²; where H' is twice that, a likelihood dominates. Its curvature stays what it
        is in units of the data, and the mean is that of a Gaussian of curvature H.
        """
        noisy, clean, counted = start.noisy, start.clean, start.counted
        mean, _ = self.kernel(start)
        a, b2 = noisy.alpha / clean.alpha, noisy.sigma**2 * lost_share(noisy, clean)
        variance = jnp.maximum(counted / curvature - noisy.sigma**2, 0.0) / noisy.alpha**2
        bend = counted / (clean.alpha**2 * variance + clean.sigma**2)
        stiff = curvature > 2 * counted / noisy.sigma**2
        precision = jnp.where(stiff, curvature * a**2, bend) + a**2 / b2
        newton = (curvature * a * (start.x + start.gradient / curvature) + a * start.x / b2) / precision
        return jnp.where(stiff, newton, mean), precision**-0.5


@dataclass(frozen=True)
class DDIM(Predictor):
    """One Euler step of the probability-flow equation (Song, Meng & Ermon, ICLR 2021)."""

    def move(self, rng_key: jax.Array, start: Departure) -> jax.Array:
        return start.clean.alpha * start.denoised + start.clean.sigma * start.noise


@dataclass(frozen=True)
class Heun(Predictor):
    """One Heun step of the probability-flow equation (Karras et al., NeurIPS 2022)."""

    evaluations = 1

    def move(self, rng_key: jax.Array, start: Departure) -> jax.Array:
        noisy, clean = start.noisy, start.clean
        reached = DDIM().move(rng_key, start)
        slopes = noisy.sigma * start.gradient + clean.sigma * start.gradient_at(reached, True)
        ratio = clean.alpha / noisy.alpha
        return ratio * start.x - (clean.sigma - ratio * noisy.sigma) * slopes / (2 * start.counted)


@dataclass(frozen=True)
class Restart(Predictor):
    """A step down, then ``num_restarts`` times noise up and the step down again: it forgets the errors
    that a deterministic step carries along (Xu et al., Restart sampling, NeurIPS 2023).

    Args:
        num_restarts: how often, at least 1.
        method: of the steps down, ``"heun"`` or ``"ddim"``.

    Raises:
        ValueError: for a count below 1 or another method.
    """

    num_restarts: int = 1
    method: Literal["heun", "ddim"] = "heun"

    def __post_init__(self) -> None:
        if not isinstance(self.num_restarts, int) or self.num_restarts < 1:
            raise ValueError(f"num_restarts must be an integer of at least 1; got {self.num_restarts!r}.")
        if self.method not in ("heun", "ddim"):
            raise ValueError(f'the method of a Restart must be "heun" or "ddim"; got {self.method!r}.')

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        down = PREDICTORS[self.method].evaluations
        return down + self.num_restarts * (1 + down)

    def move(self, rng_key: jax.Array, start: Departure) -> jax.Array:
        down, noisy, clean = PREDICTORS[self.method], start.noisy, start.clean
        std = noisy.sigma * jnp.sqrt(lost_share(noisy, clean) / start.counted)
        x = down.move(rng_key, start)
        for i in range(self.num_restarts):
            up = noisy.alpha / clean.alpha * x + std * jax.random.normal(jax.random.fold_in(rng_key, i), x.shape)
            x = down.move(rng_key, start._replace(x=up, gradient=start.gradient_at(up, False)))
        return x


PREDICTORS: dict[str, Predictor] = {"ancestral": Ancestral(), "ddim": DDIM(), "heun": Heun()}
PREDICTORS["restart"] = Restart()


def as_predictor(name: str | Predictor | None) -> Predictor | None:
    """The predictor of that name.

    Raises:
        ValueError: if there is none.
    """
    if name is None or isinstance(name, Predictor):
        return name
    if name not in PREDICTORS:
        known = ", ".join(map(repr, PREDICTORS))
        raise ValueError(f"unknown predictor {name!r}: it must be None, one of {known}, or a lehr.Restart(...).")
    return PREDICTORS[name]
