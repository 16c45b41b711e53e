"""Steps: what a pilot finds holds in the run that counts; where levels stand; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import lehr
from lehr.annealing.layout import Layout
from lehr.annealing.tuning import curvature, gain, smooth, squared_scale

NORMAL = lehr.Gaussian(jnp.zeros(2), 1.0)
PRODUCT = lehr.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.4]) * lehr.Gaussian(jnp.zeros(2), [0.5, 1.5])
LEVELS, N = 20, 1000


# Tuning


@pytest.mark.parametrize(
    "tuning",
    [
        lehr.Tuning(0.0),
        lehr.Tuning(-0.1),
        lehr.Tuning(np.nan),
        lehr.Tuning(np.inf),
        lehr.Tuning([0.1, 0.1, 0.1, -0.1]),
        lehr.Tuning(0.1, 0.0),
        lehr.Tuning(0.1, [1.0, -1.0]),
    ],
    ids=str,
)
def test_steps_must_be_positive(tuning):
    with pytest.raises(ValueError, match="positive and finite"):
        tuning.on(4, 2)
    with pytest.raises(ValueError, match="positive and finite"):
        lehr.AnnealedMCMC(NORMAL, ladder=4, tuning=tuning, progress=False).run(0)


@pytest.mark.parametrize(
    "tuning",
    [lehr.Tuning([0.1] * 3), lehr.Tuning(0.1, [1.0] * 3), lehr.Tuning(0.1, np.ones((3, 2))), lehr.Tuning([[0.1]] * 4)],
    ids=["levels", "coordinates", "levels of scales", "columns"],
)
def test_steps_must_fit_the_ladder_and_the_model(tuning):
    with pytest.raises(ValueError, match="4 levels and 2 coordinates"):
        tuning.on(4, 2)
    with pytest.raises(ValueError, match="4 levels and 2 coordinates"):
        lehr.AnnealedMCMC(NORMAL, ladder=4, tuning=tuning, progress=False).run(0)


def test_one_step_serves_all_levels_and_coordinates():
    found = lehr.Tuning(0.03, np.arange(1.0, 5.0)[:, None]).on(4, 2)
    np.testing.assert_allclose(found.step_size, np.full(4, 0.03))
    np.testing.assert_allclose(found.scale, np.repeat(np.arange(1.0, 5.0), 2).reshape(4, 2))
    assert float(found.short_share) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pilot": 8, "num_warmup": 1}, "choose one"),
        ({"pilot": 8, "tuning": lehr.Tuning(0.1)}, "choose one"),
        ({"num_warmup": 1, "tuning": lehr.Tuning(0.1)}, "choose one"),
        ({"pilot": 1}, "no spread"),
        ({"pilot": -1}, "pilot"),
        ({"pilot": 2.5}, "pilot"),
    ],
)
@pytest.mark.parametrize("driver", [lehr.AnnealedMCMC, lehr.AnnealedSMC])
def test_there_is_one_way_of_tuning_at_a_time(driver, options, message):
    with pytest.raises(ValueError, match=message):
        driver(NORMAL, **options)


# Its parts


def test_the_scale_is_the_lesser_of_width_and_spread_and_few_chains_lean_on_the_prior():
    rng = np.random.default_rng(0)
    q = {"x": jnp.asarray(rng.normal(size=(10_000, 2)) * [3.0, 0.2], float)}
    found = np.sqrt(squared_scale(q, {"x": jnp.ones(2)}, {"x": jnp.ones(2)}))
    np.testing.assert_allclose(found, [1.0, 0.2], rtol=0.05)
    unbounded = np.sqrt(squared_scale(q, {"x": jnp.full(2, jnp.inf)}, {"x": jnp.ones(2)}))
    np.testing.assert_allclose(unbounded, [3.0, 0.2], rtol=0.05)
    few = {"x": q["x"][:1]}
    np.testing.assert_allclose(squared_scale(few, {"x": jnp.full(2, jnp.inf)}, {"x": jnp.full(2, 4.0)}), 4.0 * 5 / 6)


def bent(log_density, positions, scale):
    kernel = lehr.MALA()
    chains = jax.vmap(lambda q: kernel.init(jax.random.key(0), {"x": q}, log_density))(jnp.asarray(positions, float))
    return np.asarray(curvature(kernel, chains, log_density, jnp.asarray(scale) ** 2, jax.random.key(1), Layout()))


def test_the_curvature_is_had_wherever_the_chains_are_and_whoever_strays():
    precision = jnp.array([[100.0, 3.0], [3.0, 0.25]])

    def log_density(q):
        gaussian = -jnp.vdot(q["x"], precision @ q["x"]) / 2
        return jnp.where(q["x"][0] > 100.0, -1e6 * jnp.sum(q["x"] ** 2), gaussian)

    positions = 3.0 + np.random.default_rng(1).normal(size=(2000, 2)) * [0.01, 5.0]  # nowhere near distributed so
    positions[:50] = 1000.0
    found = bent(log_density, positions, [0.1, 2.0])
    # the other coordinate adds or takes 3 v_2/v_1 = 60 and 3 v_1/v_2 = .15, by a sign that each chain draws
    assert np.all(np.abs(found - [100.0, 0.25]) < 4 * np.array([60.0, 0.15]) / np.sqrt(2000))
    found = bent(lambda q: -jnp.sum(jnp.array([50.0, 0.125]) * q["x"] ** 2), positions, [0.1, 2.0])
    np.testing.assert_allclose(found, [100.0, 0.25], rtol=1e-3)


def test_of_few_chains_coordinates_that_differ_by_chance_get_one_curvature():
    """Each chain sees its own −∂² log π, of mean 1 and standard deviation .5."""
    own = jnp.asarray(1 + 0.5 * np.random.default_rng(2).normal(size=(64, 100)), float)
    positions = jnp.concatenate([jnp.arange(64.0)[:, None], jnp.zeros((64, 100))], 1)

    def log_density(q):
        return -jnp.sum(own[jnp.round(q["x"][0]).astype(int)] * q["x"][1:] ** 2) / 2 - q["x"][0] ** 2 / 2

    found = bent(log_density, positions, jnp.ones(101))[1:]
    assert np.std(found) < 0.5 * 0.5 / np.sqrt(64)  # a half of what each alone would scatter by
    assert np.mean(found) == pytest.approx(1, abs=4 * 0.5 / np.sqrt(6400))


def test_no_curvature_is_less_than_half_of_what_the_spread_asks_for():
    """A density that bends the other way where the chains are."""
    found = bent(lambda q: jnp.sum(q["x"] ** 2), np.ones((16, 2)), [2.0, 0.5])
    np.testing.assert_allclose(found, [0.5 / 4, 0.5 / 0.25], rtol=1e-5)


def test_the_running_median_drops_a_level_that_went_astray():
    steps = jnp.linspace(0.0, 1.0, 9)
    np.testing.assert_allclose(smooth(steps)[2:-2], steps[2:-2], rtol=1e-6)
    np.testing.assert_allclose(smooth(jnp.ones(9).at[4].set(-20.0)), 1.0)


def test_steps_rest_once_the_warm_up_is_over():
    np.testing.assert_allclose(gain(jnp.arange(4), 2), [1.0, 2**-0.6, 0.0, 0.0], rtol=1e-6)


# Runs


@pytest.fixture(scope="module", params=[lehr.HMC(), lehr.MALA()], ids=["HMC", "MALA"])
def piloted(request):
    options = {"ladder": LEVELS, "num_steps": 4, "num_chains": N, "num_samples": 1, "progress": False}
    first = lehr.AnnealedMCMC(PRODUCT, request.param, **options).run(0)
    return request.param, options, first


def test_what_a_pilot_finds_gives_the_acceptance_asked_for(piloted):
    kernel, _, run = piloted
    assert run.attrs["pilot_chains"] == 64
    assert run.levels["acceptance_rate"].mean() == pytest.approx(kernel.target_acceptance, abs=0.1)


def test_its_steps_serve_another_run_at_every_level(piloted):
    kernel, options, first = piloted
    again = lehr.AnnealedMCMC(PRODUCT, kernel, tuning=first.tuning, **options).run(5)
    assert again.attrs["pilot_chains"] == again.attrs["num_warmup"] == 0
    np.testing.assert_allclose(again.levels["step_size"], first.levels["step_size"], rtol=1e-6)
    rates = again.levels["acceptance_rate"]
    assert np.abs(rates - kernel.target_acceptance).max() < 0.2
    # 4 steps of N chains, each of sd .5 at most, in either run
    assert np.abs(rates - first.levels["acceptance_rate"]).max() < 4 * 0.5 * np.sqrt(2 / N)


def test_given_steps_are_the_steps_that_are_taken(piloted):
    kernel, options, _ = piloted
    steps = np.linspace(0.9, 0.3, LEVELS)
    run = lehr.AnnealedMCMC(PRODUCT, kernel, tuning=lehr.Tuning(steps, 0.7), **options).run(0)
    np.testing.assert_allclose(run.levels["step_size"], steps, rtol=1e-5)
    np.testing.assert_allclose(run.tuning.scale, 0.7, rtol=1e-5)


@pytest.mark.slow
def test_in_many_dimensions_masses_and_evidence_come_out_by_default():
    d, seeds, probs = 64, 4, np.array([0.1, 0.2, 0.3, 0.4])
    locs = np.kron(np.eye(4), np.ones(d // 4))  # 5.7 apart, with modes of std .15
    smc = lehr.AnnealedSMC(lehr.GaussianMixture(locs, 0.15, probs), progress=False)
    masses, log_z = [], []
    for seed in range(seeds):
        run = smc.run(seed)
        x = smc.get_samples()["x"]
        nearest = ((x[:, None] - locs) ** 2).sum(-1).argmin(1)
        masses.append(np.bincount(nearest, minlength=4) / len(x))
        log_z.append(run.log_evidence)
        blur = np.hypot(0.15, run.levels["sigma"][-1])
        assert (x - locs[nearest]).std() == pytest.approx(blur, rel=0.02)
    assert np.asarray(run.tuning.moves)[-10:].all()
    # at a half of N effective, over the seeds
    assert np.all(np.abs(np.mean(masses, 0) - probs) < 4 * np.sqrt(probs * (1 - probs) / (500 * seeds)))
    assert abs(np.mean(log_z)) < 4 * 0.035 / np.sqrt(seeds)  # .035: what runs report as their standard error


# Levels by conditional sample size


@pytest.mark.slow
def test_more_levels_for_more_of_the_particles_and_all_lead_to_the_end():
    sizes = []
    for ess in (0.8, 0.95):
        ladder = lehr.Ladder.adaptive(PRODUCT, ess, num_particles=128, t_min=0.05)
        times = np.asarray(ladder.times)
        assert np.all(np.diff(times) < 0)
        assert times[0] == pytest.approx(float(PRODUCT.schedule.time(-8.0)), rel=1e-5)
        assert times[-1] == pytest.approx(0.05, rel=1e-5)
        sizes.append(len(ladder))
    assert 3 <= sizes[0] < sizes[1]


def test_by_path_weights_levels_are_close_where_modes_part_and_far_apart_elsewhere():
    """All increments of a lone model are 1, whatever the step: what bounds it is how far off reverse kernels are."""
    two = lehr.GaussianMixture([[-1.0], [1.0]], 0.1)
    ladder = lehr.Ladder.adaptive(two, 0.5, num_particles=256, num_steps=1, weights="path", t_min=1e-3)
    log_snr = np.asarray(two.schedule.log_snr(ladder.times))
    steps = np.diff(log_snr)
    assert steps.max() == pytest.approx(1.4, abs=0.01)
    assert steps[np.searchsorted(log_snr, 1.0) - 1] < 0.6  # the noise as wide as half the way between the modes
    run = lehr.AnnealedSMC(two, ladder=ladder, num_steps=1, weights="path", pilot=32, progress=False).run(0)
    assert 0.05 < run.levels["correction"].max() < 0.15
    assert abs(run.log_evidence) < 0.01 + 3 * 0.003  # .003: by which runs of a thousand scatter


def test_a_gaussian_needs_no_correction_and_so_no_close_levels():
    ladder = lehr.Ladder.adaptive(NORMAL, 0.5, num_particles=64, num_steps=1, weights="path", t_min=1e-2)
    steps = np.diff(np.asarray(NORMAL.schedule.log_snr(ladder.times)))
    np.testing.assert_allclose(steps[:-1], 1.4, atol=0.01)


@pytest.mark.parametrize("ess", [0.0, 1.0, -0.5, 1.5])
def test_a_share_of_the_particles_lies_between_none_and_all(ess):
    with pytest.raises(ValueError, match="ess"):
        lehr.Ladder.adaptive(PRODUCT, ess)


def test_too_few_levels_do_not_lead_down():
    with pytest.raises(ValueError, match="2 levels lead down"):
        lehr.Ladder.adaptive(PRODUCT, 0.95, num_particles=128, max_levels=2)


def test_a_path_without_its_data_has_no_ladder():
    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(NORMAL))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(TypeError, match="not bound"):
        lehr.Ladder.adaptive(lehr.Path(model))
