"""Scores of networks against the Gaussian that a network can be exactly: every framework, head and time input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import scores
from flax import linen, nnx

import lehr
from lehr.networks import wrap
from lehr.potentials.score_network import TIME_INPUTS
from lehr.predictions import PREDICTIONS, predict
from lehr.programs.closure import close

EPS = np.finfo(np.float32).eps
MEAN, STD, SIGMA_DATA = np.array([0.3, -0.2]), 0.6, 0.4
T = np.array([0.02, 0.2, 0.5, 0.8, 0.99], np.float32)
X = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)

FLOW, COSINE, EXPLODING = lehr.RectifiedFlow(), lehr.VPCosine(), lehr.VE(0.01, 20.0)
DISCRETE = lehr.DiscreteSchedule(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def halved(t):
    return t / 2


INPUTS = (*TIME_INPUTS, halved)


def schedule_of(prediction, time_input):
    if time_input == "step":
        return DISCRETE
    return {"velocity": FLOW, "edm": EXPLODING}.get(prediction, COSINE)


def time_of(told, time_input, schedule):
    """t, from what a network is told."""
    return {
        "time": lambda: told,
        "log_ratio": lambda: schedule.time(-2 * told),
        "log_ratio/4": lambda: schedule.time(-8 * told),
        "sigma": lambda: schedule.time(-2 * jnp.log(told)),
        "step": lambda: told / 999,
        halved: lambda: 2 * told,
    }[time_input]()


def perfect(prediction, time_input, schedule):
    """What a head would say of (x, told), had it learned N(mean, STD²) exactly."""

    def head(mean, x, told):
        t = time_of(told, time_input, schedule)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if prediction == "edm":
            x = x * jnp.hypot(sigma, alpha * SIGMA_DATA)
        offset = (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
        return predict(prediction, mean + alpha * STD**2 * offset, sigma * offset, t, schedule, SIGMA_DATA)

    return head


class InNNX(nnx.Module):
    def __init__(self, head):
        self.mean, self.head = nnx.Param(jnp.asarray(MEAN, float)), head

    def __call__(self, x, told):
        return self.head(self.mean[...], x, told)


class InLinen(linen.Module):
    head: object

    @linen.compact
    def __call__(self, x, told):
        return self.head(self.param("mean", lambda _: jnp.asarray(MEAN, float)), x, told)


class InEquinox(eqx.Module):
    mean: jax.Array
    head: object = eqx.field(static=True)

    def __call__(self, x, told):
        return self.head(self.mean, x, told)


FRAMEWORKS = {
    "nnx": InNNX,
    "linen": lambda head: (InLinen(head), InLinen(head).init(jax.random.key(0), X[0], 0.5)),
    "equinox": lambda head: InEquinox(jnp.asarray(MEAN, float), head),
    "plain": lambda head: (head, jnp.asarray(MEAN, float)),
}


def network(framework, prediction, time_input, **settings):
    schedule = schedule_of(prediction, time_input)
    return lehr.ScoreNetwork(
        FRAMEWORKS[framework](perfect(prediction, time_input, schedule)),
        schedule,
        (2,),
        prediction=prediction,
        time_input=time_input,
        sigma_data=SIGMA_DATA,
        **settings,
    )


@eqx.filter_jit
def evaluate(potentials):
    return [scores(p, X, T) for p in potentials]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_perfect_head_is_the_gaussian_whatever_it_is_written_in_and_told(framework, prediction):
    potentials = [network(framework, prediction, time_input) for time_input in INPUTS]
    exact = [lehr.Gaussian(MEAN, STD, p.schedule) for p in potentials]
    for time_input, p, got, want in zip(INPUTS, potentials, evaluate(potentials), evaluate(exact), strict=True):
        alpha, sigma = (np.asarray(f(T), float)[:, None, None] for f in (p.schedule.alpha, p.schedule.sigma))
        # x and the time told are rounded, by EPS of themselves; x̂₀ divides that by α, ε̂ by σ and s by σ².
        size = 128 * EPS * (1 + np.abs(X))
        wrong = [np.abs(np.asarray(a, float) - b) for a, b in zip(got, want, strict=True)]
        assert np.all(wrong[0] <= size / sigma**2), time_input
        assert np.all(wrong[1] <= size / alpha), time_input
        assert np.all(wrong[2] <= size / sigma), time_input
    assert all(np.all(np.isfinite(a)) for a in scores(potentials[0], X, np.array([0.0, 1.0], np.float32)))


def test_training_steps_are_told_exactly():
    steps = np.arange(1000)
    told = jax.vmap(DISCRETE.step)(DISCRETE.time_of_step(steps))
    np.testing.assert_array_equal(told, steps)
    between = np.array([0.5, 3.25, 998.75], np.float32)
    np.testing.assert_allclose(DISCRETE.step(DISCRETE.time_of_step(between)), between, rtol=4 * EPS)
    slopes = [float(jax.grad(DISCRETE.step)(DISCRETE.time_of_step(i))) for i in (7.0, 7.5)]
    np.testing.assert_allclose(slopes, 999, rtol=EPS)


def test_equal_networks_are_one_structure():
    for framework in FRAMEWORKS:
        head = perfect("noise", "time", COSINE)
        one, other = (jax.tree.structure(wrap(FRAMEWORKS[framework](head))) for _ in range(2))
        assert one == other, framework


def test_a_score_network_has_the_stated_moments_and_width():
    p = network("nnx", "noise", "time", mean=MEAN, std=[0.2, 0.6])
    gaussian = lehr.Gaussian(MEAN, [0.2, 0.6])
    for t in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(p.moments(t).mean, gaussian.moments(t).mean, rtol=1e-6)
        np.testing.assert_allclose(p.moments(t).std, gaussian.moments(t).std, rtol=1e-6)
        np.testing.assert_allclose(p.width(t), gaussian.width(t), rtol=1e-6)


# Classes.

MEANS = np.array([[0.3, -0.2], [-1.0, 0.5], [2.0, 0.0]])


def conditional():
    """Three Gaussians, one a class."""

    def head(means, x, t, label):
        return perfect("noise", "time", COSINE)(means[label], x, t)

    settings = {"num_classes": 3, "time_input": "time"}
    return lehr.ScoreNetwork((head, jnp.asarray(MEANS, float)), COSINE, (2,), **settings)


def test_a_class_is_its_own_gaussian_also_when_the_label_is_traced():
    p, t = conditional(), 0.4
    traced = jax.jit(jax.vmap(lambda label: p.given(label).score(X[0], t)))(jnp.arange(3))
    for label, mean in enumerate(MEANS):
        want = lehr.Gaussian(mean, STD, COSINE).score(X[0], t)
        np.testing.assert_allclose(p.given(label).score(X[0], t), want, rtol=16 * EPS, atol=16 * EPS)
        np.testing.assert_allclose(traced[label], want, rtol=16 * EPS, atol=16 * EPS)


def test_another_label_is_another_number_in_the_same_program():
    one, other = (close(lehr.Path(conditional().given(label))) for label in (0, 2))
    assert one[0] == other[0]
    assert any(int(np.asarray(c)) == 2 for c in other[1]["log_density"] if np.asarray(c).dtype.kind == "i")


def test_classifier_free_guidance_is_a_contrast_of_classes():
    p, t, w = conditional(), 0.3, 0.5
    guided = lehr.Contrast(p.given(0), p.given(1), weight=w)
    want = (1 + w) * p.given(0).score(X[1], t) - w * p.given(1).score(X[1], t)
    np.testing.assert_allclose(guided.score(X[1], t), want, rtol=32 * EPS, atol=32 * EPS)


def build(**settings):
    return lehr.ScoreNetwork((lambda _, x, c: x, ()), COSINE, (2,), **settings)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: build(prediction="eps"), ValueError, "unknown prediction 'eps'.*noise, data"),
        (lambda: build(time_input="minutes"), ValueError, "unknown time_input 'minutes'.*log_ratio/4.*function of t"),
        (lambda: build(time_input="step"), ValueError, "needs a DiscreteSchedule.*999"),
        (lambda: build(std=[1.0, 0.0]), ValueError, "std must be positive"),
        (lambda: build(feature_scale=0.0), ValueError, "feature_scale must be positive"),
        (lambda: build(sigma_data=-1.0), ValueError, "sigma_data must be positive"),
        (lambda: build(num_classes=0), ValueError, "at least one"),
        (lambda: build().given(0), ValueError, "class-conditional"),
        (lambda: conditional().given(3), ValueError, "from 0 to 2; got 3"),
        (lambda: conditional().given(0.5), ValueError, "one integer"),
        (lambda: conditional().given([0, 1]), ValueError, "one integer.*vmap"),
        (lambda: conditional().score(X[0], 0.5), ValueError, r"3 classes.*given\(0\)"),
        (lambda: wrap(lambda x, c: x), TypeError, r"\(lambda _, x, c"),
        (lambda: wrap((1, 2)), TypeError, "Flax Linen"),
        (lambda: lehr.ScoreNetwork((lambda _, x, c: x[:1], ()), COSINE, (2,)).score(X[0], 0.5), ValueError, "shape"),
    ],
)
def test_impossible_networks_are_refused(made, error, message):
    with pytest.raises(error, match=message):
        made()
