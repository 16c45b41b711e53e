"""Potentials and networks that stand in for trained ones, and whose every reading is known."""

import jax.numpy as jnp
from flax import nnx

import lehr


class _Seen(lehr.Potential):
    """Another potential, of which no more is seen than a subclass shows."""

    inner: lehr.EnergyPotential

    @property
    def schedule(self):
        return self.inner.schedule

    @property
    def event_shape(self):
        return self.inner.event_shape

    def moments(self, t):
        return self.inner.moments(t)

    def width(self, t):
        return self.inner.width(t)

    def _denoise(self, x, t):
        return self.inner._denoise(x, t)

    def _noise(self, x, t):
        return self.inner._noise(x, t)


class Plain(_Seen, lehr.EnergyPotential):
    """An energy that knows nothing of schedules but its own, and nothing of its normaliser."""

    def _log_density(self, x, t):
        return self.inner._log_density(x, t)


class Drifting(Plain):
    """An energy whose constant c(t) is ``rate`` times the log-SNR."""

    rate: float

    def _log_density(self, x, t):
        return self.inner._log_density(x, t) + self.rate * self.schedule.log_snr(t)


class ScoreOf(_Seen, lehr.ScorePotential):
    """What is left of a potential when its density is forgotten."""

    def _score(self, x, t):
        return self.inner._score(x, t)


def score_of(potential, curl=0.0):
    """A potential's score as a network would give it, with a rotation of that curl added."""

    class Noise(nnx.Module):
        def __call__(self, x, t):
            noise = potential.noise(x, t)
            if curl:
                noise -= potential.schedule.sigma(t) * curl / 2 * jnp.stack([-x[1], x[0]])
            return noise

    data = potential.moments(0.0)
    return lehr.ScoreNetwork(
        Noise(), potential.schedule, potential.event_shape, time_input="time", mean=data.mean, std=data.std,
        feature_scale=potential.width(0.0),
    )  # fmt: skip


def normal_score():
    """The score of N(0, 1) in the plane, under a variance-preserving schedule."""

    class Score(nnx.Module):
        def __call__(self, x, c):
            return -x

    return lehr.ScoreNetwork(Score(), lehr.VPCosine(), (2,), prediction="score")


class Flat(nnx.Module):
    """No correction: the energy is its Gaussian part."""

    def __call__(self, z, c):
        return jnp.zeros(())


class Silent(nnx.Module):
    """Predicts zeros, by a parameter that could say otherwise."""

    def __init__(self):
        self.scale = nnx.Param(jnp.zeros(()))

    def __call__(self, x, c):
        return self.scale * x
