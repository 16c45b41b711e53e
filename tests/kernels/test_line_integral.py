"""Metropolis tests by line integrals: what they know, what they cannot know, and what they refuse."""

import math

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.mcmc import metrics
from blackjax.mcmc.integrators import IntegratorState
from stand_ins import score_of

import lehr
from lehr.annealing.loop import CHAINS_PER_LOOP, LOOPS
from lehr.kernels.line_integral import NODES, PartlyKnown, closed_loop, line_integral, refreshed

T = 0.05
MODES = lehr.GaussianMixture([[-1.5, 0.0], [1.0, 1.3], [0.8, -1.2]], [0.5, 0.6, 0.7], [0.3, 0.3, 0.4])
UNEQUAL = lehr.GaussianMixture([[-2.0], [2.0]], 0.8, [0.8, 0.2])
METROPOLIS = {"metropolis": "line-integral"}
SMALL = {"ladder": 4, "num_steps": 2, "num_warmup": 1, "num_chains": 64, "num_samples": 2, "progress": False}


def integrated(potential, prior=lambda x: jnp.zeros(())):
    """A potential known through its score only, times a density that is known."""
    path = lehr.Path(potential).as_scores()
    return PartlyKnown(
        lambda x: prior(x) + path.surrogate({"x": x}, T),
        lambda x: path.unknown({"x": x}, T),
    )


def run(kernel, target, start, step_size, num_steps):
    """Positions after each transition, (chains, steps, d), and acceptance rates."""
    step = kernel.build()

    def chain(key, q):
        def move(state, key):
            state, stats = step(key, state, target, jnp.asarray(step_size), jnp.ones(start.shape[-1]))
            return state, (state.position, stats.acceptance_rate)

        return jax.lax.scan(move, kernel.init(key, q, target), jax.random.split(key, num_steps))[1]

    q, rate = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(5), len(start)), start)
    return np.asarray(q), np.asarray(rate)


def trajectories(potential, num_nodes, step_size, num_steps, n=200):
    """Both ends of leapfrog trajectories from exact draws, with unit mass."""
    target, metric = integrated(potential), metrics.default_metric(jnp.ones(potential.event_shape))
    one_step = line_integral(num_nodes)(target, metric.kinetic_energy)

    def trajectory(q, p):
        start = IntegratorState(q, p, *refreshed(q, target))
        return start, jax.lax.fori_loop(0, num_steps, lambda _, s: one_step(s, step_size), start)

    q = potential.sample(jax.random.key(0), T, (n,))
    return jax.jit(jax.vmap(trajectory))(q, jax.random.normal(jax.random.key(1), q.shape))


# The rules


@pytest.mark.parametrize("n", NODES)
def test_the_rules_are_exact_to_degree_twice_the_nodes_less_three_and_no_further(n):
    nodes, weights = (np.array(c) for c in NODES[n])
    assert (nodes[0], nodes[-1]) == (0, 1)
    np.testing.assert_allclose(nodes, 1 - nodes[::-1], atol=1e-15)
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-15)
    errors = np.array([weights @ nodes**k - 1 / (k + 1) for k in range(2 * n - 1)])
    assert np.abs(errors[:-1]).max() < 1e-15
    assert abs(errors[-1]) > 1e-5


@pytest.mark.parametrize("num_steps", [1, 4])
def test_with_two_nodes_the_ratio_looks_at_the_scores_of_the_ends_only(num_steps):
    epsilon = 0.7
    start, end = trajectories(MODES, 2, epsilon, num_steps)
    kinetic = lambda s: jnp.sum(s.momentum**2, -1) / 2  # noqa: E731
    log_ratio = end.logdensity - start.logdensity + kinetic(start) - kinetic(end)
    squares = [jnp.sum(jax.vmap(lambda x: MODES.score(x, T))(s.position) ** 2, -1) for s in (start, end)]
    expected = epsilon**2 / 8 * (squares[0] - squares[1])
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(log_ratio, expected, atol=1e-5 * float(jnp.max(jnp.abs(squares[0]) + squares[1])))


