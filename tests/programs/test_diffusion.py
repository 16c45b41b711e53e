"""Diffusion as a NumPyro distribution, and the handler that binds its noise level."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer.util import log_density
from scipy import stats
from stand_ins import Silent

import lehr

SCHEDULE = lehr.VPCosine()
LOC, SCALE = np.array([0.5, -1.0]), np.array([0.5, 0.8])
P = lehr.Gaussian(LOC, SCALE, SCHEDULE)
X = jnp.array([0.3, -0.4])
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # float32: a few dozen operations on numbers of order ten


def exact(x, t, loc=LOC, scale=SCALE) -> np.ndarray:
    """log N(x; α m, α² s² + σ²) in float64, summed over the last axis."""
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    return stats.norm(alpha * loc, np.hypot(alpha * scale, sigma)).logpdf(np.asarray(x, float)).sum(-1)


def model():
    return numpyro.sample("x", lehr.Diffusion(P))


def joint(program, values, *args) -> jax.Array:
    return log_density(program, args, {}, values)[0]


@pytest.mark.parametrize("shape", [(), (2,), (3, 4)])
def test_events_of_every_shape_sum_their_coordinates_and_keep_the_batch(shape):
    d = lehr.Diffusion(lehr.Gaussian(jnp.full(shape, 0.5), 0.8, SCHEDULE), 0.3)
    assert (d.batch_shape, d.event_shape, d.event_dim) == ((), shape, len(shape))
    assert d.support.event_dim == len(shape)
    x = np.random.default_rng(0).normal(size=(5, 2, *shape))
    assert np.asarray(d.support(jnp.asarray(x))).shape == (5, 2)
    assert bool(jnp.all(d.support(jnp.asarray(x))))
    np.testing.assert_allclose(d.log_prob(x), exact(x.reshape(5, 2, -1), 0.3, 0.5, 0.8), **ROUNDING)


def test_log_prob_over_batches_is_the_vmapped_log_density(ring):
    x = jax.random.normal(jax.random.key(0), (4, 3, 2)) / 2
    one = jax.vmap(jax.vmap(lambda x: ring.log_density(x, 0.2)))(x)
    np.testing.assert_allclose(lehr.Diffusion(ring, 0.2).log_prob(x), one, rtol=1e-6)


def test_at_binds_a_copy():
    free = lehr.Diffusion(P)
    bound = free.at(0.3)
    assert free.t is None
    np.testing.assert_allclose(bound.log_prob(X), exact(X, 0.3), **ROUNDING)
    np.testing.assert_allclose(bound.at(0.7).log_prob(X), exact(X, 0.7), **ROUNDING)


def test_without_a_level_there_is_no_density_and_draws_are_data():
    with pytest.raises(RuntimeError, match=r"no noise level.*lehr\.noise_level"):
        lehr.Diffusion(P).log_prob(X)
    key = jax.random.key(0)
    np.testing.assert_array_equal(lehr.Diffusion(P).sample(key), lehr.Diffusion(P, 0.0).sample(key))


def test_a_score_has_no_log_prob(score_only):
    with pytest.raises(TypeError, match="known through its score only"):
        lehr.Diffusion(score_only, 0.3).log_prob(X)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_value_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"events of shape \(2,\) was given a value of shape"):
        lehr.Diffusion(P, 0.3).log_prob(jnp.zeros(shape))


def test_what_is_no_potential_and_what_is_no_level_are_refused():
    with pytest.raises(TypeError, match="needs a lehr potential; got a Normal"):
        lehr.Diffusion(dist.Normal())
    with pytest.raises(ValueError, match=r"got t = 1\.5"):
        lehr.Diffusion(P, 1.5)
    with pytest.raises(ValueError, match="one time t, a scalar"):
        lehr.Diffusion(P).at(jnp.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="noise_level needs a level"):
        lehr.noise_level(model)


def test_draws_of_an_exact_potential_have_the_moments_of_its_level():
    draws = lehr.Diffusion(P, 0.4).sample(jax.random.key(0), (2, 10_000)).reshape(-1, 2)
    moments = P.moments(0.4)
    alpha, sigma = float(SCHEDULE.alpha(0.4)), float(SCHEDULE.sigma(0.4))
    variance = (alpha * SCALE) ** 2 + sigma**2
    np.testing.assert_allclose(moments.std**2, variance, rtol=1e-5)
    # 4.5 standard errors of a mean and of a variance over 20 000 draws
    np.testing.assert_allclose(draws.mean(0), alpha * LOC, atol=4.5 * np.sqrt(variance.max() / 20_000))
    np.testing.assert_allclose(draws.var(0), variance, rtol=4.5 * np.sqrt(2 / 20_000))


def test_what_is_not_exact_is_left_to_a_driver():
    with pytest.raises(NotImplementedError, match=r"lehr\.AnnealedMCMC or lehr\.AnnealedSMC"):
        lehr.Diffusion(P * P, 0.4).sample(jax.random.key(0))


# As a pytree


def test_a_diffusion_crosses_jit_as_an_argument_without_recompiling():
    traces = []

    @jax.jit
    def log_prob(d, x):
        traces.append(d)
        return d.log_prob(x)

    for loc, t in ((LOC, 0.2), (LOC + 1, 0.7)):
        d = lehr.Diffusion(lehr.Gaussian(loc, SCALE, SCHEDULE), t)
        np.testing.assert_allclose(log_prob(d, X), exact(X, t, loc), **ROUNDING)
    assert len(traces) == 1


def test_stacked_diffusions_are_vmapped_over_level_and_location():
    times, locs = [0.1, 0.5, 0.9], [LOC, LOC + 1, -LOC]
    each = [lehr.Diffusion(lehr.Gaussian(m, SCALE, SCHEDULE), t) for m, t in zip(locs, times, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    got = jax.vmap(lambda d: d.log_prob(X))(stacked)
    np.testing.assert_allclose(got, [exact(X, t, m) for m, t in zip(locs, times, strict=True)], **ROUNDING)


# Inside NumPyro's wrappers and handlers


@pytest.mark.seam
def test_expand_mask_and_to_event_wrap_it_as_any_distribution():
    x = jnp.stack([X, -X, 2 * X])
    d, want = lehr.Diffusion(P, 0.3), exact(x, 0.3)
    np.testing.assert_allclose(d.expand((3,)).log_prob(x), want, **ROUNDING)
    np.testing.assert_allclose(d.expand((3,)).to_event(1).log_prob(x), want.sum(), **ROUNDING)
    kept = jnp.array([True, False, True])
    np.testing.assert_allclose(d.expand((3,)).mask(kept).log_prob(x), want * kept, **ROUNDING)
    assert d.expand((3,)).to_event(1).sample(jax.random.key(0), (5,)).shape == (5, 3, 2)


@pytest.mark.seam
def test_a_plate_under_scale_and_mask_weighs_each_event():
    kept, x = jnp.array([True, False, True]), jnp.stack([X, -X, 2 * X])

    def program():
        with numpyro.plate("n", 3), handlers.scale(scale=0.5), handlers.mask(mask=kept):
            numpyro.sample("x", lehr.Diffusion(P))

    got = joint(lehr.noise_level(program, 0.3), {"x": x})
    np.testing.assert_allclose(got, 0.5 * exact(x[::2], 0.3).sum(), **ROUNDING)


@pytest.mark.seam
def test_a_subsampled_plate_scales_what_it_sees():
    def program():
        with numpyro.plate("n", 6, subsample_size=2):
            numpyro.sample("x", lehr.Diffusion(P))

    x = jnp.stack([X, -X])
    got = joint(handlers.seed(lehr.noise_level(program, 0.3), 0), {"x": x})
    np.testing.assert_allclose(got, 3 * exact(x, 0.3).sum(), **ROUNDING)


@pytest.mark.seam
@pytest.mark.parametrize("outside", [True, False])
def test_condition_substitute_and_scope_meet_noise_level_in_either_order(outside):
    def at_level(program):
        return lehr.noise_level(program, 0.3)

    handled = {
        "x": [lambda f: handlers.condition(f, {"x": X}), lambda f: handlers.substitute(f, {"x": X})],
        "a/x": [lambda f: handlers.condition(handlers.scope(f, "a"), {"a/x": X})],
    }
    for name, programs in handled.items():
        for handle in programs:
            program = at_level(handle(model)) if outside else handle(at_level(model))
            site = handlers.trace(program).get_trace()[name]
            np.testing.assert_allclose(site["fn"].log_prob(site["value"]), exact(X, 0.3), **ROUNDING)


@pytest.mark.seam
def test_a_blocked_site_is_drawn_and_left_out():
    def program():
        numpyro.sample("z", dist.Normal(0, 1))
        model()

    trace = handlers.trace(handlers.block(handlers.seed(lehr.noise_level(program, 0.3), 0), hide=["x"])).get_trace()
    assert list(trace) == ["z"]
    draw = handlers.seed(lehr.noise_level(model, 0.3), 0)()
    assert np.isfinite(exact(draw, 0.3))


def test_the_innermost_noise_level_wins():
    program = lehr.noise_level(lehr.noise_level(model, 0.2), 0.8)
    np.testing.assert_allclose(joint(program, {"x": X}), exact(X, 0.2), **ROUNDING)


def test_a_level_bound_by_hand_is_kept():
    def program():
        numpyro.sample("x", lehr.Diffusion(P).at(0.2))
        numpyro.sample("z", lehr.Diffusion(P))

    got = joint(lehr.noise_level(program, 0.8), {"x": X, "z": X})
    np.testing.assert_allclose(got, exact(X, 0.2) + exact(X, 0.8), **ROUNDING)


def test_sites_of_different_schedules_meet_by_log_snr_on_the_first_ones_level():
    def program():
        numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("z", lehr.Diffusion(lehr.Gaussian(-LOC, SCALE, lehr.VPLinear())))

    got = joint(lehr.noise_level(program, 0.4), {"x": X, "z": X})
    np.testing.assert_allclose(got, exact(X, 0.4) + exact(X, 0.4, -LOC), **ROUNDING)


def test_noise_level_is_a_context_manager_too():
    with handlers.trace() as trace, handlers.substitute(data={"x": X}), lehr.noise_level(t=0.6):
        model()
    np.testing.assert_allclose(trace["x"]["fn"].log_prob(X), exact(X, 0.6), **ROUNDING)


@pytest.mark.seam
def test_noise_level_reaches_into_a_numpyro_mixture():
    other = lehr.Gaussian(-LOC, SCALE, SCHEDULE)
    shares = dist.Categorical(probs=jnp.array([0.3, 0.7]))

    def program():
        numpyro.sample("x", dist.MixtureGeneral(shares, [lehr.Diffusion(P), lehr.Diffusion(other)]))

    want = np.logaddexp(np.log(0.3) + exact(X, 0.4), np.log(0.7) + exact(X, 0.4, -LOC))
    np.testing.assert_allclose(joint(lehr.noise_level(program, 0.4), {"x": X}), want, **ROUNDING)


@pytest.mark.seam
def test_the_level_may_be_traced_and_vmapped():
    times = jnp.array([0.0, 0.3, 1.0])
    got = jax.jit(jax.vmap(lambda t: joint(lehr.noise_level(model, t), {"x": X})))(times)
    np.testing.assert_allclose(got, [exact(X, t) for t in times], **ROUNDING)


@pytest.mark.seam
def test_log_density_of_a_model_at_a_level_is_its_closed_form():
    def program(y):
        x = numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    y = jnp.array([1.0, 0.0])
    want = exact(X, 0.3) + stats.norm(np.asarray(X), 0.5).logpdf(np.asarray(y)).sum()
    np.testing.assert_allclose(joint(lehr.noise_level(program, 0.3), {"x": X}, y), want, **ROUNDING)


# Stock samplers


@pytest.mark.seam
def test_stock_numpyro_nuts_samples_a_model_at_its_level():
    t, mixture = 0.5, lehr.GaussianMixture(jnp.array([[-0.8, 0.0], [0.8, 0.4]]), jnp.array([0.5, 0.3]), [0.3, 0.7])

    def program():
        numpyro.sample("x", lehr.Diffusion(mixture))

    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(lehr.noise_level(program, t), max_tree_depth=5),
        num_warmup=150, num_samples=300, num_chains=2, chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(0))
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    draws = np.asarray(lehr.Diffusion(mixture, t).sample(jax.random.key(1), (20_000,)))
    for statistic in (lambda x: x, lambda x: x**2, lambda x: x[..., ::-1] * x):
        ours, theirs = statistic(x), statistic(draws)
        error = np.sqrt(theirs.var(0) * (1 / effective_sample_size(ours) + 1 / 20_000))
        assert np.all(np.abs(ours.mean((0, 1)) - theirs.mean(0)) < 4 * error)  # 4 Monte Carlo standard errors


KERNELS = {
    "hmc": (lambda f: blackjax.hmc(f, 0.5, jnp.ones(2), 4), 15),
    "mala": (lambda f: blackjax.mala(f, 0.25), 50),
    "nuts": (lambda f: blackjax.nuts(f, 0.5, jnp.ones(2), max_num_doublings=4), 8),
}


@pytest.mark.seam
@pytest.mark.parametrize("name", KERNELS)
def test_stock_blackjax_kernels_sample_a_potential_at_its_level(name):
    make, steps = KERNELS[name]
    t, chains = 0.5, 512

    def last(key):
        kernel = make(P.at(t))
        step = lambda state, k: (kernel.step(k, state)[0], None)  # noqa: E731
        return jax.lax.scan(step, kernel.init(jnp.zeros(2)), jax.random.split(key, steps))[0].position

    x = jax.jit(jax.vmap(last))(jax.random.split(jax.random.key(0), chains))
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    variance = (alpha * SCALE) ** 2 + sigma**2
    # 4 standard errors over independent chains, long past their start at zero
    np.testing.assert_allclose(x.mean(0), alpha * LOC, atol=4 * np.sqrt(variance.max() / chains))
    np.testing.assert_allclose(x.var(0), variance, rtol=4 * np.sqrt(2 / chains))


@pytest.fixture
def score_only() -> lehr.Potential:
    """A product with a score among its members: a score."""
    return P * lehr.ScoreNetwork(Silent(), SCHEDULE, (2,))
