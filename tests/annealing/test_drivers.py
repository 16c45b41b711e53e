"""What the drivers refuse, count, and repeat; that they are right is in tests/exact."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from stand_ins import normal_score

import lehr

NORMAL = lehr.Gaussian(jnp.zeros(2), 1.0)
SMALL = {"ladder": 4, "num_warmup": 1, "num_steps": 1, "progress": False}
SCORE = normal_score()


@pytest.mark.parametrize("driver", [lehr.AnnealedMCMC, lehr.AnnealedSMC])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ladder": 0}, "ladder"),
        ({"ladder": 2.5}, "ladder"),
        ({"num_steps": -1}, "num_steps"),
        ({"num_warmup": -1}, "num_warmup"),
    ],
)
def test_counts_that_make_no_sense_are_refused(driver, arguments, message):
    with pytest.raises(ValueError, match=message):
        driver(NORMAL, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"num_chains": 0}, {"num_samples": 0}, {"thinning": 0}, {"num_chains": -3}, {"num_steps": 0}]
)
def test_chains_need_positive_counts(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        lehr.AnnealedMCMC(NORMAL, **arguments)


def test_particles_that_nothing_would_move_are_refused():
    with pytest.raises(ValueError, match="only path weights come with moves of their own"):
        lehr.AnnealedSMC(NORMAL, num_steps=0).run(0)


def seen(y=None):
    x = numpyro.sample("x", lehr.Diffusion(NORMAL))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "args", "given", "expected"),
    [
        (NORMAL * NORMAL, (), {}, (lehr.MALA, 24, 1, 32)),
        (NORMAL * NORMAL, (), {"ladder": 5, "pilot": 8}, (lehr.MALA, 5, 1, 8)),
        (NORMAL * NORMAL, (), {"kernel": lehr.HMC(2), "num_steps": 3}, (lehr.HMC, 24, 3, 32)),
        (NORMAL * NORMAL, (), {"num_warmup": 2}, (lehr.MALA, 24, 1, 0)),
        (NORMAL * SCORE, (), {}, (lehr.HMC, 40, 2, 64)),
        (seen, (np.zeros(2),), {}, (lehr.HMC, 40, 2, 64)),
    ],
)
def test_what_is_left_out_is_chosen_once_the_model_is_seen(model, args, given, expected):
    smc = lehr.AnnealedSMC(model, **given)
    program = smc.prepare(smc.bind(*args))
    plan = program.plan
    assert (type(plan.kernel), len(program.ladder), plan.num_steps, plan.num_pilot) == expected


@pytest.mark.parametrize("arguments", [{"num_particles": 1}, {"threshold": 1.5}, {"threshold": -0.1}])
def test_particles_need_company_and_a_threshold_between_zero_and_one(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        lehr.AnnealedSMC(NORMAL, **arguments)


@pytest.mark.parametrize(
    "make", [lambda: lehr.HMC(step_size=0.0), lambda: lehr.MALA(step_size=-1.0), lambda: lehr.HMC(0)]
)
def test_kernels_refuse_steps_that_do_not_move(make):
    with pytest.raises(ValueError, match=r"step_size|num_integration_steps"):
        make()


def test_weights_refuse_an_unadjusted_kernel():
    with pytest.raises(ValueError, match="ULA leaves it biased"):
        lehr.AnnealedSMC(NORMAL, lehr.ULA())


def test_energy_weights_and_metropolis_refuse_a_score_and_name_the_way_out():
    with pytest.raises(TypeError, match="line-integral"):
        lehr.AnnealedSMC(NORMAL * SCORE, weights="energy", **SMALL).run(0)
    with pytest.raises(TypeError, match="line-integral"):
        lehr.AnnealedMCMC(SCORE, lehr.HMC(), **SMALL).run(0)


def test_a_kernel_must_be_a_kernel_and_a_model_a_model():
    with pytest.raises(TypeError, match=r"lehr\.HMC"):
        lehr.AnnealedMCMC(NORMAL, kernel="hmc")
    with pytest.raises(TypeError, match="NumPyro model"):
        lehr.AnnealedMCMC(3.0)


def test_nothing_can_be_read_before_a_run():
    with pytest.raises(RuntimeError, match="not been run"):
        lehr.AnnealedMCMC(NORMAL).get_samples()


def test_chains_without_weights_have_no_evidence():
    run = lehr.AnnealedMCMC(NORMAL, num_chains=8, num_samples=2, **SMALL).run(0)
    with pytest.raises(AttributeError, match="AnnealedSMC"):
        _ = run.log_evidence


def test_a_score_alone_drives_an_unadjusted_kernel():
    mcmc = lehr.AnnealedMCMC(
        SCORE, lehr.UHMC(step_size=0.3), ladder=4, num_steps=4, num_chains=2000, num_samples=1, progress=False
    )
    mcmc.run(0)
    x = mcmc.get_samples()["x"]
    biased = 1 / (1 - 0.3**2 / 4)  # the stationary variance of leapfrog without a test
    assert np.abs(x.var(0) / biased - 1).max() < 4 * np.sqrt(2 / 2000)
    assert "lp" not in mcmc.last_run.sample_stats


def test_the_evaluations_that_are_reported_are_those_that_are_made():
    calls = []

    class Counting(nnx.Module):
        def __call__(self, z, c):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.zeros(())

    potential = lehr.EnergyNetwork(Counting(), event_shape=(2,))
    smc = lehr.AnnealedSMC(potential, lehr.HMC(3), ladder=5, num_steps=2, num_warmup=1, num_particles=2, progress=False)
    run = smc.run(0)
    jax.effects_barrier()
    assert run.attrs["evaluations_per_chain"] == 5 * (1 + 3 * 3)
    assert len(calls) == run.attrs["evaluations_per_chain"]  # one call for all particles at once


def test_the_same_key_gives_the_same_run_and_another_key_another():
    smc = lehr.AnnealedSMC(NORMAL * NORMAL, num_particles=16, **SMALL)
    first, again, other = (smc.run(jax.random.key(k)).samples["x"] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 0


def test_a_chain_does_not_depend_on_how_many_others_there_are_when_nothing_is_pooled():
    def draws(n):
        mcmc = lehr.AnnealedMCMC(
            NORMAL, lehr.HMC(step_size=0.5), ladder=2, num_warmup=0, num_chains=n, num_samples=1, progress=False
        )
        return mcmc.run(0).samples["x"]

    spread = draws(64)[:32] - draws(32)  # the scale of steps is min(width, spread), pooled: nearly the same
    assert np.median(np.abs(spread)) < 0.2


def test_a_density_that_is_nan_for_some_chains_leaves_the_others_unharmed():
    def model():
        x = numpyro.sample("x", lehr.Diffusion(NORMAL))
        numpyro.factor("hole", jnp.where(x[0] > 1.5, jnp.nan, 0.0))

    mcmc = lehr.AnnealedMCMC(lehr.Path(model, lehr.guidance.Raw()), num_chains=1000, num_samples=1, **SMALL)
    with pytest.warns(UserWarning, match="log density is not finite"):
        run = mcmc.run(0)
    x = run.samples["x"][:, 0, 0]
    assert run.levels["nonfinite"].sum() > 0
    healthy = x[x < 1.5]
    assert len(healthy) > 900
    assert abs(healthy.mean() - (-0.1388)) < 4 / np.sqrt(900)  # E[x | x < 1.5] = −φ(1.5)/Φ(1.5)


def test_resampling_sets_weights_back_and_keeps_the_mean():
    """A weighted mean kept after resampling would count the likelihood twice."""

    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(NORMAL))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    smc = lehr.AnnealedSMC(model, ladder=12, num_warmup=1, num_particles=4000, threshold=1.0, progress=False)
    run = smc.run(0, y=jnp.array([1.0, -1.0]))
    assert run.levels["resampled"].all()
    np.testing.assert_allclose(run.get_samples()["x"].mean(0), [0.5, -0.5], atol=4 * np.sqrt(0.5 / 1000))
    np.testing.assert_allclose(run.get_samples()["x"].var(0), 0.5, atol=4 * 0.5 * np.sqrt(2 / 1000))


def test_the_last_draw_alone_can_be_kept():
    """The same transitions, with the same keys: only less is remembered."""
    make = lambda **keep: lehr.AnnealedMCMC(NORMAL, num_chains=8, num_samples=3, **keep, **SMALL).run(0)  # noqa: E731
    thin, last = make(thinning=2), make(thinning=2, keep="last")
    assert (thin.samples["x"].shape, last.samples["x"].shape) == ((8, 3, 2), (8, 1, 2))
    assert last.attrs["evaluations_per_chain"] == thin.attrs["evaluations_per_chain"]
    assert not np.array_equal(last.samples["x"], thin.samples["x"][:, :1])
    with pytest.raises(ValueError, match="keep must be"):
        lehr.AnnealedMCMC(NORMAL, keep="all")
