"""Evidence against closed forms: whatever the factors' normalisers, and between rival operators and priors."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import integrate, stats

import lehr

SCHEDULE = lehr.VPCosine()
Y, S = np.array([0.8, -0.3]), 0.5
P, Q = lehr.Gaussian(jnp.zeros(2), 1.0, SCHEDULE), lehr.Gaussian(jnp.ones(2), 0.5, SCHEDULE)


def looking(prior, operator):
    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(prior))
        numpyro.sample("y", dist.Normal(jnp.asarray(operator) @ x, S).to_event(1), obs=y)

    return lehr.AnnealedSMC(model, ladder=20, num_particles=500, progress=False)


@pytest.mark.slow
def test_a_products_own_normaliser_is_taken_away():
    # x under P·Q is N(.8, .2) in each coordinate
    want = stats.norm(0.8, np.sqrt(0.2 + S**2)).logpdf(Y).sum()
    found = lehr.evidence(looking(P * Q, np.eye(2)), 0, y=Y, num_islands=4)
    assert found.prior.shape == found.posterior.shape == (4,)
    log_z = stats.norm(0, np.sqrt(1.25)).logpdf(1.0) * 2
    assert abs(np.mean(found.prior) - log_z) < 5 * np.std(found.prior) / 2 + 0.005
    # t with some 5 degrees of freedom: beyond 6 standard errors in 1 of 500; the last level blurs by .005 nats
    assert abs(found.log_evidence - want) < 6 * found.standard_error + 0.005
    assert 0.001 < found.standard_error < 0.2


@pytest.mark.slow
def test_one_normalised_model_needs_no_second_integral_and_two_operators_compare():
    turned = np.array([[0.0, 1.0], [1.0, 0.0]])
    prior = lehr.Gaussian(jnp.array([1.0, -1.0]), 0.4, SCHEDULE)
    upright, turned = (lehr.evidence(looking(prior, a), 0, y=Y, num_islands=3) for a in (np.eye(2), turned))
    np.testing.assert_array_equal(upright.prior, [0.0])
    own, other = (stats.norm(m, np.hypot(0.4, S)).logpdf(Y).sum() for m in ([1, -1], [-1, 1]))
    factor = upright - turned
    assert abs(factor.value - (own - other)) < 8 * factor.standard_error + 0.005
    np.testing.assert_allclose(factor.standard_error, np.hypot(upright.standard_error, turned.standard_error))


def test_models_without_data_have_no_evidence():
    with pytest.raises(TypeError, match="no data"):
        lehr.evidence(P, 0)

    def expert_only():
        x = numpyro.sample("x", lehr.Diffusion(P))
        numpyro.sample("e", lehr.Diffusion(Q), obs=x)

    with pytest.raises(ValueError, match="no observed site"):
        lehr.evidence(expert_only, 0)
    with pytest.raises(ValueError, match="num_islands"):
        lehr.evidence(looking(P, np.eye(2)), 0, y=Y, num_islands=1)


@pytest.mark.slow
def test_evidence_of_an_unknown_scale_is_that_of_quadrature():
    y = np.array([0.3, -1.2, 0.7, 0.1])

    def model(y):
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(4), 0.5, SCHEDULE)))
        numpyro.sample("y", dist.Normal(x, tau).to_event(1), obs=y)

    def joint(tau):
        return np.exp(stats.norm(0, np.hypot(0.5, tau)).logpdf(y).sum()) * stats.halfnorm.pdf(tau)

    want = np.log(integrate.quad(joint, 0, 8, epsabs=1e-12)[0])
    found = lehr.evidence(model, 1, y=y, num_islands=8)
    assert abs(found.log_evidence - want) < 4 * found.standard_error + 0.01
