"""Mistakes that samplers of diffusion models have been released with; each must not be ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import ScoreOf

import lehr
from lehr.annealing.layout import Layout
from lehr.annealing.weights import Particles, weigh
from lehr.diagnostics.summary import summarise

MIXTURE = lehr.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.6, [0.8, 0.2])
SCORE = ScoreOf(MIXTURE)


def test_1_a_score_is_never_handed_to_a_metropolis_test_as_the_gradient_of_a_constant():
    with pytest.raises(TypeError, match="gradient of a constant"):
        SCORE.at(0.1)
    for kernel in (lehr.HMC(), lehr.MALA(), lehr.NUTS(), lehr.GHMC(), lehr.Barker()):
        with pytest.raises(TypeError, match="score"):
            lehr.AnnealedMCMC(SCORE, kernel, ladder=4, progress=False).run(0)


def test_2_a_chain_that_never_moved_has_no_effective_sample_size():
    draws = np.random.default_rng(0).normal(size=(4, 100, 2))
    draws[:, :, 1] = 0.3
    summary = summarise(draws)
    assert summary.stuck.tolist() == [False, True]
    assert np.isfinite(summary.ess[0])
    assert np.isnan(summary.ess[1])
    assert summary.stuck_chains[1] == 4


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.49])
def test_3_resampling_acts_however_small_the_effective_sample_size_and_makes_weights_equal(share):
    n = 4000
    chains = jnp.arange(n) < n * share  # these carry nearly all of the weight
    particles = Particles(chains, jnp.full(n, -jnp.log(n)), jnp.zeros(1), jnp.arange(n), jnp.zeros(1))
    increment = jnp.where(chains, 0.0, -12.0)
    after, ess, resampled = weigh(particles, increment, jax.random.key(0), jnp.asarray(0.5), Layout())
    assert bool(resampled)
    assert float(ess) == pytest.approx(n * share, rel=0.05)
    np.testing.assert_allclose(after.log_weights, -np.log(n), rtol=1e-6)
    exact = share / (share + (1 - share) * np.exp(-12.0))
    assert float(jnp.mean(after.chains)) == pytest.approx(exact, abs=2 / n)


def test_4_mala_proposes_with_the_density_that_it_tests_by_and_each_chain_decides_for_itself():
    kernel, n = lehr.MALA(), 4000
    step = jax.jit(jax.vmap(lambda key, state: kernel.build()(key, state, MIXTURE.at(0.0), 0.5, jnp.ones(2))))
    start = MIXTURE.sample(jax.random.key(0), 0.0, (n,))
    state = jax.vmap(lambda q: kernel.init(jax.random.key(0), q, MIXTURE.at(0.0)))(start)
    moved, stats = step(jax.random.split(jax.random.key(1), n), state)
    stayed = np.all(np.asarray(moved.position == start), 1)
    assert float(stats.acceptance_rate.mean()) > 0.8
    assert 0 < stayed.mean() < 1
    assert stayed.mean() == pytest.approx(1 - float(stats.acceptance_rate.mean()), abs=4 * 0.4 / np.sqrt(n))


@pytest.mark.parametrize(("turn", "second_moment"), [(True, 1.0), (False, 1.42)])
def test_5_a_kept_momentum_is_turned_round_on_rejection(turn, second_moment):
    """Without the turn N(0, 1) comes out wide; the same few lines with and without it, beside lehr's own kernel."""
    n, steps, epsilon, damping = 4000, 60, 1.6, 0.9

    def log_density(q):
        return -jnp.sum(q**2) / 2

    kernel = lehr.GHMC(3, damping)
    own = kernel.build()

    def theirs(key, state):
        q, p = state
        key_noise, key_test = jax.random.split(key)
        p = damping * p + np.sqrt(1 - damping**2) * jax.random.normal(key_noise, p.shape)
        proposed = (q, p)
        for _ in range(3):
            half = proposed[1] - epsilon / 2 * proposed[0]
            q_new = proposed[0] + epsilon * half
            proposed = (q_new, half - epsilon / 2 * q_new)
        energy = jnp.sum(q**2 + p**2) / 2 - jnp.sum(proposed[0] ** 2 + proposed[1] ** 2) / 2
        accept = jnp.log(jax.random.uniform(key_test)) < energy
        return jax.tree.map(lambda a, b: jnp.where(accept, a, b), proposed, (q, -p if turn else p))

    def chain(key):
        keys = jax.random.split(key, steps)
        q = jax.random.normal(jax.random.fold_in(key, 1), (1,))
        p = jax.random.normal(jax.random.fold_in(key, 2), (1,))
        if turn:
            state = kernel.init(key, q, log_density)
            state, _ = jax.lax.scan(lambda s, k: own(k, s, log_density, epsilon, jnp.ones(1)), state, keys)
            return state.position[0]
        return jax.lax.scan(lambda s, k: (theirs(k, s), None), (q, p), keys)[0][0][0]

    x = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), n)))
    error = np.std(x**2) / np.sqrt(n)
    assert abs(np.mean(x**2) - second_moment) < 3 * error