def test_with_two_nodes_hmc_accepts_by_the_scores_of_the_ends():
    epsilon = 0.7
    start = MODES.sample(jax.random.key(2), T, (500,))
    q, rate = run(lehr.HMC(3, **METROPOLIS, num_nodes=2), integrated(MODES), start, epsilon, 1)
    moved = np.any(q[:, 0] != start, -1)
    s0, s1 = (np.asarray(jax.vmap(lambda x: MODES.score(x, T))(jnp.asarray(x))) for x in (start, q[:, 0]))
    expected = np.minimum(1, np.exp(epsilon**2 / 8 * ((s0**2).sum(-1) - (s1**2).sum(-1))))
    assert 100 < moved.sum() < 500
    np.testing.assert_allclose(rate[moved, 0], expected[moved], atol=1e-4)


def test_the_ledger_follows_the_log_density_the_closer_the_more_nodes():
    def error(num_nodes):
        start, end = trajectories(MODES, num_nodes, 0.15, 20)
        log_p = jax.vmap(MODES.at(T))
        return float(jnp.abs(end.logdensity - start.logdensity - log_p(end.position) + log_p(start.position)).max())

    two, three, four, five = (error(n) for n in (2, 3, 4, 5))
    assert two > 4 * three > 40 * four
    assert five < min(1e-4, four)


# What is left invariant


@pytest.mark.parametrize(("kernel", "stock"), [(lehr.HMC, 3), (lehr.MALA, 1)])
def test_line_integrals_mend_the_shares_that_a_constant_with_a_score_for_its_gradient_gets_wrong(kernel, stock):
    """Stock kernels given such a constant test the kinetic energy alone, and treat both sides alike."""
    n, num_steps, epsilon = 1000, 400, 0.9
    alpha, sigma = UNEQUAL.schedule.alpha(T), UNEQUAL.schedule.sigma(T)
    z = float(2 * alpha / jnp.hypot(0.8 * alpha, sigma))
    exact = 0.2 + 0.6 * math.erfc(z / math.sqrt(2)) / 2
    assert exact == pytest.approx(0.2037, abs=1e-3)
    target = integrated(score_of(UNEQUAL))
    start = UNEQUAL.sample(jax.random.key(3), T, (n,))

    def share(q):
        right = (q[:, num_steps // 2 :, 0] > 0).mean(1)
        return right.mean(), right.std() / np.sqrt(n)

    ours, error = share(run(kernel(**METROPOLIS), target, start, epsilon, num_steps)[0])
    assert error < 0.01
    assert ours == pytest.approx(exact, abs=4 * error)

    theirs = blackjax.hmc(target.known, epsilon, jnp.ones(1), stock)

    def chain(key, x):
        def move(state, key):
            state, _ = theirs.step(key, state)
            return state, state.position

        return jax.lax.scan(move, theirs.init(x), jax.random.split(key, num_steps))[1]

    q = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(5), n), start)
    wrong, error = share(np.asarray(q))
    assert wrong == pytest.approx(0.49, abs=0.02 + 2 * error)


@pytest.fixture(scope="module")
def at_large_steps():
    """Acceptance and std by the number of nodes, 0 for the exact test, with standard errors."""
    n, epsilon, num_steps = 4000, 0.7, 20
    start = MODES.sample(jax.random.key(4), T, (n,))

    def measure(num_nodes):
        kernel = lehr.HMC(3, **METROPOLIS, num_nodes=num_nodes) if num_nodes else lehr.HMC(3)
        q, rate = run(kernel, integrated(MODES) if num_nodes else MODES.at(T), start, epsilon, num_steps)
        by_chain = rate.mean(1)
        return by_chain.mean(), by_chain.std() / np.sqrt(n), q[:, -1].std(0)

    return {num_nodes: measure(num_nodes) for num_nodes in (0, 2, 3, 4, 5)}, n


@pytest.mark.parametrize("num_nodes", [3, 4, 5])
def test_from_three_nodes_on_large_steps_are_accepted_as_by_the_exact_test(at_large_steps, num_nodes):
    found, n = at_large_steps
    (exact, error_exact, _), (rate, error, std) = found[0], found[num_nodes]
    assert exact < 0.9
    assert abs(rate - exact) < 4 * np.hypot(error, error_exact)
    np.testing.assert_allclose(std, MODES.moments(T).std, rtol=4 * np.sqrt(0.5 / n))


