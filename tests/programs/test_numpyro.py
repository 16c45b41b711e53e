"""A model with diffusions is a NumPyro model: Predictive, handlers, log_likelihood and the way back."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive, init_to_median, init_to_sample, init_to_uniform, init_to_value
from numpyro.infer.initialization import init_to_mean
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import initialize_model, log_density
from scipy import stats
from stand_ins import ScoreOf

import lehr

SCHEDULE = lehr.VPCosine()
P = lehr.Gaussian(jnp.array([0.5, -1.0]), jnp.array([0.5, 0.8]), SCHEDULE)
Y = np.array([1.0, 0.2])


def model(y=None):
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.3))
    x = numpyro.sample("x", lehr.Diffusion(P))
    numpyro.deterministic("sum", x.sum())
    with numpyro.plate("pixels", 2):
        numpyro.sample("y", dist.Normal(x, tau), obs=y)


@pytest.fixture(scope="module")
def smc():
    smc = lehr.AnnealedSMC(model, ladder=15, num_warmup=1, num_particles=400, progress=False)
    smc.run(0, Y)
    return smc


@pytest.mark.seam
def test_prior_predictive_draws_exact_priors_at_the_data():
    draws = Predictive(model, num_samples=4000)(jax.random.key(0))
    x = np.asarray(draws["x"])
    assert draws["y"].shape == (4000, 2)
    np.testing.assert_allclose(x.mean(0), [0.5, -1.0], atol=4 * 0.8 / np.sqrt(4000))
    np.testing.assert_allclose(x.std(0), [0.5, 0.8], rtol=4 / np.sqrt(2 * 4000))


def test_prior_predictive_draws_networks_by_reverse_diffusion():
    ring = lehr.load("ring")
    x = np.asarray(
        Predictive(lambda: numpyro.sample("x", lehr.Diffusion(ring)), num_samples=500)(jax.random.key(0))["x"]
    )
    radius = np.hypot(*x.T)
    assert np.mean(np.abs(radius - 0.5) < 0.15) > 0.97  # eight modes of std .03 at radius .5
    angle = np.round(np.arctan2(x[:, 1], x[:, 0]) / (np.pi / 4)).astype(int) % 8
    assert stats.chisquare(np.bincount(angle, minlength=8)).pvalue > 1e-4


@pytest.mark.parametrize("t", [0.0, 0.4])
def test_reverse_draws_have_the_moments_of_their_level(t):
    p = lehr.GaussianMixture(np.array([[-1.0, 0.0], [1.0, 0.5]]), np.array([0.4, 0.3]), np.array([0.3, 0.7]), SCHEDULE)
    n = 4000
    x = np.asarray(lehr.Diffusion(ScoreOf(p), t).sample(jax.random.key(1), (n // 2, 2))).reshape(n, 2)
    m = p.moments(t)
    np.testing.assert_array_less(np.abs(x.mean(0) - m.mean), 4 * np.asarray(m.std) / np.sqrt(n))
    np.testing.assert_allclose(x.std(0), m.std, rtol=0.05)
    if t == 0:
        assert abs(
            np.mean(x[:, 0] > 0) - (0.7 * stats.norm.cdf(1 / 0.3) + 0.3 * stats.norm.sf(1 / 0.4))
        ) < 4 * 0.46 / np.sqrt(n)


def test_products_are_not_drawn_by_reverse_diffusion():
    with pytest.raises(NotImplementedError, match="AnnealedSMC"):
        lehr.Diffusion(lehr.load("ring") * lehr.load("bar")).sample(jax.random.key(0))


@pytest.mark.seam
def test_a_runs_samples_go_back_into_numpyro_as_they_are(smc):
    samples = smc.get_samples()
    predicted = Predictive(model, samples)(jax.random.key(1))
    assert predicted["y"].shape == (400, 2)
    np.testing.assert_allclose(predicted["sum"], samples["sum"], rtol=1e-6)
    away = (np.asarray(predicted["y"]) - samples["x"]) / samples["tau"][:, None]
    np.testing.assert_allclose(away.std(), 1.0, rtol=4 / np.sqrt(2 * 800))
    own = numpyro.infer.log_likelihood(model, samples, Y)["y"]
    np.testing.assert_allclose(smc.last_run.log_likelihood()["y"].reshape(-1, 2), own, rtol=1e-5)


@pytest.mark.seam
@pytest.mark.filterwarnings("ignore::UserWarning")  # loo on so few draws may warn of its own shape parameter
def test_groups_reach_arviz_and_loo_works(smc):
    prior = Predictive(model, num_samples=100)(jax.random.key(0))
    predicted = Predictive(model, smc.get_samples())(jax.random.key(1))
    tree = smc.to_arviz(prior=prior, posterior_predictive={"y": predicted["y"]}, log_likelihood=True)
    assert tree["prior"]["x"].shape == (1, 100, 2)
    assert tree["posterior_predictive"]["y"].shape == (4, 100, 2)
    want = stats.norm(smc.last_run.samples["x"], smc.last_run.samples["tau"][..., None]).logpdf(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], want, rtol=1e-4, atol=1e-4)
    loo = az.loo(tree)
    # leaving one of two out costs: below the log density of both given both, above that of neither
    lppd = np.log(np.mean(np.exp(want), (0, 1))).sum()
    assert lppd - 3 < float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd) < lppd
    with pytest.raises(ValueError, match="one value for each posterior draw"):
        smc.to_arviz(posterior_predictive={"y": np.zeros((7, 2))})


@pytest.mark.seam
def test_do_and_reparam_meet_a_path_as_they_meet_numpyro():
    position = {"x": jnp.array([0.1, 0.2]), "tau": jnp.array(-0.7)}
    done = lehr.Path(handlers.do(model, data={"tau": jnp.array(0.4)}))(Y)
    want = P.log_density(position["x"], 0.3) + stats.norm(P.denoise(position["x"], 0.3), 0.4).logpdf(Y).sum()
    want += stats.norm(-1.0, 0.3).logpdf(-0.7)  # as in NumPyro, the site itself is still drawn, and nothing heeds it
    np.testing.assert_allclose(done.log_density(position, 0.3), want, rtol=1e-5)
    with pytest.raises(KeyError, match="no value for the latent site 'tau'"):
        done.log_density({"x": position["x"]}, 0.3)

    def centred(y):
        tau = numpyro.sample("tau", dist.Normal(-1.0, 0.3))
        x = numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("y", dist.Normal(x, jnp.exp(tau)).to_event(1), obs=y)

    turned = handlers.reparam(centred, config={"tau": LocScaleReparam(0)})
    path = lehr.Path(turned)(Y)
    assert path.latent_sites == ("tau_decentered",)
    at = {"x": position["x"], "tau_decentered": jnp.array(1.0)}
    want = P.log_density(at["x"], 0.3) + stats.norm(0, 1).logpdf(1.0)
    want += stats.norm(P.denoise(at["x"], 0.3), np.exp(-0.7)).logpdf(Y).sum()
    np.testing.assert_allclose(path.log_density(at, 0.3), want, rtol=1e-5)


@pytest.mark.seam
@pytest.mark.parametrize(
    "strategy",
    [init_to_uniform, init_to_sample, init_to_median, init_to_mean, init_to_value(values={"x": jnp.zeros(2)})],
    ids=["uniform", "sample", "median", "mean", "value"],
)
def test_every_initialisation_of_numpyro_finds_a_start(strategy):
    at_level = lehr.noise_level(model, 0.1)
    info = initialize_model(jax.random.key(0), at_level, init_strategy=strategy, model_args=(Y,))
    assert np.isfinite(info.potential_fn(info.param_info.z))


@pytest.mark.seam
def test_a_model_is_rendered():
    pytest.importorskip("graphviz")
    source = numpyro.render_model(model, model_args=(Y,)).source
    assert "x -> y" in source


def test_log_density_at_a_level_of_a_run_is_the_paths(smc):
    t = float(smc.last_run.levels["t"][-1])
    x, tau = (smc.last_run.samples[k][0, 0] for k in ("x", "tau"))
    theirs, _ = log_density(lehr.noise_level(model, t), (Y,), {}, {"x": x, "tau": tau})
    ours = smc.last_run.sample_stats["lp"][0, 0] - np.log(tau)  # the Jacobian of tau = exp(u)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