def test_6_the_corrector_runs_at_the_level_just_reached():
    """A strong corrector forgets where chains come from: what is left is the density of its own level."""
    wide = lehr.Gaussian(jnp.zeros(2), 1.0, lehr.VE(0.01, 30.0))
    ladder = lehr.Ladder.log_snr(wide.schedule, 2, t_min=float(wide.schedule.time(-2 * np.log(0.5))))
    mcmc = lehr.AnnealedMCMC(
        wide, lehr.HMC(3), ladder, 40, num_warmup=5, num_chains=2000, num_samples=1, predictor="ddim", progress=False
    )
    mcmc.run(0)
    variance = float(wide.moments(ladder.times[-1]).std[0] ** 2)
    x = mcmc.get_samples()["x"]
    assert np.abs(x.var(0) / variance - 1).max() < 4 * np.sqrt(2 / 2000)


def test_7_a_mixture_weighs_densities_and_not_scaled_energies():
    p, q = lehr.Gaussian(jnp.array([-1.0, 0.0]), 0.5), lehr.Gaussian(jnp.array([1.0, 0.0]), 1.0)
    mixture, x, t = lehr.Mixture([p, q], [0.3, 0.7]), jnp.array([0.1, 0.4]), 0.3
    exact = np.log(0.3 * np.exp(p.log_density(x, t)) + 0.7 * np.exp(q.log_density(x, t)))
    assert float(mixture.log_density(x, t)) == pytest.approx(float(exact), rel=1e-5)


def test_8_a_likelihood_has_the_value_that_it_should_and_not_its_shape_alone():
    import numpyro
    import numpyro.distributions as dist

    y = jnp.array([0.4, -0.3])

    def model():
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(2), 1.0)))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    run = lehr.AnnealedSMC(model, ladder=24, num_particles=2000, progress=False).run(0)
    exact = -jnp.sum(y**2) / (2 * 1.25) - jnp.log(2 * jnp.pi * 1.25)
    assert abs(run.log_evidence - float(exact)) < 4 * run.log_evidence_se
    np.testing.assert_allclose(run.get_samples()["x"].mean(0), y * 0.8, atol=4 * np.sqrt(0.2 / 500))


def test_9_no_log_density_is_compared_across_two_levels():
    """A stale state would accept or refuse by the difference between two targets."""
    kernel, q = lehr.HMC(), jnp.array([0.5, 0.2])
    stale = kernel.init(jax.random.key(0), q, MIXTURE.at(0.9))
    fresh = kernel.refresh(stale, MIXTURE.at(0.05))
    assert float(fresh.logdensity) == pytest.approx(float(MIXTURE.log_density(q, 0.05)), rel=1e-6)
    step = kernel.build()
    _, right = step(jax.random.key(1), fresh, MIXTURE.at(0.05), 1e-3, jnp.ones(2))
    raised = stale._replace(logdensity=fresh.logdensity + 5.0, logdensity_grad=fresh.logdensity_grad)
    _, wrong = step(jax.random.key(1), raised, MIXTURE.at(0.05), 1e-3, jnp.ones(2))
    assert float(right.acceptance_rate) > 0.999
    assert float(wrong.acceptance_rate) == pytest.approx(np.exp(-5.0), rel=0.01)  # what a stale value would do


def test_10_a_discrete_schedule_is_read_by_its_numbers_and_not_by_its_name():
    """Two schedules that libraries both call "VP": one ends at α = .082, the other nearly at zero."""
    short = lehr.DiscreteSchedule(np.linspace(0.999, 0.082**2, 200))
    assert float(short.alpha(1.0)) == pytest.approx(0.082, rel=1e-4)
    assert float(lehr.VPLinear().alpha(1.0)) < 0.01
    assert float(short.sigma(0.0)) == pytest.approx(np.sqrt(0.001), rel=1e-3)
