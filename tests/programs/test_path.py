"""The path of a model: its density at every level against closed forms, its start, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import potential_energy
from scipy import stats
from stand_ins import ScoreOf

import lehr
from lehr.programs.guidance import Raw, Tweedie

SCHEDULE = lehr.VPCosine()
TIMES = np.array([0.0, 0.02, 0.3, 0.6, 0.95])
P_LOC, P_SCALE = np.array([0.5, -1.0]), np.array([0.5, 0.8])
Q_LOC, Q_SCALE = np.array([-0.2, 0.4]), np.array([0.7, 0.6])
P, Q = lehr.Gaussian(P_LOC, P_SCALE, SCHEDULE), lehr.Gaussian(Q_LOC, Q_SCALE, SCHEDULE)
X, Y = np.array([0.3, -0.4]), np.array([1.0, 0.2])
NOISE = 0.4
# float32: x̂₀ divides by α, which is .06 at the highest of TIMES, and the likelihood by its variance
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}


def levels(path, position, times=TIMES) -> np.ndarray:
    """The path's log density at one position and several levels."""
    position = jax.tree.map(jnp.asarray, position)
    return np.asarray(jax.jit(jax.vmap(lambda t: path.log_density(position, t)))(jnp.asarray(times)))


def alpha_sigma(t) -> tuple[np.ndarray, np.ndarray]:
    t = jnp.asarray(t)
    return np.asarray(SCHEDULE.alpha(t), float), np.asarray(SCHEDULE.sigma(t), float)


def normal(x, loc, scale) -> np.ndarray:
    """log N summed over the last axis, float64."""
    return stats.norm(loc, scale).logpdf(np.asarray(x, float)).sum(-1)


def diffused(x, loc, scale, t) -> float:
    """log N(x; α m, α² s² + σ²)."""
    alpha, sigma = alpha_sigma(t)
    return normal(x, alpha * loc, np.hypot(alpha * scale, sigma))


def denoised(x, loc, scale, t) -> np.ndarray:
    """E[x₀ | x_t = x] for a Gaussian prior."""
    alpha, sigma = alpha_sigma(t)
    return loc + alpha * scale**2 / ((alpha * scale) ** 2 + sigma**2) * (x - alpha * loc)


def score(x, loc, scale, t) -> np.ndarray:
    alpha, sigma = alpha_sigma(t)
    return -(x - alpha * loc) / ((alpha * scale) ** 2 + sigma**2)


def product_denoised(x, weights, t) -> np.ndarray:
    """(x + σ² s/W)/α for P^w1 Q^w2."""
    alpha, sigma = alpha_sigma(t)
    s = weights[0] * score(x, P_LOC, P_SCALE, t) + weights[1] * score(x, Q_LOC, Q_SCALE, t)
    return (x + sigma**2 * s / sum(weights)) / alpha


def observed(potential=P):
    """x ~ potential, y ~ N(x, NOISE²)."""

    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(potential))
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    return model


# The density


def test_the_path_of_a_potential_is_its_own_density():
    want = [1.5 * diffused(X, P_LOC, P_SCALE, t) + diffused(X, Q_LOC, Q_SCALE, t) for t in TIMES]
    np.testing.assert_allclose(levels(lehr.Path(P**1.5 * Q), {"x": X}), want, **ROUNDING)


def test_raw_lets_the_likelihood_read_the_noisy_x():
    got = levels(lehr.Path(observed(), Raw())(Y), {"x": X})
    want = [diffused(X, P_LOC, P_SCALE, t) + normal(Y, X, NOISE) for t in TIMES]
    np.testing.assert_allclose(got, want, **ROUNDING)


@pytest.mark.parametrize("guidance", [None, Tweedie()])
def test_tweedie_is_the_default_and_lets_the_likelihood_read_the_denoised_x(guidance):
    got = levels(lehr.Path(observed(), guidance)(Y), {"x": X})
    want = [diffused(X, P_LOC, P_SCALE, t) + normal(Y, denoised(X, P_LOC, P_SCALE, t), NOISE) for t in TIMES]
    np.testing.assert_allclose(got, want, **ROUNDING)


def test_the_gradient_under_tweedie_goes_through_the_denoiser():
    t = 0.4
    alpha, sigma = alpha_sigma(t)
    slope = alpha * P_SCALE**2 / ((alpha * P_SCALE) ** 2 + sigma**2)
    want = score(X, P_LOC, P_SCALE, t) + slope * (Y - denoised(X, P_LOC, P_SCALE, t)) / NOISE**2
    got = jax.grad(lehr.Path(observed())(Y).log_density)({"x": jnp.asarray(X)}, t)["x"]
    np.testing.assert_allclose(got, want, **ROUNDING)


