"""Weights: by energies, by the models' reverse kernels, by both; their evidence, and their refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats
from stand_ins import Drifting, score_of

import lehr
from lehr.annealing.entry import conditional_ess
from lehr.annealing.layout import Layout
from lehr.annealing.weights import Particles, weigh

N = 2000
P_LOC, P_STD = np.array([0.5, -0.3]), np.array([0.5, 0.8])
Q_LOC, Q_STD = np.array([-0.2, 0.4]), np.array([0.7, 0.6])
SCHEDULE = lehr.VPCosine()
P, Q = lehr.Gaussian(P_LOC, P_STD), lehr.Gaussian(Q_LOC, Q_STD)
MODES = lehr.GaussianMixture([[-1.5], [1.0]], [0.15, 0.3], [0.2, 0.8])
RUN = {"ladder": 16, "num_warmup": 1, "num_particles": N, "progress": False}


# One weighing


def weighed(increment, threshold, log_weights=None, values=None, seed=0):
    n = len(increment)
    log_weights = np.full(n, -np.log(n)) if log_weights is None else log_weights
    values = np.arange(n) if values is None else values
    particles = Particles(jnp.asarray(values), jnp.asarray(log_weights), jnp.full(1, 1.5), jnp.arange(n), jnp.zeros(1))
    return weigh(particles, jnp.asarray(increment), jax.random.key(seed), jnp.asarray(threshold), Layout())


TWO = {"increment": np.where(np.arange(1000) < 500, np.log(0.5), np.log(1.5)), "values": np.arange(1000.0) < 500}


@pytest.mark.parametrize(("threshold", "acts"), [(0.0, False), (0.79, False), (0.81, True), (1.0, True)])
def test_particles_are_resampled_below_the_threshold_and_weigh_the_same_again(threshold, acts):
    """ESS = (.5 + 1.5)²/2 (.25 + 2.25) = .8 of N."""
    after, ess, resampled = weighed(**TWO, threshold=threshold)
    assert bool(resampled) == acts
    assert float(ess) == pytest.approx(800, rel=1e-5)
    assert float(jax.nn.logsumexp(after.log_weights)) == pytest.approx(0, abs=1e-5)
    assert np.sum(np.exp(after.log_weights) * after.chains) == pytest.approx(0.25, abs=1.5e-3)  # one particle, rounded
    assert (np.ptp(after.log_weights) == 0) == acts
    np.testing.assert_array_equal(np.asarray(after.ancestors) < 500, after.chains)
    assert np.asarray(after.chains).mean() == pytest.approx(0.25 if acts else 0.5, abs=1.5e-3)


def test_the_evidence_gains_the_logarithm_of_the_weighted_mean():
    log_weights = np.log([0.1, 0.2, 0.3, 0.4])
    increment = np.log([1.0, 2.0, 0.5, 4.0])
    after, _, _ = weighed(increment, 0.0, log_weights)
    mean = 0.1 + 0.4 + 0.15 + 1.6
    assert float(after.log_evidence[0]) == pytest.approx(1.5 + np.log(mean), rel=1e-6)
    np.testing.assert_allclose(np.exp(after.log_weights), np.array([0.1, 0.4, 0.15, 1.6]) / mean, rtol=1e-5)


def test_resampling_changes_no_evidence():
    plain, _, _ = weighed(**TWO, threshold=0.0)
    again, _, _ = weighed(**TWO, threshold=1.0)
    assert float(plain.log_evidence[0]) == float(again.log_evidence[0]) == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize("nothing", [np.nan, -np.inf])
def test_a_gain_that_is_no_number_is_no_weight(nothing):
    after, ess, _ = weighed(np.array([0.0, nothing, 0.0, nothing]), 0.0)
    np.testing.assert_allclose(np.exp(after.log_weights), [0.5, 0, 0.5, 0], atol=1e-6)
    assert float(ess) == pytest.approx(2, rel=1e-5)
    assert float(after.log_evidence[0]) == pytest.approx(1.5 + np.log(0.5), rel=1e-5)
    resampled, _, _ = weighed(np.array([0.0, nothing, 0.0, nothing]), 1.0)
    assert set(np.asarray(resampled.chains).tolist()) == {0, 2}


def test_who_has_no_weight_gets_none_back():
    after, _, _ = weighed(np.array([0.0, np.inf]), 0.0, np.array([0.0, -np.inf]))
    np.testing.assert_allclose(np.exp(after.log_weights), [1.0, 0.0])


def test_where_none_is_left_there_is_no_evidence_and_no_sample_size():
    after, ess, _ = weighed(np.full(4, np.nan), 0.0)
    assert float(after.log_evidence[0]) == -np.inf
    assert float(ess) == 0
    np.testing.assert_allclose(np.exp(after.log_weights), 0.25, rtol=1e-6)


def test_the_conditional_sample_size_is_that_of_the_gains_alone():
    log_weights = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    assert float(conditional_ess(log_weights, jnp.full(4, 7.0))) == pytest.approx(1, rel=1e-5)
    gains = np.array([1.0, 2.0, 0.5, 4.0])
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    expected = (weights @ gains) ** 2 / (weights @ gains**2)
    assert float(conditional_ess(log_weights, jnp.log(gains))) == pytest.approx(expected, rel=1e-5)
    assert float(conditional_ess(log_weights, jnp.array([0.0, 0.0, 0.0, jnp.nan]))) == pytest.approx(0.6, rel=1e-5)


# Runs


def product(sigma):
    """Evidence, mean and variance of the product of P and Q where the blur is σ/α, in units of x_t = x₀ nearly."""
    t = SCHEDULE.time(-2 * np.log(sigma))
    alpha, noise = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    p, q = (alpha * P_STD) ** 2 + noise**2, (alpha * Q_STD) ** 2 + noise**2
    evidence = stats.norm(alpha * P_LOC, np.sqrt(p + q)).logpdf(alpha * Q_LOC).sum()
    variance = 1 / (1 / p + 1 / q)
    return evidence, variance * alpha * (P_LOC / p + Q_LOC / q), variance


def agrees(run, scatter=0.1):
    """Within four standard errors, which are at most ``scatter``, at half of N effective."""
    evidence, mean, variance = product(run.levels["sigma"][-1])
    assert run.log_evidence_se < scatter
    assert abs(run.log_evidence - evidence) < 4 * max(run.log_evidence_se, 1e-3)
    x = run.get_samples()["x"]
    assert np.abs((x.mean(0) - mean) / np.sqrt(2 * variance / N)).max() < 4
    assert np.abs(x.var(0) / variance - 1).max() < 4 * np.sqrt(2 * 2 / N)


@pytest.fixture(scope="module")
def both():
    return lehr.AnnealedSMC(P * Q, weights="both", **RUN).run(0)


@pytest.mark.parametrize(
    "options",
    [
        {"predictor": "ancestral"},
        {"predictor": None},
        {"weights": "path"},
        {"weights": "path", "num_steps": 0, "num_warmup": 0, "ladder": 96},
    ],
    ids=str,
)
def test_all_weights_give_the_evidence_and_the_moments_of_a_product(options):
    # with nothing but reverse kernels half of the particles are effective on 96 levels, and not on 16
    agrees(lehr.AnnealedSMC(P * Q, **RUN | options).run(0), 0.26 if options.get("num_steps") == 0 else 0.1)


def test_so_do_both_at_once_and_of_exact_energies_there_is_no_gap(both):
    agrees(both)
    assert np.asarray(both.tuning.moves)[1:].all()
    assert np.abs(both.levels["gap"]).max() < 2e-3  # float32, of log densities of order ten


@pytest.fixture(scope="module")
def drifting():
    return lehr.AnnealedSMC(Drifting(P, 0.3), weights="both", **RUN | {"num_particles": 200}).run(0)


def test_a_constant_that_drifts_opens_a_gap_as_wide(drifting):
    np.testing.assert_allclose(drifting.levels["gap"][1:], 0.3 * np.diff(drifting.levels["log_snr"]), atol=2e-3)


def test_both_weigh_by_energies_from_the_start(drifting):
    assert drifting.log_evidence == pytest.approx(0.3 * drifting.levels["log_snr"][-1], abs=0.01)


def observed(potential, scale):
    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(potential))
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    return model


@pytest.mark.slow
def test_a_score_with_a_likelihood_gets_its_posterior_with_nothing_asked_for():
    y = np.array([1.0, -1.0])
    run = lehr.AnnealedSMC(observed(score_of(P), 0.6), num_particles=N, progress=False).run(0, y=jnp.asarray(y))
    assert run.attrs["weights"] == "path"
    assert "line-integral" in run.attrs["kernel"]
    variance = 1 / (1 / P_STD**2 + 1 / 0.36)
    mean = variance * (P_LOC / P_STD**2 + y / 0.36)
    evidence = stats.norm(P_LOC, np.hypot(P_STD, 0.6)).logpdf(y).sum()
    assert run.log_evidence_se < 0.2
    assert abs(run.log_evidence - evidence) < 4 * run.log_evidence_se
    x = run.get_samples()["x"]
    assert np.abs((x.mean(0) - mean) / np.sqrt(4 * variance / N)).max() < 4  # a quarter of N effective
    assert np.abs(x.var(0) / variance - 1).max() < 4 * np.sqrt(2 * 4 / N)
    assert run.levels["loop_integral"].max() < 1e-2


def test_a_score_of_two_modes_weighs_them_as_its_density_would():
    """The likelihood sits between the modes, and no Gaussian could stand in for them."""
    y, seeds = -0.4, 5
    z = np.array([0.2, 0.8]) * stats.norm([-1.5, 1.0], np.hypot([0.15, 0.3], 0.6)).pdf(y)
    smc = lehr.AnnealedSMC(observed(score_of(MODES), 0.6), **RUN | {"ladder": 24, "num_steps": 1})
    runs = [smc.run(seed, y=jnp.array([y])) for seed in range(seeds)]
    left = np.mean([(run.samples["x"] < -0.3).mean() for run in runs])
    log_z = np.mean([run.log_evidence for run in runs])
    assert abs(left - z[0] / z.sum()) < 4 * 0.042 / np.sqrt(seeds)  # .042 and .12: sd over 16 keys
    assert abs(log_z - np.log(z.sum())) < 4 * 0.12 / np.sqrt(seeds)


def without_the_third(num_levels, weights):
    """p²/(.95 q + .05 p), q the third mode of p, which by itself has .3 of the mass and in this .007."""
    p = lehr.GaussianMixture([[-3.0], [0.0], [3.0]], [0.3, 0.4, 0.2], [0.5, 0.2, 0.3])
    contrast = lehr.Contrast(p, lehr.Mixture([lehr.Gaussian([3.0], 0.2), p], [0.95, 0.05]))
    return contrast, lehr.AnnealedSMC(contrast, weights=weights, **RUN | {"ladder": num_levels})


@pytest.mark.parametrize("weights", ["energy", "both"])
def test_a_mode_divided_out_leaves_the_others_as_they_were(weights):
    contrast, smc = without_the_third(30, weights)
    run = smc.run(0)
    x, t = smc.get_samples()["x"].ravel(), run.levels["t"][-1]
    grid = np.linspace(-6, 6, 12_001)
    density = np.exp(jax.vmap(lambda x: contrast.log_density(x[None], t))(jnp.asarray(grid))) * 1e-3
    regions = np.digitize(grid, [-1.5, 1.5])
    masses = np.array([density[regions == i].sum() for i in range(3)])
    found = np.bincount(np.digitize(x, [-1.5, 1.5]), minlength=3) / x.size
    np.testing.assert_allclose(found, masses / masses.sum(), atol=3 * np.sqrt(0.25 / (N / 4)))
    assert found[2] < 0.03
    assert run.log_evidence == pytest.approx(np.log(masses.sum()), abs=3.5 * run.log_evidence_se)


def test_levels_too_far_apart_are_warned_of():
    """Between the modes the kernels of p and of q disagree, and what is divided by a small ratio explodes."""
    _, smc = without_the_third(24, "path")
    with pytest.warns(UserWarning, match=r"of 2000 weighted particles were effective.*more levels"):
        smc.run(0)


# Refusals


@pytest.mark.parametrize("kernel", [lehr.ULA(), lehr.UHMC()])
@pytest.mark.parametrize("weights", ["energy", "path", "both"])
def test_no_weights_go_with_an_unadjusted_kernel(kernel, weights):
    with pytest.raises(ValueError, match="leaves it biased"):
        lehr.AnnealedSMC(P, kernel, weights=weights)


@pytest.mark.parametrize("weights", ["energy", "both"])
def test_energies_are_not_to_be_had_of_a_score(weights):
    with pytest.raises(TypeError, match=weights):
        lehr.AnnealedSMC(score_of(P), weights=weights, **RUN).run(0)


@pytest.mark.parametrize("weights", ["energy", "both"])
def test_nor_where_the_kernel_keeps_none(weights):
    with pytest.raises(ValueError, match="keeps none"):
        lehr.AnnealedSMC(P, lehr.HMC(metropolis="line-integral"), weights=weights, **RUN).run(0)


@pytest.mark.parametrize("weights", ["score", "", "Path"])
def test_unknown_weights_are_refused_by_the_names_of_the_known(weights):
    with pytest.raises(ValueError, match='"energy", "path" or "both"'):
        lehr.AnnealedSMC(P, weights=weights)


def test_the_scatter_of_families_is_what_systematic_resampling_makes_of_their_weights():
    n = 40
    log_weights = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (n,)))
    ancestors = jnp.sort(jax.random.randint(jax.random.key(1), (n,), 0, n))
    before = Particles({"x": jnp.zeros(n)}, log_weights, jnp.zeros(1), ancestors, jnp.zeros(1))

    def families(key):
        after, _, resampled = weigh(before, jnp.zeros(n), key, jnp.asarray(1.0), Layout())
        return jnp.bincount(after.ancestors, jnp.exp(after.log_weights), length=n), after.scatter[0], resampled

    found, scatter, resampled = jax.vmap(families)(jax.random.split(jax.random.key(2), 4000))
    assert resampled.all()
    # each variance is of a number that takes two values: 4,000 draws know their sum to 2 %
    np.testing.assert_allclose(n * found.var(0).sum(), scatter[0], rtol=0.08)