def test_two_nodes_leave_large_steps_visibly_biased(at_large_steps):
    found, n = at_large_steps
    (exact, error_exact, std_exact), (rate, error, std) = found[0], found[2]
    assert abs(rate - exact) > 10 * np.hypot(error, error_exact)
    np.testing.assert_allclose(std_exact, MODES.moments(T).std, rtol=4 * np.sqrt(0.5 / n))
    assert np.abs(std / MODES.moments(T).std - 1).max() > 6 * np.sqrt(0.5 / n)


def test_what_is_known_of_a_joint_density_enters_as_it_is():
    """A score, a latent scale and a likelihood, against the same model with the energy."""
    n = 2000
    line = lehr.GaussianMixture([[-0.8], [0.8]], 0.5, [0.4, 0.6])

    def model_with(potential):
        def model(y):
            x = numpyro.sample("x", lehr.Diffusion(potential))
            sigma = numpyro.sample("sigma", dist.LogNormal(-0.3, 0.4))
            numpyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)

        return model

    def draws(potential, kernel):
        ladder = lehr.Ladder.log_snr(line.schedule, 12, t_min=T)
        mcmc = lehr.AnnealedMCMC(
            model_with(potential), kernel, ladder, 4, num_warmup=1, num_chains=n, num_samples=1, progress=False
        )
        run = mcmc.run(jax.random.key(0), jnp.array([-0.4]))
        return np.stack([run.samples["x"][:, 0, 0], np.log(run.samples["sigma"][:, 0])])

    energy, score = draws(line, lehr.HMC()), draws(score_of(line), lehr.HMC(**METROPOLIS))
    spread = energy.std(1)
    assert spread.min() > 0.2
    assert np.all(np.abs(energy.mean(1) - score.mean(1)) < 4 * spread * np.sqrt(2 / n))
    np.testing.assert_allclose(score.std(1), spread, rtol=4 * np.sqrt(1 / n))
    assert np.corrcoef(energy)[0, 1] == pytest.approx(np.corrcoef(score)[0, 1], abs=4 * np.sqrt(2 / n))


# The ledger


@pytest.mark.parametrize("kernel", [lehr.HMC, lehr.MALA, lehr.NUTS, lehr.GHMC], ids=lambda k: k.__name__)
def test_each_transition_starts_a_ledger_of_its_own_at_the_known_part(kernel):
    kernel = kernel(**METROPOLIS)
    prior = lambda x: -jnp.sum(x**2)  # noqa: E731
    target = integrated(MODES, prior)
    step = jax.jit(lambda k, s: kernel.build()(k, s, target, jnp.asarray(0.8), jnp.ones(2)))
    state = kernel.init(jax.random.key(0), jnp.array([0.3, -0.5]), target)
    assert float(state.logdensity) == pytest.approx(float(prior(state.position)))
    off = 0
    for i in range(6):
        key = jax.random.key(i)
        spoilt = state._replace(logdensity=state.logdensity + 50.0)
        (state, stats), (same, again) = step(key, state), step(key, spoilt)
        np.testing.assert_array_equal(state.position, same.position)
        assert stats.acceptance_rate == again.acceptance_rate
        assert float(state.logdensity_grad.known) == pytest.approx(float(prior(state.position)), rel=1e-5)
        off += abs(float(state.logdensity - state.logdensity_grad.known)) > 1e-3
    assert off > 0  # what is left behind is a difference, not the density


def test_refresh_puts_the_ledger_back_and_gradient_gives_the_whole():
    kernel, q = lehr.HMC(**METROPOLIS), jnp.array([0.3, -0.2])
    prior = lambda x: -jnp.sum(x**2)  # noqa: E731
    stale = kernel.init(jax.random.key(0), q, integrated(MODES))
    fresh = kernel.refresh(stale._replace(logdensity=jnp.asarray(9.0)), integrated(MODES, prior))
    assert float(fresh.logdensity) == pytest.approx(float(prior(q)))
    np.testing.assert_allclose(kernel.gradient(fresh), -2 * q + MODES.score(q, T), rtol=1e-5)
    np.testing.assert_allclose(fresh.logdensity_grad.unknown, MODES.score(q, T), rtol=1e-5)


