r"""Networks read as scores.

A network f is called as f(x, c), or f(x, c, label) if it is class-conditional. What c is,
``time_input`` says:

    "time"          t                         "sigma"   σ/α
    "log_ratio"     log(σ/α)                  "step"    i = t (T − 1), continuous, with T training steps
    "log_ratio/4"   log(σ/α)/4                a function t ↦ c of the user's own

and what its output is, ``prediction`` says (:mod:`lehr.predictions`). Each reading of the
potential is computed from the head in the form that is not singular there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from lehr.networks.described import Described
from lehr.networks.wrap import Network, wrap
from lehr.potentials.base import Moments, ScorePotential, check_positive, concrete, replace
from lehr.predictions import PREDICTIONS, Prediction, Readings, network_input, read
from lehr.schedules import DiscreteSchedule, Schedule

__all__ = ["TIME_INPUTS", "ScoreNetwork"]


def _log_ratio(schedule: Schedule, t: jax.Array) -> jax.Array:
    """log(σ/α), finite where σ or α vanishes."""
    return -jnp.clip(schedule.log_snr(t), -50, 50) / 2


TIME_INPUTS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "time": lambda schedule, t: t,
    "log_ratio": _log_ratio,
    "log_ratio/4": lambda schedule, t: _log_ratio(schedule, t) / 4,
    "sigma": lambda schedule, t: jnp.exp(_log_ratio(schedule, t)),
    "step": lambda schedule, t: schedule.step(t),
}


class ScoreNetwork(ScorePotential):
    """A network whose output is, or is read as, a score.

    Args:
        network: what :func:`lehr.networks.wrap` takes: a Flax NNX module, a Flax Linen
            ``(module, variables)``, an Equinox module, or ``(apply, params)``. Called as
            ``network(x, c)`` with x of shape ``event_shape`` and c a scalar, it returns an array of
            the shape of x.
        schedule: the schedule that it was trained with.
        event_shape: shape of x.
        prediction: what the output is: ``"noise"``, ``"data"``, ``"score"``, ``"v"``, ``"velocity"``,
            or ``"edm"`` for an F under EDM's preconditioning, whose network sees x scaled to unit variance.
        time_input: what the network is told of the noise: ``"log_ratio"`` log(σ/α), ``"log_ratio/4"``,
            ``"sigma"`` σ/α, ``"time"`` t, ``"step"`` t (T − 1) with T the steps of a DiscreteSchedule,
            or a function of t.
        num_classes: number of labels of a class-conditional network, which is called as
            ``network(x, c, label)``; by default what the network itself says. :meth:`given` fixes the
            label; lehr's own networks know a null label besides, for any class, and start with it.
        sigma_data: the standard deviation of the data in EDM's preconditioning, in data units.
        mean: the data's mean, () or event-shaped, in data units.
        std: the data's standard deviation, () or event-shaped, in data units.
        feature_scale: standard deviation of the data's finest feature; defaults to the least ``std``.

    Raises:
        TypeError: for a network that is none of these.
        ValueError: for an unknown prediction or time input, or scales that are not positive.
    """

    network: Network
    label: jax.Array | None
    sigma_data: jax.Array
    mean: jax.Array
    std: jax.Array
    feature_scale: jax.Array
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)
    prediction: Prediction = eqx.field(static=True)
    time_input: str | Callable[[jax.Array], ArrayLike] = eqx.field(static=True)
    num_classes: int | None = eqx.field(static=True)

    def __init__(
        self,
        network: Any,
        schedule: Schedule,
        event_shape: tuple[int, ...],
        *,
        prediction: Prediction = "noise",
        time_input: str | Callable[[jax.Array], ArrayLike] = "log_ratio",
        num_classes: int | None = None,
        sigma_data: ArrayLike = 0.5,
        mean: ArrayLike = 0.0,
        std: ArrayLike = 1.0,
        feature_scale: ArrayLike | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {prediction!r}; expected one of {', '.join(PREDICTIONS)}.")
        if not callable(time_input) and time_input not in TIME_INPUTS:
            known = ", ".join(TIME_INPUTS)
            raise ValueError(f"unknown time_input {time_input!r}; expected one of {known}, or a function of t.")
        if time_input == "step" and not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f'time_input="step" needs a DiscreteSchedule, whose steps are counted; got {schedule!r}. '
                "For steps of another schedule pass a function, such as lambda t: 999 * t."
            )
        if num_classes is None:
            num_classes = getattr(network, "num_classes", 0) or None
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes counts labels, at least one; got {num_classes}.")
        self.network = wrap(network)
        knows_null = num_classes is not None and isinstance(network, Described)
        self.label = jnp.asarray(num_classes) if knows_null else None
        self.sigma_data = check_positive("sigma_data", sigma_data)
        self.mean = jnp.broadcast_to(jnp.asarray(mean, float), event_shape)
        self.std = jnp.broadcast_to(check_positive("std", std), event_shape)
        self.feature_scale = check_positive(
            "feature_scale", jnp.min(self.std) if feature_scale is None else feature_scale
        )
        self.schedule = schedule
        self.event_shape = tuple(event_shape)
        self.prediction = prediction
        self.time_input = time_input
        self.num_classes = num_classes

    def given(self, label: ArrayLike) -> ScoreNetwork:
        """The potential of one class.

        Args:
            label: an integer in [0, num_classes), a scalar; it may be traced, such as a latent of a model.

        Raises:
            ValueError: if the network has no classes, or ``label`` is not one of them.
        """
        if self.num_classes is None:
            raise ValueError("given(label) needs a class-conditional network, one with num_classes; this has none.")
        label = jnp.asarray(label)
        if label.shape != () or not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(f"a label is one integer; got {label.dtype} of shape {label.shape}. Use vmap for several.")
        known = concrete(label)
        if known is not None and not 0 <= known < self.num_classes:
            raise ValueError(f"labels of this network run from 0 to {self.num_classes - 1}; got {int(known)}.")
        return replace(self, label=label)

    def moments(self, t: ArrayLike) -> Moments:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return Moments(alpha * self.mean, jnp.hypot(alpha * self.std, sigma))

    def width(self, t: ArrayLike) -> jax.Array:
        return jnp.hypot(self.schedule.alpha(t) * self.feature_scale, self.schedule.sigma(t))

    def _readings(self, x: jax.Array, t: jax.Array) -> Readings:
        scaled = network_input(self.prediction, x, t, self.schedule, self.sigma_data)
        output = self.network(scaled, self._told(t), *self._labels())
        if jnp.shape(output) != x.shape:
            raise ValueError(f"the network must return the shape of x, {x.shape}; it returned {jnp.shape(output)}.")
        return read(self.prediction, output, x, t, self.schedule, self.sigma_data)

    def _told(self, t: jax.Array) -> jax.Array:
        if callable(self.time_input):
            return jnp.asarray(self.time_input(t), float)
        return TIME_INPUTS[self.time_input](self.schedule, t)

    def _labels(self) -> tuple[jax.Array, ...]:
        if self.num_classes is None:
            return ()
        if self.label is None:
            raise ValueError(f"this network has {self.num_classes} classes: fix one first, as in p.given(0).")
        return (self.label,)

    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._readings(x, t).score

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._readings(x, t).denoise

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._readings(x, t).noise