def test_tweedie_counts_the_noise_of_a_product_once():
    got = levels(lehr.Path(observed(P * Q**0.5))(Y), {"x": X})
    want = [
        diffused(X, P_LOC, P_SCALE, t)
        + 0.5 * diffused(X, Q_LOC, Q_SCALE, t)
        + normal(Y, product_denoised(X, (1, 0.5), t), NOISE)
        for t in TIMES
    ]
    np.testing.assert_allclose(got, want, **ROUNDING)


def test_from_the_end_of_the_ladder_on_every_strategy_is_the_users_own_joint():
    end, below = 0.3, [0.1, 0.2, 0.3]
    want = [diffused(X, P_LOC, P_SCALE, t) + normal(Y, X, NOISE) for t in below]
    for guidance in (Raw(), Tweedie()):
        path = lehr.Path(observed(), guidance)(Y).ending_at(end)
        np.testing.assert_allclose(levels(path, {"x": X}, below), want, **ROUNDING)
    above = diffused(X, P_LOC, P_SCALE, 0.31) + normal(Y, denoised(X, P_LOC, P_SCALE, 0.31), NOISE)
    np.testing.assert_allclose(levels(path, {"x": X}, [0.31]), above, **ROUNDING)


def test_guidance_may_differ_from_site_to_site():
    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)
        numpyro.sample("z", dist.Normal(x[0], 1.0), obs=2.0)

    got = levels(lehr.Path(model, {"y": Raw()})(Y), {"x": X})
    want = [
        diffused(X, P_LOC, P_SCALE, t) + normal(Y, X, NOISE) + normal([2.0], denoised(X, P_LOC, P_SCALE, t)[:1], 1.0)
        for t in TIMES
    ]
    np.testing.assert_allclose(got, want, **ROUNDING)


@pytest.mark.parametrize("k", [1, 2])
def test_an_observed_diffusion_is_one_more_expert_on_x(k):
    expert = lehr.Gaussian(Q_LOC[:k], Q_SCALE[:k], SCHEDULE)

    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("expert", lehr.Diffusion(expert), obs=x[..., :k])
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    def want(t):
        alpha, sigma = alpha_sigma(t)
        seen = np.arange(2) < k  # where the expert sees x, the noise is counted twice
        s = score(X, P_LOC, P_SCALE, t) + seen * score(X, Q_LOC, Q_SCALE, t)
        read = (X + sigma**2 * s / (1 + seen)) / alpha
        experts = diffused(X, P_LOC, P_SCALE, t) + diffused(X[:k], Q_LOC[:k], Q_SCALE[:k], t)
        return experts + normal(Y, read, NOISE)

    got = levels(lehr.Path(model)(Y), {"x": X})
    np.testing.assert_allclose(got, [want(t) for t in TIMES], **ROUNDING)


def test_no_diffusion_ever_reads_a_denoised_value():
    seen = []

    class Spy(lehr.Gaussian):
        def _log_density(self, x, t):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
            return super()._log_density(x, t)

    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(Spy(P_LOC, P_SCALE, SCHEDULE)))
        numpyro.sample("expert", lehr.Diffusion(Spy(Q_LOC, Q_SCALE, SCHEDULE)), obs=x)
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    jax.grad(lehr.Path(model)(Y).log_density)({"x": jnp.asarray(X)}, 0.6)
    jax.effects_barrier()
    assert len(seen) >= 2
    np.testing.assert_array_equal(np.stack(seen), np.broadcast_to(np.float32(X), (len(seen), 2)))


def test_a_plate_of_events_is_a_sum_over_them():
    def model(y):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", lehr.Diffusion(P))
            numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    x, y = np.stack([X, -X, 2 * X]), np.stack([Y, Y, -Y])
    want = [(diffused(x, P_LOC, P_SCALE, t) + normal(y, denoised(x, P_LOC, P_SCALE, t), NOISE)).sum() for t in TIMES]
    np.testing.assert_allclose(levels(lehr.Path(model)(y), {"x": x}), want, **ROUNDING)


def test_scale_weighs_a_diffusion_as_a_power_does_and_a_likelihood_as_numpyro_does():
    def model(y):
        with handlers.scale(scale=2.0):
            x = numpyro.sample("x", lehr.Diffusion(P))
        with handlers.scale(scale=0.5):
            numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    want = [2 * diffused(X, P_LOC, P_SCALE, t) + 0.5 * normal(Y, product_denoised(X, (2, 0), t), NOISE) for t in TIMES]
    np.testing.assert_allclose(levels(lehr.Path(model)(Y), {"x": X}), want, **ROUNDING)


