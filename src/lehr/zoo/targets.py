"""What the shipped models were trained on: each a density in closed form, so that the
model's error is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from lehr.potentials.analytic import ExactPotential, GaussianMixture, Uniform

__all__ = ["TARGETS", "Target", "target"]


class Target(NamedTuple):
    """A data distribution, in words and exactly."""

    title: str
    exact: ExactPotential
    feature_scale: float


def _ring() -> Target:
    angle = 2 * jnp.pi * jnp.arange(8) / 8
    locs = 0.5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return Target("Eight Gaussians of std 0.03 on a circle of radius 0.5", GaussianMixture(locs, 0.03), 0.03)


def _box(title: str, low: tuple[float, float], high: tuple[float, float]) -> Target:
    narrowest = min(h - l for l, h in zip(low, high, strict=True))  # noqa: E741
    return Target(title, Uniform(low, high), narrowest / 12**0.5)


def _corners(height: float, which: str) -> Target:
    locs = jnp.array([[-1.5, height], [1.5, height]])
    return Target(
        f"Two Gaussians of std 0.4 at the {which} corners (±1.5, {height:g})", GaussianMixture(locs, 0.4), 0.4
    )


_TARGETS: dict[str, Callable[[], Target]] = {
    "ring": _ring,
    "bar": partial(_box, "Uniform on |x| < 0.2, |y| < 1", (-0.2, -1.0), (0.2, 1.0)),
    "left_bar": partial(_box, "Uniform on |x + 0.2| < 0.1, |y| < 1", (-0.3, -1.0), (-0.1, 1.0)),
    "right_bar": partial(_box, "Uniform on |x - 0.2| < 0.1, |y| < 1", (0.1, -1.0), (0.3, 1.0)),
    "box": partial(_box, "Uniform on |x| < 1, |y| < 1", (-1.0, -1.0), (1.0, 1.0)),
    "small_box": partial(_box, "Uniform on |x| < 0.5, |y| < 0.5", (-0.5, -0.5), (0.5, 0.5)),
    "corners_up": partial(_corners, 1.5, "upper"),
    "corners_down": partial(_corners, -1.5, "lower"),
}
TARGETS: tuple[str, ...] = tuple(_TARGETS)


def target(name: str) -> Target:
    """The data distribution of a shipped model.

    Raises:
        ValueError: if no model of that name is shipped.
    """
    if name not in _TARGETS:
        raise ValueError(f"no target named {name!r}; there are {', '.join(TARGETS)}.")
    return _TARGETS[name]()