# Closed loops


@pytest.mark.parametrize("curl", [0.0, 0.4])
def test_a_closed_loop_encloses_the_curl_times_the_area(curl):
    path, scale = lehr.Path(score_of(MODES, curl)), jnp.array([0.5, 0.8])
    for i, x in enumerate(MODES.sample(jax.random.key(6), T, (5,))):
        key = jax.random.key(i)
        a, b = np.asarray(jax.random.normal(key, (2, 2)) * scale / np.sqrt(2))
        area = (a[0] * b[1] - a[1] * b[0]) / 2
        found = closed_loop(lambda q: path.unknown(q, T), {"x": x}, scale, key)
        assert float(found) == pytest.approx(curl * area, abs=2e-3)


@pytest.mark.parametrize("curl", [0.0, 1.0])
def test_a_run_reports_its_closed_loops_and_no_log_density(curl):
    options = SMALL | {"num_chains": LOOPS * CHAINS_PER_LOOP}
    run = lehr.AnnealedMCMC(score_of(MODES, curl), lehr.MALA(**METROPOLIS), **options).run(0)
    loops = run.levels["loop_integral"]
    area = np.prod(run.tuning.scale, -1) / np.sqrt(8)  # root mean square, of corners at N(0, scale²/2)
    if curl:
        np.testing.assert_allclose(loops, curl * area, rtol=2 * np.sqrt(5 / LOOPS))  # E A⁴/(E A²)² is 6
    else:
        assert np.all(loops < 0.05 * area)
    assert "lp" not in run.sample_stats
    assert np.all(run.levels["acceptance_rate"] > 0.2)


def test_energies_have_no_closed_loops_to_report():
    run = lehr.AnnealedMCMC(MODES, lehr.MALA(), **SMALL).run(0)
    assert "loop_integral" not in run.levels
    assert "lp" in run.sample_stats


# Refusals


@pytest.mark.parametrize("kernel", [lehr.HMC, lehr.MALA, lehr.NUTS, lehr.GHMC], ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**METROPOLIS, "num_nodes": 6}, "2, 3, 4 or 5"),
        ({**METROPOLIS, "num_nodes": 1}, "2, 3, 4 or 5"),
        ({"metropolis": "x"}, "line-integral"),
        ({"integrate_energies": True}, "line-integral"),
    ],
)
def test_options_out_of_range_are_refused(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        kernel(**options)


@pytest.mark.parametrize("driver", [lehr.AnnealedMCMC, lehr.AnnealedSMC])
def test_energies_are_integrated_only_on_request(driver):
    arguments = {"weights": "path"} if driver is lehr.AnnealedSMC else {}
    with pytest.raises(TypeError, match="integrate_energies=True"):
        driver(MODES, lehr.HMC(**METROPOLIS), progress=False, **arguments).run(0)


@pytest.mark.parametrize("exponent", ["latent", "fixed"])
def test_a_score_may_not_depend_on_another_latent(exponent):
    def model():
        w = numpyro.sample("w", dist.LogNormal(0.0, 0.2))
        numpyro.sample("x", lehr.Diffusion(lehr.Power(score_of(MODES), w if exponent == "latent" else 1.5)))

    mcmc = lehr.AnnealedMCMC(model, lehr.MALA(**METROPOLIS), **SMALL)
    if exponent == "latent":
        with pytest.raises(TypeError, match="depend on another latent site"):
            mcmc.run(0)
    else:
        assert np.isfinite(mcmc.run(0).samples["x"]).all()


def test_energy_weights_want_the_exact_test():
    smc = lehr.AnnealedSMC(MODES, lehr.HMC(**METROPOLIS, integrate_energies=True), weights="energy", progress=False)
    with pytest.raises(ValueError, match='metropolis="exact"'):
        smc.run(0)