def test_experts_with_different_schedules_meet_by_log_snr():
    other = lehr.Gaussian(Q_LOC, Q_SCALE, lehr.VPLinear())

    def product(y):
        x = numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("expert", lehr.Diffusion(other), obs=x)

    times = [0.05, 0.3, 0.6, 0.9]
    want = [diffused(X, P_LOC, P_SCALE, t) + diffused(X, Q_LOC, Q_SCALE, t) for t in times]
    path = lehr.Path(product)(Y)
    assert path.schedule == SCHEDULE
    # exact potentials are rescheduled exactly: the same data under P's α and σ
    np.testing.assert_allclose(levels(path, {"x": X}, times), want, **ROUNDING)


def test_a_potential_may_depend_on_an_ordinary_latent():
    def model():
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(mu * jnp.ones(2), 0.5, SCHEDULE)))

    path, position = lehr.Path(model)(), {"mu": 0.7, "x": X}
    want = [diffused(X, 0.7 * np.ones(2), 0.5, t) + normal([0.7], 0, 1) for t in TIMES]
    np.testing.assert_allclose(levels(path, position), want, **ROUNDING)
    # chains start around α μ, so there the start is the density itself
    position = jax.tree.map(jnp.asarray, position)
    np.testing.assert_allclose(path.log_start(position, 0.6), want[3], **ROUNDING)


def test_a_product_may_be_made_inside_the_model_and_weighed_by_a_latent():
    def model():
        weight = numpyro.sample("weight", dist.HalfNormal(1.0))
        numpyro.sample("x", lehr.Diffusion(P * Q**weight))

    position = {"weight": jnp.asarray(-0.4), "x": jnp.asarray(X)}
    weight = np.exp(-0.4)
    want = [
        diffused(X, P_LOC, P_SCALE, t) + weight * diffused(X, Q_LOC, Q_SCALE, t) + stats.halfnorm.logpdf(weight) - 0.4
        for t in TIMES
    ]
    np.testing.assert_allclose(levels(lehr.Path(model)(), position), want, **ROUNDING)


def mixed(y):
    """Ordinary latents of all kinds of support."""
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.5))
    share = numpyro.sample("share", dist.Beta(2.0, 3.0))
    mix = numpyro.sample("mix", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    x = numpyro.sample("x", lehr.Diffusion(P))
    numpyro.deterministic("signal", gain * x + share * mix[:2])
    numpyro.sample("y", dist.Normal(gain * x + share * mix[:2], tau).to_event(1), obs=y)


LATENT = {
    "tau": jnp.array(-0.3), "gain": jnp.array(0.2), "share": jnp.array(0.5), "mix": jnp.array([0.4, -0.7]),
    "x": jnp.asarray(X, float),
}  # fmt: skip


@pytest.mark.seam
def test_at_raw_guidance_a_model_is_numpyros_own_unconstrained_density():
    theirs = jax.jit(jax.vmap(lambda t: -potential_energy(lehr.noise_level(mixed, t), (jnp.asarray(Y),), {}, LATENT)))
    np.testing.assert_allclose(levels(lehr.Path(mixed, Raw())(Y), LATENT), theirs(jnp.asarray(TIMES)), **ROUNDING)


@pytest.mark.seam
def test_constrain_gives_each_site_on_its_own_scale_and_the_deterministic_ones():
    path = lehr.Path(mixed)(Y)
    batch = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), LATENT)
    got = path.constrain(batch, batch_ndims=1)
    assert set(got) == {"tau", "gain", "share", "mix", "x", "signal"}
    np.testing.assert_allclose(got["tau"], np.exp([-0.3, -0.6]), rtol=1e-6)
    np.testing.assert_allclose(got["gain"], np.exp([0.2, 0.4]), rtol=1e-6)
    np.testing.assert_allclose(got["share"], 1 / (1 + np.exp([-0.5, -1.0])), rtol=1e-6)
    np.testing.assert_allclose(got["mix"].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(got["x"], np.stack([X, 2 * X]), rtol=1e-6)
    signal = got["gain"][:, None] * got["x"] + got["share"][:, None] * got["mix"][:, :2]
    np.testing.assert_allclose(got["signal"], signal, rtol=1e-6)
    one = path.constrain(LATENT)
    np.testing.assert_allclose(one["signal"], signal[0], rtol=1e-6)


@pytest.mark.parametrize("guidance", [Raw(), Tweedie()])
def test_a_score_moves_x_as_its_energy_would(guidance):
    def gradient(potential):
        path = lehr.Path(observed(potential), guidance)(Y)
        return jax.grad(path.surrogate)({"x": jnp.asarray(X)}, 0.4)["x"]

    np.testing.assert_allclose(gradient(ScoreOf(P)), gradient(P), rtol=1e-5)
    np.testing.assert_allclose(gradient(ScoreOf(P) * Q**0.5), gradient(P * Q**0.5), rtol=1e-5)


# The start


def draws(path, n, t) -> dict[str, jax.Array]:
    return jax.jit(jax.vmap(lambda key: path.init(key, t)))(jax.random.split(jax.random.key(0), n))


def test_where_all_factors_are_gaussian_chains_start_from_the_path_itself():
    def model():
        x = numpyro.sample("x", lehr.Diffusion(P**2))
        numpyro.sample("expert", lehr.Diffusion(lehr.Gaussian(Q_LOC[:1], Q_SCALE[:1], SCHEDULE)), obs=x[:1])

    t, n = 0.6, 8000
    alpha, sigma = alpha_sigma(t)
    p_precision, q_precision = (1 / ((alpha * s) ** 2 + sigma**2) for s in (P_SCALE, Q_SCALE))
    precision = 2 * p_precision + q_precision * [1, 0]
    mean = alpha * (2 * p_precision * P_LOC + q_precision * Q_LOC * [1, 0]) / precision
    path = lehr.Path(model)()
    x = draws(path, n, t)["x"]
    # 4.5 standard errors of a mean and of a variance
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4.5 / np.sqrt(n * precision))
    np.testing.assert_allclose(x.var(0), 1 / precision, rtol=4.5 * np.sqrt(2 / n))
    np.testing.assert_allclose(path.log_start({"x": jnp.asarray(X)}, t), normal(X, mean, precision**-0.5), **ROUNDING)


