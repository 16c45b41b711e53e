"""Network potentials against their formulas, and against Gaussians that a network can be exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import noising, readings
from flax import nnx

import lehr
from lehr.networks import ResidualMLP

EPS = np.finfo(np.float32).eps
HEADS = ("scalar", "inner", "l2", "dae")
MEAN, STD = np.array([0.3, -0.2]), 0.6
T = np.array([0.02, 0.2, 0.5, 0.8, 0.99], np.float32)
X = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)


def mlp(head, readout=0.3):
    """A small random network; the readout of a ResidualMLP starts at zero."""
    network = ResidualMLP(2, 0 if head == "scalar" else 2, width=16, num_blocks=1, num_frequencies=4, rngs=nnx.Rngs(0))
    shape = network.readout.kernel.shape
    network.readout.kernel = nnx.Param(readout * jax.random.normal(jax.random.key(1), shape))
    return network


def energy(head, readout=0.3, schedule=None, limit=None):
    return lehr.EnergyNetwork(mlp(head, readout), schedule, head=head, mean=MEAN, std=STD, limit=limit)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_energy_is_its_formula(head, limit):
    p, network = energy(head, limit=limit), mlp(head)
    log_density = np.asarray(readings(p, X, T)[0], float)
    alpha, sigma = noising(p.schedule, T)
    root = np.sqrt(alpha**2 * STD**2 + sigma**2)
    z = (X - alpha * MEAN) / root
    c = np.broadcast_to(np.log(sigma / alpha)[:, :, 0], z.shape[:2])
    flat = jax.vmap(network)(jnp.asarray(z.reshape(-1, 2), jnp.float32), jnp.asarray(c.ravel(), jnp.float32))
    f = np.asarray(flat, float).reshape(*z.shape[:2], *flat.shape[1:])
    residual = {
        "scalar": lambda: f,
        "inner": lambda: np.sum(z * f, -1),
        "l2": lambda: np.sum(f**2, -1) / 2,
        "dae": lambda: np.sum((z - f) ** 2, -1) / 2,
    }[head]()
    if limit is not None:
        residual = residual / np.sqrt(1 + (residual / limit) ** 2)
    gaussian = -np.sum(z**2, -1) / 2 - np.log(2 * np.pi * root[..., 0] ** 2)
    prefactor = (alpha * STD / sigma * (alpha * STD / root) ** 2)[..., 0]
    # The prefactor, up to 30 here, multiplies a residual that is known to a few float32 roundings.
    np.testing.assert_allclose(log_density, gaussian - prefactor * residual, rtol=1e-5, atol=64 * EPS * prefactor.max())
    assert np.std(prefactor * residual) > 0.1


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_score_denoise_and_noise_of_an_energy_are_one_and_the_same(head, limit):
    p = energy(head, limit=limit)
    t = np.asarray(lehr.Ladder.log_snr(p.schedule, 12).times)
    _, score, data, noise = (np.asarray(a, float) for a in readings(p, X, t))
    alpha, sigma = noising(p.schedule, t)
    size = 1 + np.abs(sigma * score)
    assert np.all(np.abs(noise + sigma * score) <= 64 * EPS * size)
    assert np.all(np.abs(alpha * data - (X + sigma**2 * score)) <= 64 * EPS * (np.abs(X) + sigma * size))


@pytest.mark.parametrize("head", HEADS)
def test_score_of_an_energy_is_the_slope_of_its_log_density(head):
    p, h = energy(head), 1e-2
    t = T[1:]
    score = np.asarray(readings(p, X, t)[1], float)
    for i, e in enumerate(h * np.eye(2, dtype=np.float32)):
        up, down = (np.asarray(readings(p, X + s * e, t)[0], float) for s in (1, -1))
        # Float32 leaves 1e-5 of a log density of order ten; the third derivative, of order 100, h² of it.
        np.testing.assert_allclose((up - down) / (2 * h), score[..., i], rtol=1e-2, atol=3e-3)


@pytest.mark.parametrize("head", HEADS)
def test_energy_is_finite_at_the_data_and_normal_at_the_noise(head):
    p = energy(head)
    at_zero, at_one = zip(*(np.asarray(a) for a in readings(p, X, np.array([0.0, 1.0], np.float32))), strict=True)
    assert all(np.all(np.isfinite(a)) for a in at_zero)
    log_density, score, data, noise = at_one
    np.testing.assert_allclose(log_density, -np.sum(X**2, -1) / 2 - np.log(2 * np.pi), rtol=8 * EPS, atol=8 * EPS)
    np.testing.assert_allclose(score, -X, rtol=8 * EPS)
    np.testing.assert_allclose(noise, X, rtol=8 * EPS)
    np.testing.assert_allclose(data, np.broadcast_to(MEAN, X.shape), rtol=8 * EPS)


def test_far_away_a_bounded_energy_is_its_base_and_no_more_than_the_bound():
    """Of a network that would make a hole of the plane: −F grows like the square of what the Gaussian falls by."""

    class Hole(nnx.Module):
        def __call__(self, z, c):
            return -(jnp.sum(z**2) ** 2)

    free, bounded = (lehr.EnergyNetwork(Hole(), std=STD, limit=limit) for limit in (None, 3.0))
    gaussian = lehr.Gaussian(jnp.zeros(2), STD, bounded.schedule)
    for t in T[:3]:
        x = jnp.array([40.0, -30.0])
        alpha, sigma = float(bounded.schedule.alpha(t)), float(bounded.schedule.sigma(t))
        most, exact = 3.0 * alpha * STD / sigma, float(gaussian.log_density(x, t))
        assert 0 < bounded.log_density(x, t) - exact <= most + 1e-5 * abs(exact)
        assert free.log_density(x, t) > 0


def test_below_what_was_trained_the_density_stands_still():
    p = energy("scalar")
    below = float(p.schedule.time(-2 * np.log(1e-3)))  # σ/α = .001, half of the least that was trained
    trained = float(p.schedule.time(-2 * np.log(2e-3)))
    x = jnp.asarray(X[0])
    np.testing.assert_allclose(p.log_density(x, below), p.log_density(x, 0.0), rtol=1e-5)
    np.testing.assert_allclose(p.log_density(x, trained), p.log_density(x, 0.0), rtol=1e-4)


@pytest.mark.parametrize("schedule", [lehr.VE(0.005, 50.0), lehr.RectifiedFlow(), lehr.VPLinear()])
def test_energy_agrees_across_schedules(schedule):
    p = energy("scalar")
    seen = lehr.with_schedule(p, schedule)
    direct = energy("scalar", schedule=schedule)
    t = np.array([0.1, 0.4, 0.8], np.float32)
    theirs = p.schedule.time(schedule.log_snr(t))
    ratio = p.schedule.alpha(theirs) / schedule.alpha(t)
    for i in range(3):
        here = readings(seen, X, t[i : i + 1])
        there = readings(p, ratio[i] * X, theirs[i : i + 1])
        # σ/α is matched through a time rounded to EPS, which moves readings by 1e-4 of the largest.
        jacobian = 2 * np.log(ratio[i])
        for got, want in zip(here, (there[0] + jacobian, ratio[i] * there[1], *there[2:]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(want))))
    for got, want in zip(readings(seen, X, t), readings(direct, X, t), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("head", ["scalar", "inner", "l2"])
def test_an_untrained_energy_is_the_gaussian_of_its_mean_and_std(head):
    p, gaussian = energy(head, readout=0.0), lehr.Gaussian(MEAN, STD)
    t = np.append(T, 1.0).astype(np.float32)
    for got, want in zip(readings(p, X, t), readings(gaussian, X, t), strict=True):
        np.testing.assert_allclose(got, want, rtol=32 * EPS, atol=32 * EPS)
    for s in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(p.moments(s).mean, gaussian.moments(s).mean, rtol=1e-6)
        np.testing.assert_allclose(p.moments(s).std, gaussian.moments(s).std, rtol=1e-6)
        np.testing.assert_allclose(p.width(s), gaussian.width(s), rtol=1e-6)


def test_width_is_that_of_the_finest_feature():
    p = lehr.EnergyNetwork(mlp("scalar"), std=STD, feature_scale=0.03)
    np.testing.assert_allclose(p.width(0.0), 0.03, rtol=1e-6)
    np.testing.assert_allclose(p.width(1.0), 1.0, rtol=1e-6)


def test_calibrated_is_what_was_said():
    assert not energy("scalar").is_calibrated
    assert lehr.EnergyNetwork(mlp("scalar"), calibrated=True).is_calibrated


# What an energy corrects, and its classes.

FACTORS = np.linalg.cholesky([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.4]], [[0.2, -0.1], [-0.1, 0.2]]])
LOCS, MASSES = np.array([[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0]]), np.array([0.5, 0.2, 0.3])


def by_class(readout=0.3, num_classes=3, base=None):
    network = ResidualMLP(2, 2, width=16, num_blocks=1, num_frequencies=4, num_classes=num_classes, rngs=nnx.Rngs(0))
    shape = network.readout.kernel.shape
    network.readout.kernel = nnx.Param(readout * jax.random.normal(jax.random.key(1), shape))
    base = lehr.GaussianMixture(LOCS, FACTORS, MASSES) if base is None else base
    return lehr.EnergyNetwork(network, head="inner", mean=MEAN, std=STD, base=base)


def test_an_untrained_energy_is_its_base_of_each_class_and_of_all():
    p, t = by_class(readout=0.0), np.append(T, 1.0).astype(np.float32)
    truths = [lehr.Gaussian(m, f) for m, f in zip(LOCS, FACTORS, strict=True)]
    truths.append(lehr.GaussianMixture(LOCS, FACTORS, MASSES))
    for label, truth in enumerate(truths):
        fixed = p.given(label)
        for got, want in zip(readings(fixed, X, t), readings(truth, X, t), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        for s in (0.0, 0.6):
            np.testing.assert_allclose(fixed.moments(s).mean, truth.moments(s).mean, atol=1e-5)
            np.testing.assert_allclose(fixed.moments(s).std, truth.moments(s).std, atol=1e-5)
    for got, want in zip(readings(p, X, t), readings(truths[3], X, t), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_class_may_have_several_components_of_its_base():
    """As many as every other class; they lie class after class."""
    locs, factors = jnp.concatenate([LOCS, LOCS - 1]), jnp.concatenate([FACTORS, 2 * FACTORS])
    masses = jnp.concatenate([MASSES, MASSES])
    p, t = by_class(readout=0.0, base=lehr.GaussianMixture(locs, factors, masses)), np.append(T, 1.0).astype(np.float32)
    for label in range(3):
        own = slice(2 * label, 2 * label + 2)
        truth = lehr.GaussianMixture(locs[own], factors[own], masses[own])
        for got, want in zip(readings(p.given(label), X, t), readings(truth, X, t), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="as many components for each of the 3 classes"):
        by_class(base=lehr.GaussianMixture(locs[:4], factors[:4]))


def test_what_is_added_to_the_base_is_the_same_whatever_the_base():
    """log p − log q depends on the network alone, which sees x by mean and std."""
    one, other = by_class(base=lehr.Gaussian(MEAN, FACTORS[0])), by_class()
    for label in range(4):
        p, q = one.given(label), other.given(label)
        added = [
            readings(r, X, T)[0] - jax.vmap(lambda t, b=b: jax.vmap(b.log_density, (0, None))(X, t))(T)
            for r, b in ((p, one.base), (q, other.base.given(label)))
        ]
        np.testing.assert_allclose(added[0], added[1], rtol=1e-4, atol=2e-4)


def test_score_denoise_and_noise_agree_for_every_class():
    p = by_class()
    t = np.asarray(lehr.Ladder.log_snr(p.schedule, 6).times)
    alpha, sigma = noising(p.schedule, t)
    scores_of = []
    for label in range(4):
        _, score, data, noise = (np.asarray(a, float) for a in readings(p.given(label), X, t))
        size = 1 + np.abs(sigma * score)
        assert np.all(np.abs(noise + sigma * score) <= 256 * EPS * size)
        assert np.all(np.abs(alpha * data - (X + sigma**2 * score)) <= 256 * EPS * (np.abs(X) + sigma * size))
        scores_of.append(score)
    assert min(np.std(a - b) for i, a in enumerate(scores_of) for b in scores_of[:i]) > 0.01


def test_a_label_may_be_traced():
    p, x = by_class(), jnp.asarray(X[0])
    traced = jax.jit(jax.vmap(lambda label: p.given(label).log_density(x, 0.3)))(jnp.arange(4))
    np.testing.assert_allclose(traced, [p.given(label).log_density(x, 0.3) for label in range(4)], rtol=1e-5)


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [(4, ValueError, "from 0 to 2, and 3"), (-1, ValueError, "got -1"), (1.0, TypeError, "integer"),
     (np.array([1]), ValueError, "scalar")],
)  # fmt: skip
def test_what_is_no_label_is_refused(label, error, message):
    with pytest.raises(error, match=message):
        by_class().given(label)


def test_labels_and_bases_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="without classes"):
        energy("inner").given(0)
    with pytest.raises(ValueError, match="as many components for each of the 4 classes"):
        by_class(num_classes=4)
    with pytest.raises(ValueError, match="flattened event"):
        lehr.EnergyNetwork(mlp("scalar"), base=lehr.Gaussian(np.zeros(3)))


def test_an_energy_of_pictures_is_that_of_their_pixels_in_a_row():
    base = lehr.Gaussian(np.arange(4.0), np.linalg.cholesky(np.diag(np.arange(1.0, 5.0)) + 0.3))
    arguments = {"width": 8, "num_blocks": 1, "num_frequencies": 4, "rngs": nnx.Rngs(0)}
    picture, row = (
        lehr.EnergyNetwork(ResidualMLP(4, 4, **arguments), None, shape, head="inner", mean=1.0, base=base)
        for shape in ((2, 2), (4,))
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2)))
    for name in ("log_density", "score", "denoise", "noise"):
        ours, theirs = getattr(picture, name)(x, 0.3), getattr(row, name)(x.ravel(), 0.3)
        np.testing.assert_allclose(np.ravel(ours), np.ravel(theirs), rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda n: lehr.EnergyNetwork(n, head="mean"), "unknown energy head 'mean'; expected one of scalar, inner"),
        (lambda n: lehr.EnergyNetwork(n, std=0.0), "std must be positive"),
        (lambda n: lehr.EnergyNetwork(n, feature_scale=-1.0), "feature_scale must be positive"),
        (lambda n: lehr.EnergyNetwork(n, sigma_range=(1.0, 0.1)), "0 < low < high"),
        (lambda n: lehr.EnergyNetwork(n, limit=0.0), "limit must be positive, or None"),
    ],
)
def test_impossible_energies_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(mlp("scalar"))
