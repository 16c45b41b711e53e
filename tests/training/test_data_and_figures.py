"""Data sets by name and by file, what a training starts from, and the figures on a card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lehr
from lehr.networks import ElementwiseMLP, ResidualMLP
from lehr.training.data import load_data, read_data
from lehr.training.denoising import denoising_score_matching
from lehr.training.evaluate import calibration, held_out_losses
from lehr.training.start import gaussian_base, suitable_network, untrained_energy

STD, SIGMA = 0.6, 0.5


class Zero(nnx.Module):
    def __call__(self, z, c):
        return jnp.zeros_like(z)


class Perfect(nnx.Module):
    """The head that has learnt N(0, STD²)."""

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, x, c):
        schedule = lehr.VPCosine()
        t = schedule.time(-2 * c)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        data, noise = (a * x / (alpha**2 * STD**2 + sigma**2) for a in (alpha * STD**2, sigma))
        return {"noise": noise, "data": data, "v": alpha * noise - sigma * data}[self.prediction]


@pytest.mark.parametrize("prediction", ["noise", "data", "v"])
def test_the_loss_of_a_perfect_score_is_the_variance_that_no_score_can_predict(prediction):
    """At σ/α = SIGMA alone: Var(ε | x) = u = s²/(s² + SIGMA²) a dimension, in the head's units times (σ/α)² for
    data and 1/α² for v."""
    p = lehr.ScoreNetwork(Perfect(prediction), lehr.VPCosine(), (3,), prediction=prediction, std=STD)
    data = STD * jax.random.normal(jax.random.key(0), (20_000, 3))
    u = STD**2 / (STD**2 + SIGMA**2)
    alpha_squared = 1 / (1 + SIGMA**2)
    factor = {"noise": 1.0, "data": SIGMA**2, "v": 1 / alpha_squared}[prediction]
    for weighting, expected in (("likelihood", 3 * u), ("uniform", 3 * u * factor)):
        loss = denoising_score_matching(
            p, jax.random.key(1), data, sigma_range=(SIGMA, SIGMA * (1 + 1e-5)), weighting=weighting
        )
        assert float(loss) == pytest.approx(expected, rel=4 * np.sqrt(2 / 60_000))


def test_the_card_s_losses_and_calibration_of_an_exact_energy():
    base = lehr.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.4, [0.3, 0.7])
    p = lehr.EnergyNetwork(Zero(), head="inner", base=base, sigma_range=(0.05, 50.0))
    data = base.sample(jax.random.key(0), 0.0, (20_000,))
    far, near = held_out_losses(p, data, sigmas=(20.0, 0.05), rng_key=jax.random.key(1))
    # Var(ε | y) a dimension: far out s²/σ² with the whole spread, near the data s²/(s² + σ²) with that of a mode.
    variance = np.asarray(base.moments(0.0).std ** 2).mean()
    assert far["error"] == pytest.approx(variance / 400, rel=0.05)
    assert near["error"] == pytest.approx(0.16 / (0.16 + 0.0025), rel=0.03)
    assert near["standard_error"] == pytest.approx(1 / np.sqrt(20_000), rel=0.1)  # the mean of two squares
    for figure in calibration(p, data[:20], sigmas=(0.1, 1.0), rng_key=jax.random.key(2), tolerance=1e-4):
        assert abs(figure["mean"]) < 3e-3
        assert figure["spread"] < 3e-3


def test_an_energy_off_by_a_constant_is_found_out():
    class Off(nnx.Module):
        def __call__(self, z, c):
            return -0.5 * jnp.exp(c) * (1 + jnp.exp(2 * c))  # undoes the prefactor of std 1: log p is too high by .5

    p = lehr.EnergyNetwork(Off(), base=lehr.Gaussian([0.0, 0.0]), sigma_range=(0.05, 50.0))
    data = jax.random.normal(jax.random.key(0), (10, 2))
    (figure,) = calibration(p, data, sigmas=(0.3,), rng_key=jax.random.key(1), tolerance=1e-4)
    assert figure["mean"] == pytest.approx(0.5, abs=3e-3)


def test_digits_are_split_by_class_and_lie_in_their_range():
    data = load_data("digits")
    assert len(data.events) + len(data.held_out) == 1797
    assert data.num_classes == 10
    ours, theirs = (np.bincount(labels) for labels in (data.labels, data.held_out_labels))
    assert np.all(np.abs(theirs - 500 / 1797 * (ours + theirs)) <= 0.5)
    steps = (np.concatenate([data.events, data.held_out]) + 1) / data.grain
    assert steps.min() == 0
    assert steps.max() == 16
    np.testing.assert_array_equal(steps, np.round(steps))
    rows = {event.tobytes() for event in data.events}
    assert sum(event.tobytes() in rows for event in data.held_out) <= 1  # the set itself may repeat a digit


def test_files_of_events_are_read_and_others_refused(tmp_path):
    rng = np.random.default_rng(0)
    events, labels = rng.normal(size=(30, 2)), np.repeat([0, 1, 2], 10)
    np.save(tmp_path / "plain.npy", events)
    np.savez(tmp_path / "classes.npz", events=events, labels=labels)
    np.savez(tmp_path / "strange.npz", pictures=events)
    plain, classes = read_data(tmp_path / "plain.npy"), read_data(tmp_path / "classes.npz")
    assert plain.num_classes == 0
    assert classes.num_classes == 3
    for data in (plain, classes):
        everything = np.concatenate([data.events, data.held_out])
        np.testing.assert_array_equal(np.sort(everything, 0), np.sort(events.astype(np.float32), 0))
    with pytest.raises(ValueError, match="pictures"):
        read_data(tmp_path / "strange.npz")
    with pytest.raises(ValueError, match="no data set named 'cats'"):
        load_data("cats")


def covariances(mixture):
    basis, stds = np.asarray(mixture.basis), np.asarray(mixture.stds)
    return (basis * stds[:, None, :] ** 2) @ basis.transpose(0, 2, 1)


def test_the_base_of_few_examples_is_a_gaussian_of_each_class_drawn_towards_the_mean_covariance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2, 1)) * [[1.0], [0.2]]
    y = np.repeat([0, 1], [10, 20])
    flat = x.reshape(30, 2)
    np.testing.assert_allclose(gaussian_base(x).covariance, np.cov(flat.T, bias=True), atol=1e-5)
    by_class = gaussian_base(x, y)
    each = [np.cov(flat[y == k].T, bias=True) for k in (0, 1)]
    within = each[0] / 3 + 2 * each[1] / 3
    for k, n in enumerate((10, 20)):
        kin = (n * each[k] + 4 * within) / (n + 4)
        np.testing.assert_allclose(covariances(by_class)[k], (n * each[k] + 4 * kin) / (n + 4), atol=1e-5)
        np.testing.assert_allclose(by_class.locs[k], flat[y == k].mean(0), atol=1e-6)
    np.testing.assert_allclose(np.exp(by_class.log_weights), [1 / 3, 2 / 3], rtol=1e-5)
    with pytest.raises(ValueError, match=r"none of \[1\]"):
        gaussian_base(x, 2 * y)


def test_the_base_of_many_examples_has_a_gaussian_for_each_cluster():
    """Two classes of two clusters each; the components lie class after class, each drawn towards its own class."""
    rng = np.random.default_rng(1)
    centres = np.array([[[-4.0, 0.0], [4.0, 0.0]], [[0.0, -4.0], [0.0, 4.0]]])
    y, part = np.repeat([0, 1], 50), np.tile(np.repeat([0, 1], [20, 30]), 2)
    x = centres[y, part] + rng.normal(size=(100, 2)) * np.where(y == 0, 0.3, 0.9)[:, None]
    base = gaussian_base(x, y)
    assert base.log_weights.size == 4
    own = [[np.cov(x[(y == k) & (part == j)].T, bias=True) for j in (0, 1)] for k in (0, 1)]
    of_class = [0.4 * first + 0.6 * second for first, second in own]
    for k in (0, 1):
        kin = (50 * of_class[k] + 4 * (of_class[0] + of_class[1]) / 2) / 54
        for j, n in ((0, 20), (1, 30)):
            mine = 2 * k + int(np.argmin(np.sum((base.locs[2 * k : 2 * k + 2] - centres[k, j]) ** 2, 1)))
            np.testing.assert_allclose(base.locs[mine], x[(y == k) & (part == j)].mean(0), atol=1e-5)
            np.testing.assert_allclose(covariances(base)[mine], (n * own[k][j] + 4 * kin) / (n + 4), atol=1e-5)
            assert float(jnp.exp(base.log_weights[mine])) == pytest.approx(n / 100, rel=1e-5)
    assert gaussian_base(rng.normal(size=(1000, 2))).log_weights.size == 5


def test_the_base_of_events_that_are_all_alike_is_finite():
    base = gaussian_base(np.ones((100, 3)))
    peak = -1.5 * np.log(2 * np.pi * 0.1**2)
    assert float(base.log_density_at(jnp.ones(3), 1.0, 0.1)) == pytest.approx(peak, abs=1e-3)


def test_an_untrained_energy_has_the_data_s_moments():
    rng = np.random.default_rng(0)
    x = 3 + rng.normal(size=(40, 2)) @ [[1.0, 0.0], [0.8, 0.3]]  # too few for more than one Gaussian
    p = untrained_energy(ResidualMLP(2, 2, width=4, num_frequencies=2, rngs=nnx.Rngs(0)), x)
    np.testing.assert_allclose(p.moments(0.0).mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(p.moments(0.0).std, x.std(0), rtol=1e-4)
    assert float(p.std) == pytest.approx(np.sqrt(x.var(0).mean()), rel=1e-5)


def test_an_energy_of_alike_elements_sees_them_about_one_mean():
    x = np.random.default_rng(0).normal([1.0, 3.0], [0.5, 1.0], (400, 2))
    network = suitable_network((2,), 0, 0.8, alike=True)
    p = untrained_energy(network, x)
    assert isinstance(network, ElementwiseMLP)
    assert p.head == "scalar"
    np.testing.assert_allclose(p.mean, [x.mean()] * 2, rtol=1e-5)
    np.testing.assert_allclose(p.moments(0.0).mean, x.mean(0), rtol=1e-5)
