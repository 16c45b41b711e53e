"""The run as ArviZ reads it, in either generation."""

from importlib.metadata import version

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import lehr

pytestmark = pytest.mark.seam
NEW = int(version("arviz").split(".")[0]) >= 1


def model(y):
    x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(2), 1.0)))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.deterministic("norm", jnp.sqrt(jnp.sum(x**2)))
    numpyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)


@pytest.fixture(scope="module")
def smc():
    return lehr.AnnealedSMC(model, ladder=5, num_warmup=1, num_particles=40, progress=False).run(
        0, y=jnp.array([1.0, 2.0])
    )


@pytest.fixture(scope="module")
def mcmc():
    mcmc = lehr.AnnealedMCMC(model, ladder=5, num_warmup=1, num_chains=3, num_samples=7, progress=False)
    return mcmc.run(0, y=jnp.array([1.0, 2.0]))


def group(tree, name):
    return tree[name].to_dataset() if NEW else tree[name]


def test_the_object_is_the_one_that_this_arviz_uses(mcmc):
    assert isinstance(mcmc.to_arviz(), xr.DataTree if NEW else az.InferenceData)


def test_draws_levels_and_data_arrive_as_they_are(mcmc):
    tree = mcmc.to_arviz()
    posterior, levels = group(tree, "posterior"), group(tree, "anneal")
    np.testing.assert_array_equal(posterior["x"].transpose("chain", "draw", "x_dim_0"), mcmc.samples["x"])
    np.testing.assert_allclose(posterior["norm"], np.linalg.norm(mcmc.samples["x"], axis=-1), rtol=1e-5)
    assert dict(posterior.sizes) == {"chain": 3, "draw": 7, "x_dim_0": 2}
    assert levels["acceptance_rate"].dims == ("noise_level",)
    np.testing.assert_array_equal(levels["step_size"], mcmc.levels["step_size"])
    np.testing.assert_array_equal(group(tree, "observed_data")["y"], [1.0, 2.0])
    assert set(group(tree, "sample_stats")) == {"lp", "acceptance_rate", "diverging"}


def test_lp_is_the_joint_density_of_the_users_model(mcmc):
    x, sigma = mcmc.samples["x"], mcmc.samples["sigma"]
    y = np.array([1.0, 2.0])
    log_joint = (
        -(x**2).sum(-1) / 2 - np.log(2 * np.pi)
        - sigma**2 / 2 + np.log(2 / np.sqrt(2 * np.pi)) + np.log(sigma)
        - ((y - x) ** 2).sum(-1) / (2 * sigma**2) - 2 * np.log(sigma) - np.log(2 * np.pi)
    )  # fmt: skip
    np.testing.assert_allclose(mcmc.sample_stats["lp"], log_joint, rtol=1e-4, atol=1e-3)


def test_a_weighted_run_keeps_its_weighted_particles_beside_the_equal_ones(smc):
    tree = smc.to_arviz()
    particles = group(tree, "particles")
    assert np.exp(particles["log_weight"]).sum() == pytest.approx(1.0, rel=1e-5)
    kept = {tuple(row) for row in smc.particles["x"].tolist()}
    assert all(tuple(row) in kept for row in smc.get_samples()["x"].tolist())
    assert group(tree, "posterior").attrs["log_evidence"] == pytest.approx(smc.log_evidence)


@pytest.mark.parametrize("which", ["smc", "mcmc"])
def test_netcdf_gives_back_what_was_written(which, request, tmp_path):
    run = request.getfixturevalue(which)
    back = lehr.from_netcdf(run.to_netcdf(tmp_path / "deep" / "run.nc"))
    assert type(back) is type(run.to_arviz())
    for name in ("posterior", "sample_stats", "anneal", "observed_data"):
        xr.testing.assert_equal(group(back, name), group(run.to_arviz(), name))
    assert group(back, "posterior").attrs["inference_library"] == "lehr"


def test_arviz_computes_on_it(mcmc):
    tree = mcmc.to_arviz()
    ess = az.ess(group(tree, "posterior")["sigma"].to_numpy())
    assert np.isfinite(float(ess))
    assert "r_hat" in az.summary(tree, var_names=["sigma"]).columns


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        lehr.from_netcdf(tmp_path / "none.nc")
