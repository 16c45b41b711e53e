import io

import arviz as az
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console
from stand_ins import Flat

import lehr
from lehr.diagnostics.plots import plot_density, plot_ladder, plot_samples
from lehr.diagnostics.summary import summarise

RNG = np.random.default_rng(0)


@pytest.mark.seam
def test_moving_coordinates_are_diagnosed_as_arviz_does():
    draws = RNG.normal(size=(4, 100, 2)).cumsum(1)
    s = summarise(draws)
    np.testing.assert_allclose(s.ess, [float(az.ess(draws[..., i])) for i in range(2)])
    np.testing.assert_allclose(s.r_hat, [float(az.rhat(draws[..., i])) for i in range(2)])
    np.testing.assert_allclose(s.mean, draws.mean((0, 1)))
    assert not s.stuck.any()


def test_a_coordinate_that_never_moved_is_masked_and_counted():
    draws = RNG.normal(size=(4, 100, 3))
    draws[:, :, 1] = 5.0  # ArviZ would report ESS = 400
    draws[:2, :, 2] = 1.0
    s = summarise(draws)
    assert s.stuck.tolist() == [False, True, False]
    assert np.isnan(s.ess[1])
    assert np.isnan(s.r_hat[1])
    assert s.stuck_chains.tolist() == [0, 4, 2]


def text(run):
    out = io.StringIO()
    run.print_summary(Console(file=out, width=120))
    return out.getvalue()


@pytest.fixture(scope="module")
def run(ring, bar):
    return lehr.AnnealedSMC(ring * bar, lehr.HMC(2), 12, num_warmup=1, num_particles=64, progress=False).run(0)


def test_the_summary_says_what_was_sampled_and_what_the_evidence_means(run):
    said = text(run)
    assert f"{run.samples['x'][..., 0].mean():.4g}" in said
    assert f"log evidence {run.log_evidence:.3f}" in said
    assert "absolute" in said
    assert f"{run.attrs['evaluations_per_chain']} gradient evaluations" in said


def test_the_summary_says_when_normalisers_are_unknown(ring):
    unknown = lehr.EnergyNetwork(Flat(), event_shape=(2,))
    run = lehr.AnnealedSMC(ring * unknown, ladder=2, num_warmup=1, num_particles=8, progress=False).run(0)
    assert "relative to the unknown normalisers" in text(run)


def test_the_ladder_plot_draws_the_levels(run):
    figure = plot_ladder(run)
    assert len(figure.axes) == 3
    for ax, name in zip(figure.axes, ("acceptance_rate", "step_size", "ess_weights"), strict=True):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), run.levels[name])
        np.testing.assert_allclose(ax.lines[0].get_xdata(), run.levels["sigma"])


def test_the_density_is_darkest_at_its_modes(ring, run):
    _, ax = plt.subplots()
    plot_samples(run.get_samples()["x"], ring, extent=(-1.0, 1.0, -1.0, 1.0), ax=ax)
    image = ax.images[0].get_array()
    row, column = np.unravel_index(np.argmax(image), image.shape)
    place = np.array([-1 + 2 * column / 239, -1 + 2 * row / 239])
    assert abs(np.linalg.norm(place) - 0.5) < 0.02


def test_only_the_plane_is_drawn():
    with pytest.raises(ValueError, match="plane"):
        plot_density(lehr.Gaussian(jnp.zeros(3)))
