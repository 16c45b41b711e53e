"""Kernels against what is known of them in closed form."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr

N = 4000
TARGET = lehr.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.7, [0.3, 0.7])
ADJUSTED = [lehr.HMC(3), lehr.MALA()]
UNADJUSTED = [lehr.UHMC(3), lehr.ULA()]


def run(kernel, logdensity_fn, start, step_size, num_steps, inverse_mass=None):
    """Positions after ``num_steps`` transitions of independent chains, and the mean acceptance."""
    step = kernel.build()
    inverse_mass = jnp.ones(start.shape[-1]) if inverse_mass is None else inverse_mass

    def chain(key, q):
        state = kernel.init(key, q, logdensity_fn)
        keys = jax.random.split(key, num_steps)
        state, stats = jax.lax.scan(
            lambda s, k: step(k, s, logdensity_fn, jnp.asarray(step_size), inverse_mass), state, keys
        )
        return state.position, stats.acceptance_rate

    q, acceptance = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(7), len(start)), start)
    return np.asarray(q), float(acceptance.mean())


@pytest.mark.seam
@pytest.mark.parametrize("kernel", ADJUSTED, ids=lambda k: type(k).__name__)
def test_adjusted_kernels_leave_their_target_as_it_is(kernel):
    start = TARGET.sample(jax.random.key(0), 0.0, (N,))
    q, acceptance = run(kernel, TARGET.at(0.0), start, 1.0, 15)
    assert acceptance < 0.95  # the test has work to do
    moments = TARGET.moments(0.0)
    np.testing.assert_allclose(q.mean(0), moments.mean, atol=4 * float(moments.std.max()) / np.sqrt(N))
    np.testing.assert_allclose(q.std(0), moments.std, rtol=4 / np.sqrt(2 * N))


@pytest.mark.seam
@pytest.mark.parametrize("kernel", UNADJUSTED, ids=lambda k: type(k).__name__)
def test_without_the_test_leapfrog_ends_at_the_variance_that_its_step_gives(kernel):
    """For N(0, 1) leapfrog conserves (1 − ε²/4) q² + p², whatever L: the convention of ε is HMC's for all."""
    epsilon = 1.2
    start = jnp.zeros((N, 1))
    q, _ = run(kernel, lambda x: -jnp.sum(x**2) / 2, start, epsilon, 40)
    assert q.var() == pytest.approx(1 / (1 - epsilon**2 / 4), rel=4 * np.sqrt(2 / N))


@pytest.mark.seam
def test_mala_accepts_as_blackjax_mala_with_half_the_squared_step():
    epsilon = 0.9
    start = TARGET.sample(jax.random.key(0), 0.0, (N,))
    _, ours = run(lehr.MALA(), TARGET.at(0.0), start, epsilon, 5)
    theirs = blackjax.mala(TARGET.at(0.0), epsilon**2 / 2)

    def chain(key, q):
        return jax.lax.scan(
            lambda s, k: (lambda out: (out[0], out[1].acceptance_rate))(theirs.step(k, s)),
            theirs.init(q),
            jax.random.split(key, 5),
        )[1]

    accepted = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(3), N), start)
    assert ours == pytest.approx(float(accepted.mean()), abs=4 * 0.35 / np.sqrt(N))


def test_the_step_size_is_in_units_of_the_scale():
    """Stretching a coordinate and its scale together changes nothing but that coordinate."""
    stretch = jnp.array([1.0, 1e-3])
    start = TARGET.sample(jax.random.key(0), 0.0, (64,))
    plain, _ = run(lehr.HMC(3), TARGET.at(0.0), start, 0.8, 5)
    narrow, _ = run(lehr.HMC(3), lambda x: TARGET.log_density(x / stretch, 0.0), start * stretch, 0.8, 5, stretch**2)
    np.testing.assert_allclose(narrow / stretch, plain, rtol=2e-3, atol=2e-3)


@pytest.mark.seam
def test_refresh_renews_what_a_state_remembers_of_its_target():
    kernel, q = lehr.HMC(), jnp.array([0.3, -0.2])
    stale = kernel.init(jax.random.key(0), q, TARGET.at(0.9))
    fresh = kernel.refresh(stale, TARGET.at(0.1))
    assert float(fresh.logdensity) == pytest.approx(float(TARGET.log_density(q, 0.1)), rel=1e-6)
    np.testing.assert_allclose(fresh.logdensity_grad, TARGET.score(q, 0.1), rtol=1e-5)
    assert abs(float(fresh.logdensity - stale.logdensity)) > 0.1


@pytest.mark.parametrize("kernel", ADJUSTED + UNADJUSTED, ids=lambda k: type(k).__name__)
def test_a_proposal_that_is_not_finite_is_not_taken(kernel):
    def cliff(x):
        return jnp.where(jnp.abs(x[0]) < 1, 0.0, jnp.nan)

    q, _ = run(kernel, cliff, jnp.zeros((256, 1)), 0.9, 10)
    assert np.all(np.abs(q) < 1)


def test_a_blackjax_kernel_of_ones_own_plugs_in_with_a_few_lines():
    from blackjax.mcmc import barker

    class Barker(lehr.Kernel):
        is_adjusted, target_acceptance = True, 0.5

        def init(self, rng_key, position, logdensity_fn):
            return barker.init(position, logdensity_fn)

        def build(self):
            kernel = barker.build_kernel()

            def step(rng_key, state, logdensity_fn, step_size, inverse_mass_matrix):
                state, info = kernel(rng_key, state, logdensity_fn, step_size, inverse_mass_matrix)
                return state, lehr.kernels.Stats(jnp.nan_to_num(info.acceptance_rate), jnp.zeros((), bool))

            return step

        def initial_step_size(self, dimension):
            return 1.0

    mcmc = lehr.AnnealedMCMC(TARGET, Barker(), ladder=10, num_chains=1000, num_samples=1, thinning=10, progress=False)
    mcmc.run(0)
    x, moments = mcmc.get_samples()["x"], TARGET.moments(0.0)
    np.testing.assert_allclose(x.mean(0), moments.mean, atol=5 * float(moments.std.max()) / np.sqrt(1000))
