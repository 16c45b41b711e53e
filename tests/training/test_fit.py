"""Training reaches optima that are known, and takes up where it stopped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lehr
from lehr.networks import ResidualMLP
from lehr.training.data import as_sampler
from lehr.training.fit import average, drop_labels

MEAN = np.array([0.5, -0.2])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
TRUTH = lehr.Gaussian(MEAN, np.linalg.cholesky(COVARIANCE))
STD = float(np.sqrt(np.trace(COVARIANCE) / 2))


def network(num_outputs=0, width=32, **kwargs):
    return ResidualMLP(2, num_outputs, width=width, num_blocks=1, num_frequencies=8, rngs=nnx.Rngs(0), **kwargs)


def sampler(key, n):
    return TRUTH.sample(key, 0.0, (n,))


def weights(potential):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(potential.network.params)]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_an_energy_learns_the_score_and_the_time_derivative_of_a_gaussian():
    """The network is given N(m, s²) and has to find the correlation.

    What it may miss: 5 % of a score of unit size, and of the time derivative twice what the targets leave, whose
    variance is 2d = 4: the average reaches over 1/(1 − .998) = 500 batches of 256, of which one in about ten
    concerns a level's neighbourhood, so that √(4/(500 · 256/10)) = .018 for each of some ten directions.
    """
    untrained = lehr.EnergyNetwork(network(), mean=MEAN, std=STD, sigma_range=(0.05, 10.0))
    recipe = lehr.Recipe(num_steps=2500, batch_size=256, learning_rate=4e-3, ema_decay=0.998, bound_weight=0.0)
    trained = lehr.fit(untrained, sampler, jax.random.key(0), recipe)
    for sigma in (0.1, 0.4, 2.0):
        y = TRUTH.sample(jax.random.key(1), 0.0, (500,)) + sigma * jax.random.normal(jax.random.key(2), (500, 2))

        def slopes(p, y, log_sigma):
            return jax.grad(lambda y, c: p.log_density_at(y, 1.0, jnp.exp(c)), (0, 1))(y, log_sigma)

        of_all = jax.vmap(slopes, (None, 0, None))
        (score, by_time), (exact, exact_by_time) = (of_all(p, y, jnp.log(sigma)) for p in (trained, TRUTH))
        assert np.sqrt(np.mean(sigma**2 * (score - exact) ** 2)) < 0.05
        error = np.sqrt(np.mean((by_time - exact_by_time) ** 2))
        assert error < 0.12
        if sigma == 0.4:  # where there was most to learn
            assert error < np.sqrt(np.mean((of_all(untrained, y, jnp.log(sigma))[1] - exact_by_time) ** 2)) / 4
    t = TRUTH.schedule.time(-2 * jnp.log(0.1))
    x = TRUTH.sample(jax.random.key(3), t, (500,))
    gap = jax.vmap(trained.log_density, (0, None))(x, t) - jax.vmap(TRUTH.log_density, (0, None))(x, t)
    assert abs(np.mean(gap)) < 0.15  # the time derivative's error over two e-folds where it is not nothing
    assert trained.is_calibrated


@pytest.mark.parametrize("weighting", [pytest.param("uniform", marks=pytest.mark.slow), "likelihood"])
def test_a_score_learns_that_of_a_gaussian(weighting):
    untrained = lehr.ScoreNetwork(network(2), lehr.VPCosine(), (2,), prediction="v", mean=MEAN, std=STD)
    recipe = lehr.Recipe(
        num_steps=1000, batch_size=256, learning_rate=5e-3, ema_decay=0.99, weighting=weighting, sigma_range=(0.1, 10.0)
    )
    trained = lehr.fit(untrained, sampler, jax.random.key(0), recipe)
    for t in (0.2, 0.5, 0.8):
        x = TRUTH.sample(jax.random.key(1), t, (500,))
        error = jax.vmap(trained.noise, (0, None))(x, t) - jax.vmap(TRUTH.noise, (0, None))(x, t)
        assert np.sqrt(np.mean(error**2)) < 0.06  # of a noise of unit size


RECIPE = lehr.Recipe(num_steps=30, batch_size=16)


@pytest.fixture(scope="module")
def untrained():
    return lehr.EnergyNetwork(network(width=16))


@pytest.fixture(scope="module")
def whole(untrained):
    return lehr.fit(untrained, sampler, jax.random.key(0), RECIPE, chunk=10)


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(untrained, whole, tmp_path):
    def fit(key=0, recipe=RECIPE, on_chunk=None):
        return lehr.fit(untrained, sampler, jax.random.key(key), recipe, chunk=10, folder=tmp_path, on_chunk=on_chunk)

    def cut(steps, _):
        if steps == 20:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(on_chunk=cut)
    reports = []
    assert same(fit(on_chunk=lambda steps, _: reports.append(steps)), whole)
    assert reports == [30]
    assert not same(whole, untrained)
    for key, recipe in ((1, RECIPE), (0, dataclasses.replace(RECIPE, learning_rate=1e-3))):
        with pytest.raises(ValueError, match="holds other work"):
            fit(key, recipe)


@pytest.mark.slow
def test_what_comes_back_is_the_average_of_the_weights(untrained, whole):
    """With δ = 0 it is the last weights; the average lags behind them, by little on so short a way."""
    last = lehr.fit(untrained, sampler, jax.random.key(0), dataclasses.replace(RECIPE, ema_decay=0.0), chunk=10)
    start, mean, end = (np.concatenate([w.ravel() for w in weights(p)]) for p in (untrained, whole, last))
    assert 0.001 < np.linalg.norm(mean - end) / np.linalg.norm(end - start) < 0.5


def test_the_moving_average_is_its_recurrence():
    thetas = np.random.default_rng(0).normal(size=(40, 3))
    mean = expected = thetas[0]
    for i, theta in enumerate(thetas):
        decay = min(0.75, (1 + i) / (10 + i))
        mean = average(jnp.asarray(mean), jnp.asarray(theta), jnp.asarray(i), 0.75)
        expected = decay * expected + (1 - decay) * theta
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_the_share_of_hidden_labels_is_what_was_asked():
    n, share = 20_000, 0.15
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 4, n))
    dropped = np.asarray(drop_labels(jax.random.key(0), labels, 4, share))
    hidden = dropped == 4
    assert abs(hidden.mean() - share) < 4 * np.sqrt(share * (1 - share) / n)
    assert np.array_equal(dropped[~hidden], np.asarray(labels)[~hidden])


@pytest.mark.slow
def test_classes_are_learnt_and_the_hidden_label_is_all_of_them():
    """Two classes at ∓1 with masses ¼ and ¾, in one dimension; the base knows nothing of them."""
    locs, masses, std = jnp.array([-1.0, 1.0]), (0.25, 0.75), 0.5
    truth = lehr.GaussianMixture(locs[:, None], std, masses)

    def labelled(key, n):
        key_label, key_noise = jax.random.split(key)
        labels = jax.random.bernoulli(key_label, masses[1], (n,)).astype(int)
        return locs[labels][:, None] + std * jax.random.normal(key_noise, (n, 1)), labels

    untrained = lehr.EnergyNetwork(
        ResidualMLP(1, width=32, num_blocks=1, num_frequencies=8, num_classes=2, rngs=nnx.Rngs(0)),
        event_shape=(1,),
        mean=0.5,
        std=1.0,
        sigma_range=(0.1, 10.0),
    )
    recipe = lehr.Recipe(num_steps=1500, batch_size=256, learning_rate=4e-3, label_dropout=0.3, bound_weight=0.0)
    trained = lehr.fit(untrained, labelled, jax.random.key(0), recipe)
    t = truth.schedule.time(-2 * jnp.log(0.3))
    x = jnp.linspace(-1.5, 1.5, 31)[:, None]
    for label in (0, 1, 2):
        p, q = (jax.vmap(r.given(label).log_density, (0, None))(x, t) for r in (trained, truth))
        inside = np.asarray(q) > np.asarray(q).max() - 3  # where there are data
        assert np.max(np.abs(np.asarray(p - q)[inside])) < 0.25


def test_events_are_drawn_with_equal_chances():
    events, labels = np.arange(10.0)[:, None] * np.ones((1, 2)), np.arange(10) % 3
    x, y = as_sampler((events, labels), (2,), 3, 8)(jax.random.key(0), 20_000)
    counts = np.bincount(np.asarray(x[:, 0], int), minlength=10)
    assert np.all(np.abs(counts - 2000) < 4.5 * np.sqrt(2000 * 0.9))
    assert np.array_equal(np.asarray(y), np.asarray(x[:, 0], int) % 3)


@pytest.mark.parametrize(
    ("data", "classes", "message"),
    [
        (np.zeros((5, 3)), 0, "asked for n"),
        (np.full((5, 2), np.nan), 0, "not finite"),
        (np.zeros((5, 2)), 3, "no labels"),
        ((np.zeros((5, 2)), np.zeros(5, int)), 0, "0 classes"),
        ((np.zeros((5, 2)), np.full(5, 7)), 3, "from 0 to 3"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, classes, message):
    potential = lehr.EnergyNetwork(network(num_classes=classes))
    with pytest.raises(ValueError, match=message):
        lehr.fit(potential, data, jax.random.key(0), lehr.Recipe(num_steps=1, batch_size=4))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"label_dropout": 1.5}, {"time_weight": -1.0},
        {"weighting": "snr"}, {"sigma_range": (1.0, 0.1)},
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes)).split("_")[0]):
        lehr.Recipe(**changes)


def test_only_networks_are_trained():
    with pytest.raises(TypeError, match="only networks"):
        lehr.fit(TRUTH, sampler, jax.random.key(0), lehr.Recipe(num_steps=1))