def test_the_weights_of_the_start_average_to_the_evidence():
    n = 4000
    for schedule in (SCHEDULE, lehr.VPLinear()):
        path = lehr.Path(observed(lehr.Gaussian(P_LOC, P_SCALE, schedule)), Raw())(Y)
        x = draws(path, n, 1.0)
        log_weight = jax.jit(jax.vmap(lambda q, path=path: path.log_density(q, 1.0) - path.log_start(q, 1.0)))(x)
        weight = np.exp(np.asarray(log_weight, float))
        alpha, sigma = float(schedule.alpha(1.0)), float(schedule.sigma(1.0))
        evidence = np.exp(normal(Y, alpha * P_LOC, np.sqrt((alpha * P_SCALE) ** 2 + sigma**2 + NOISE**2)))
        assert abs(weight.mean() - evidence) < 4 * weight.std() / np.sqrt(n)  # 4 standard errors


def test_the_start_of_a_normalised_model_weighs_one_whatever_its_latents(ring):
    def model():
        tau = numpyro.sample("tau", dist.HalfNormal(2.0))
        with numpyro.plate("n", 2):
            numpyro.sample("mix", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
        numpyro.sample("shift", dist.Normal(tau, 1.0))
        numpyro.sample("x", lehr.Diffusion(ring))

    path, n, t = lehr.Path(model)(), 4000, 0.2

    @jax.jit
    @jax.vmap
    def start(key):
        q = path.init(key, t)
        return path.log_density(q, t) - path.log_start(q, t), jnp.exp(q["tau"])

    log_weight, tau = start(jax.random.split(jax.random.key(0), n))
    weight = np.exp(np.asarray(log_weight, float))
    assert weight.std() > 0.1  # the ring is no Gaussian yet
    # 4 standard errors: the ring integrates to one, and τ is drawn from its prior
    assert abs(weight.mean() - 1) < 4 * weight.std() / np.sqrt(n)
    prior = stats.halfnorm(scale=2.0)
    assert abs(tau.mean() - prior.mean()) < 4 * prior.std() / np.sqrt(n)


def test_scaled_and_masked_latents_start_from_the_prior_that_they_are_drawn_from():
    kept = jnp.array([True, False])

    def model():
        with handlers.scale(scale=3.0):
            numpyro.sample("tau", dist.HalfNormal(2.0))
        with numpyro.plate("n", 2), handlers.mask(mask=kept):
            numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("x", lehr.Diffusion(P))

    q = {"tau": jnp.array(0.3), "rate": jnp.array([-0.2, 0.5]), "x": jnp.asarray(X)}
    want = stats.halfnorm(scale=2.0).logpdf(np.exp(0.3)) + 0.3
    want += stats.gamma(2.0).logpdf(np.exp([-0.2, 0.5])).sum() + (-0.2 + 0.5)
    want += diffused(X, P_LOC, P_SCALE, 0.6)
    np.testing.assert_allclose(lehr.Path(model)().log_start(q, 0.6), want, **ROUNDING)


def test_widths_add_in_precision_and_are_infinite_for_ordinary_latents():
    path = lehr.Path(mixed)(Y)
    alpha, sigma = alpha_sigma(0.3)
    widths = path.widths(LATENT, 0.3)
    np.testing.assert_allclose(widths["x"], np.full(2, np.hypot(alpha * P_SCALE.min(), sigma)), rtol=1e-5)
    assert np.all(np.isinf(widths["mix"]))
    squared = lehr.Path(P**4).widths({"x": jnp.asarray(X)}, 0.3)["x"]
    np.testing.assert_allclose(squared, widths["x"] / 2, rtol=1e-5)


# What is wrong is said


@pytest.mark.parametrize("use", ["log_density", "init", "log_start", "widths", "constrain"])
def test_an_unbound_path_says_how_to_bind_it(use):
    arguments = {"init": (jax.random.key(0),), "constrain": (LATENT,)}.get(use, (LATENT, 0.5))
    with pytest.raises(TypeError, match="not bound to data: call it with the model's arguments"):
        getattr(lehr.Path(mixed), use)(*arguments)


def test_a_model_without_a_diffusion_is_refused():
    with pytest.raises(ValueError, match=r"no latent Diffusion site.*Its sample sites are: 'z'"):
        lehr.Path(lambda: numpyro.sample("z", dist.Normal()))()
    with pytest.raises(ValueError, match="no latent Diffusion site"):
        lehr.Path(lambda: numpyro.sample("x", lehr.Diffusion(P), obs=X))()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_arguments_that_are_not_finite_are_refused(bad):
    y = np.array([bad, 1.0])
    with pytest.raises(ValueError, match=r"argument \[0\] holds 1 value that is NaN or infinite.*mask them"):
        lehr.Path(observed())(y)
    with pytest.raises(ValueError, match=r"argument \['y'\] holds 1 value"):
        lehr.Path(observed())(y=jnp.asarray(y))
    with pytest.raises(ValueError, match=r"argument \['y'\]\['a'\]\[0\] holds 1 value"):
        lehr.Path(observed())(y={"a": [float(bad)]})


@pytest.mark.parametrize("value", [np.array([np.nan, np.nan]), jnp.array([np.inf, np.nan]), [float("nan")] * 2])
def test_observations_that_are_not_finite_are_refused(value):
    def model():
        x = numpyro.sample("x", lehr.Diffusion(P))
        for i, y in enumerate(value) if isinstance(value, list) else [(0, value)]:
            numpyro.sample(f"y{i}", dist.Normal(x[0], 1.0), obs=y)

    with pytest.raises(ValueError, match=r"observation at site 'y0' holds . values? that (is|are) NaN or infinite"):
        lehr.Path(model)()


def test_missing_values_may_be_filled_and_masked():
    def model(y, seen):
        x = numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("y", dist.Normal(x, NOISE).mask(seen).to_event(1), obs=y)

    got = levels(lehr.Path(model, Raw())(Y, np.array([True, False])), {"x": X}, [0.3])
    np.testing.assert_allclose(got, diffused(X, P_LOC, P_SCALE, 0.3) + normal(Y[:1], X[:1], NOISE), **ROUNDING)


def test_guidance_for_a_site_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match=r"guidance names the site 'z'.*it has 'y'"):
        lehr.Path(observed(), {"z": Raw()})(Y)
    with pytest.raises(ValueError, match="guidance names the site 'x'"):
        lehr.Path(observed(), {"x": Raw()})(Y)


@pytest.mark.parametrize("wrong", ["raw", Raw, {"y": "raw"}, [Raw()]])
def test_guidance_of_another_kind_is_refused(wrong):
    with pytest.raises(TypeError, match="guidance must be a strategy"):
        lehr.Path(observed(), wrong)


def test_what_is_neither_model_nor_potential_is_refused():
    with pytest.raises(TypeError, match="needs a NumPyro model or a lehr potential; got a int"):
        lehr.Path(3)


def test_a_score_has_no_density_on_the_path():
    with pytest.raises(TypeError, match=r"Path\.log_density needs log densities.*'x' is known through a score only"):
        lehr.Path(ScoreOf(P) * Q).log_density({"x": jnp.asarray(X)}, 0.3)
