"""Ranks of simulation-based calibration: uniform for the right posterior, caught for a wrong one."""

import types

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import lehr

SCHEDULE = lehr.VPCosine()
GAUSSIAN = lehr.Gaussian(jnp.array([0.3, -0.5]), 0.8, SCHEDULE)
MIXTURE = lehr.GaussianMixture(
    np.array([[-1.0, 0.0], [1.0, 0.5]]), np.array([0.4, 0.3]), np.array([0.3, 0.7]), SCHEDULE
)
S = 0.5


def looking(prior, scale=S):
    def model(y=None):
        x = numpyro.sample("x", lehr.Diffusion(prior))
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    return model


class Conjugate(lehr.AnnealedMCMC):
    """Draws of the exact posterior of ``looking(GAUSSIAN)``, as wide as it is told."""

    def __init__(self, model, width=1.0):
        super().__init__(model, num_samples=1, progress=False)
        self.width = width

    def run(self, rng_key, *args, **kwargs):
        y = self.path.observations["y"]
        precision = 1 / 0.8**2 + 1 / S**2
        mean = (jnp.array([0.3, -0.5]) / 0.8**2 + y / S**2) / precision
        x = mean + self.width * precision**-0.5 * jax.random.normal(rng_key, (400, 2))
        return types.SimpleNamespace(log_weights=None, cautions=[], get_samples=lambda: {"x": np.asarray(x)})


def test_ranks_of_the_exact_posterior_are_uniform():
    found = lehr.sbc(Conjugate(looking(GAUSSIAN)), num_simulations=320, rng_key=1)
    assert set(found.ranks) == {"x[0]", "x[1]"}
    ranks = found.ranks["x[0]"]
    assert ranks.shape == (320,)
    assert ranks.min() >= 0
    assert ranks.max() <= 63
    assert found.is_uniform(0.01)
    # the mean of 320 uniform ranks has a standard error of 63 √(1/12)/√320
    assert abs(ranks.mean() / 63 - 0.5) < 4 / np.sqrt(12 * 320)


@pytest.mark.parametrize(("width", "outer"), [(0.6, "more"), (1.6, "less")])
def test_a_posterior_of_the_wrong_width_is_caught(width, outer):
    found = lehr.sbc(Conjugate(looking(GAUSSIAN), width), num_simulations=320)
    assert not found.is_uniform(0.01)
    share = np.mean((found.ranks["x[0]"] < 8) | (found.ranks["x[0]"] >= 56))
    assert share > 0.32 if outer == "more" else share < 0.18  # .25 ± .024 if uniform


def test_simulations_may_come_from_another_model_or_from_draws():
    broken = lehr.sbc(Conjugate(looking(GAUSSIAN)), looking(GAUSSIAN, 1.5 * S), num_simulations=320)
    assert not broken.is_uniform(0.01)
    x = np.asarray(GAUSSIAN.sample(jax.random.key(3), 0.0, (320,)))
    given = lehr.sbc(Conjugate(looking(GAUSSIAN)), {"x": x}, num_simulations=320)
    assert given.is_uniform(0.01)


class Anew(lehr.AnnealedSMC):
    """Binds and traces its model for each data set."""

    def run(self, rng_key, *args, **kwargs):
        return super().run(rng_key, *args, **kwargs)


def unknown_scale(y=None):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(4), 0.7, SCHEDULE)))
    numpyro.sample("y", dist.Normal(x, tau + 0.1).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore:(.* are to be doubted|at level)")  # three levels are few, and enough to compare
@pytest.mark.parametrize("model", [unknown_scale, pytest.param(looking(GAUSSIAN), marks=pytest.mark.slow)])
def test_data_that_change_places_in_one_program_give_what_new_programs_give(model):
    how = {"ladder": 3, "num_steps": 1, "num_particles": 64, "pilot": 0, "progress": False}
    one, each = (lehr.sbc(kind(model, **how), num_simulations=16) for kind in (lehr.AnnealedSMC, Anew))
    for name, ranks in one.ranks.items():
        np.testing.assert_array_equal(ranks, each.ranks[name])


class Doubtful(Conjugate):
    """The same draws, with a caution of every ``every``-th run."""

    every, count = 64, 0

    def run(self, rng_key, *args, **kwargs):
        run = super().run(rng_key, *args, **kwargs)
        run.cautions = ["too few"] if Doubtful.count % Doubtful.every == 0 else []
        Doubtful.count += 1
        return run


def test_runs_to_be_doubted_are_told_of_once_if_they_are_many(monkeypatch):
    with pytest.warns(UserWarning, match="^2 of 128 runs are to be doubted; one: too few$") as said:
        lehr.sbc(Doubtful(looking(GAUSSIAN)), num_simulations=128)
    assert len(said) == 1
    monkeypatch.setattr(Doubtful, "every", 128)
    lehr.sbc(Doubtful(looking(GAUSSIAN)), num_simulations=128)  # a warning is an error here


def test_own_quantities_are_ranked():
    found = lehr.sbc(
        Conjugate(looking(GAUSSIAN)), num_simulations=64, quantities={"product": lambda s: s["x"][0] * s["x"][1]}
    )
    assert list(found.ranks) == ["product"]
    assert found.is_uniform(0.001)


def test_the_picture_has_one_panel_a_quantity_and_the_table_a_row(capsys):
    found = lehr.Calibration({"a": np.arange(64), "b": np.zeros(64, int)}, 63)
    figure = found.plot()
    assert [axis.get_title().split()[0] for axis in figure.axes] == ["a", "b"]
    heights = [patch.get_height() for patch in figure.axes[0].patches if patch.get_width() < 0.5]
    assert heights[-16:] == [4.0] * 16
    plt.close(figure)
    found.print_summary()
    out = capsys.readouterr().out
    assert "a" in out
    assert "0.500" in out
    assert found.pvalues["a"] == 1.0
    assert not found.is_uniform()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_draws": 50}, "multiple of 16"),
        ({"num_simulations": 3}, "num_simulations"),
        ({"data": "z"}, "data must name sites"),
        ({"prior": {"x": np.zeros((5, 2))}}, "has 5 draws"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lehr.sbc(Conjugate(looking(GAUSSIAN)), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    # Under Tweedie a scale near zero explains nothing of a noisy x: of 256 particles too few come back to it.
    [looking(GAUSSIAN), looking(MIXTURE), lehr.Path(unknown_scale, lehr.guidance.MomentMatching())],
    ids=["gaussian", "mixture", "scale"],
)
def test_annealed_smc_is_calibrated(path):
    smc = lehr.AnnealedSMC(path, ladder=20, num_particles=256, progress=False)
    assert lehr.sbc(smc, num_simulations=512).is_uniform(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("prior", "s"), [(GAUSSIAN, 0.25), (MIXTURE, 0.1)], ids=["gaussian", "mixture"])
def test_a_likelihood_of_the_wrong_scale_is_caught(prior, s):
    # Under a prior of variance P the posterior has the sd √(P s'²/(P + s'²)), s' = 1.5 s, and the truth is off its
    # mean by √((1 − g)² P + g² s²), g = P/(P + s'²): too wide by 1.34 at least, which puts .12 in place of .25 into
    # the outer eighths, where 512 simulations have a standard error of .019.
    smc = lehr.AnnealedSMC(looking(prior, 1.5 * s), ladder=20, num_particles=256, progress=False)
    assert not lehr.sbc(smc, looking(prior, s), num_simulations=512).is_uniform(0.01)
