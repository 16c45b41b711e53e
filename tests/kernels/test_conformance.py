"""Every kernel on every kind of potential, against moments by quadrature over the plane."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree

import lehr
from lehr.kernels.line_integral import PartlyKnown

N = 1000
T = 0.15  # between the ends: the model's likelihood reads an estimate of x
BLOB = lehr.GaussianMixture([[-0.8, 0.0], [0.8, 0.5]], 0.6, [0.3, 0.7])
WIDE = lehr.Gaussian([0.5, 0.0], [[1.0, 0.0], [0.6, 0.7]])
LINE = lehr.GaussianMixture([[-0.7], [0.7]], 0.5, [0.4, 0.6])
Y = jnp.array([0.9])


def model(y):
    x = numpyro.sample("x", lehr.Diffusion(LINE))
    sigma = numpyro.sample("sigma", dist.LogNormal(-0.3, 0.3))
    numpyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)


KINDS = {
    "exact": lambda: lehr.Path(BLOB),
    "network": lambda: lehr.Path(lehr.load("ring")),
    "product": lambda: lehr.Path(WIDE * BLOB**0.5),
    "mixture": lambda: lehr.Path(lehr.Mixture([WIDE, BLOB], [0.6, 0.4])),
    "model": lambda: lehr.Path(model)(Y),
}
EXACT = [lehr.HMC(3), lehr.MALA(), lehr.NUTS(3), lehr.GHMC(2)]
INTEGRATED = [replace(k, metropolis="line-integral", integrate_energies=True) for k in EXACT]
ADJUSTED = [*EXACT, lehr.Barker(), *INTEGRATED]
UNADJUSTED = [lehr.UHMC(3), lehr.ULA(), lehr.MCLMC()]
CLOSED_FORMS = ("exact", "mixture")  # whose moments the potential knows


def name(kernel):
    return type(kernel).__name__ + "-by-line-integral" * kernel.integrates_score


@functools.cache
def on_the_plane(kind, t, ends=False):
    """Path, draws to within a cell, and a function that gives E and sd of functions of the flat position."""
    path = KINDS[kind]().ending_at(t if ends else 0.0)
    template = jax.eval_shape(path.init, jax.random.key(0))
    _, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape), template))
    axis, step = np.linspace(-5, 5, 201, retstep=True)
    q = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), float)
    log_p, score = jax.jit(jax.vmap(jax.value_and_grad(lambda q: path.log_density(unravel(q), t))))(q)
    p = np.exp(np.asarray(log_p, np.float64) - float(log_p.max()))
    p /= p.sum()
    scale = 1 / np.sqrt(p @ np.asarray(score, np.float64) ** 2)  # Fisher's: the average curvature is then one
    rng = np.random.default_rng(0)
    start = np.asarray(q)[rng.choice(len(q), N, p=p)] + rng.uniform(-step / 2, step / 2, (N, 2))

    def expect(f):
        values = np.asarray(f(q), np.float64)
        mean = p @ values
        return mean, np.sqrt(p @ (values - mean) ** 2)

    return path, unravel, jnp.asarray(start, float), jnp.asarray(scale, float), expect


def powers(q):
    return np.stack([q[:, 0], q[:, 1], q[:, 0] ** 2, q[:, 0] * q[:, 1], q[:, 1] ** 2], -1)


@functools.cache
def compiled(kernel, num_steps):
    """One program for all kinds: which of them is an argument, so that the kernel is compiled once."""
    paths = [on_the_plane(kind, T)[:2] for kind in KINDS]
    paths = [(path.as_scores() if kernel.integrates_score else path, unravel) for path, unravel in paths]
    known = [lambda q, p=p, u=u: p.surrogate(u(q), T) for p, u in paths]
    unknown = [lambda q, p=p, u=u: p.unknown(u(q), T) for p, u in paths]
    step = kernel.build()

    def chain(key, q, kind, scale, epsilon):
        target = lambda q: jax.lax.switch(kind, known, q)  # noqa: E731
        if kernel.integrates_score:
            target = PartlyKnown(target, lambda q: jax.lax.switch(kind, unknown, q))
        move = lambda s, k: step(k, s, target, epsilon, scale**2)  # noqa: E731
        state = kernel.init(key, q, target)
        state, stats = jax.lax.scan(move, state, jax.random.split(jax.random.fold_in(key, 1), num_steps))
        return state.position, stats

    return jax.jit(jax.vmap(chain, (0, 0, None, None, None)))


def transitions(kernel, kind, epsilon, num_steps):
    _, _, start, scale, _ = on_the_plane(kind, T)
    keys = jax.random.split(jax.random.key(1), N)
    q, stats = compiled(kernel, num_steps)(keys, start, list(KINDS).index(kind), scale, jnp.asarray(epsilon))
    return np.asarray(q), stats


@pytest.mark.parametrize("kind", CLOSED_FORMS)
def test_the_quadrature_agrees_with_closed_forms(kind):
    path, *_, expect = on_the_plane(kind, T)
    mean, std = expect(np.asarray)
    means, stds = path.moments({"x": jnp.zeros(2)}, T)
    np.testing.assert_allclose(mean, means["x"], atol=1e-4)
    np.testing.assert_allclose(std, stds["x"], rtol=1e-4)


@pytest.mark.parametrize("kernel", [lehr.Barker(), lehr.GHMC(2), lehr.NUTS(3), lehr.MCLMC()], ids=name)
def test_steps_are_in_units_of_the_scale(kernel):
    """Stretching a target and its scale together stretches the chain and changes nothing else."""
    step = kernel.build()

    @jax.jit
    def end(stretch):
        target = lambda q: BLOB.log_density(q / stretch, T)  # noqa: E731
        state = kernel.init(jax.random.key(0), 0.3 * stretch, target)
        move = lambda s, k: step(k, s, target, jnp.asarray(0.3), stretch**2)  # noqa: E731
        state, _ = jax.lax.scan(move, state, jax.random.split(jax.random.key(2), 4))
        return state.position / stretch

    np.testing.assert_allclose(end(jnp.array([8.0, 0.125])), end(jnp.ones(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ADJUSTED, ids=name)
def test_adjusted_kernels_leave_every_kind_of_target_as_it_is(kernel, kind):
    q, stats = transitions(kernel, kind, 1.0, 8)
    _, _, start, scale, expect = on_the_plane(kind, T)
    mean, std = expect(powers)
    assert np.all(np.abs(powers(q).mean(0) - mean) < 4 * std / np.sqrt(N))
    assert np.all(((q - np.asarray(start)) ** 2).mean(0) > np.asarray(scale) ** 2)  # it has moved
    assert 0.4 < float(stats.acceptance_rate.mean()) < 0.98
    assert not stats.is_divergent.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", UNADJUSTED, ids=name)
def test_unadjusted_kernels_are_biased_by_no_more_than_their_step(kernel, kind):
    """Leapfrog's relative bias at unit curvature is 1/(1 − ε²/4) − 1: twice that, for curvature that varies."""
    epsilon = 0.5
    q, stats = transitions(kernel, kind, epsilon, 12)
    _, _, start, scale, expect = on_the_plane(kind, T)
    mean, std = expect(powers)
    bias = 2 * (1 / (1 - epsilon**2 / 4) - 1)
    assert np.all(np.abs(powers(q).mean(0) - mean) < (bias + 4 / np.sqrt(N)) * std)
    assert np.all(((q - np.asarray(start)) ** 2).mean(0) > np.asarray(scale) ** 2)
    assert not stats.is_divergent.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (lehr.HMC(), "network"),
        (lehr.NUTS(3), "product"),
        (lehr.Barker(), "mixture"),
        (INTEGRATED[3], "model"),
    ],
    ids=lambda v: v if isinstance(v, str) else name(v),
)
def test_adjusted_kernels_come_down_a_ladder_to_the_right_moments(kernel, kind):
    q, levels, expect = descend(kernel, kind)
    mean, std = expect(powers)
    assert np.all(np.abs(powers(q).mean(0) - mean) < 4 * std / np.sqrt(N))
    assert np.abs(levels["acceptance_rate"][-3:] - kernel.target_acceptance).max() < 0.15
    assert levels["diverging"].sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "kind"),
    [(lehr.ULA(), "product"), (lehr.MCLMC(), "exact")],
    ids=lambda v: v if isinstance(v, str) else name(v),
)
def test_unadjusted_kernels_come_down_a_ladder_to_within_their_bias(kernel, kind):
    q, levels, expect = descend(kernel, kind)
    mean, std = expect(powers)
    epsilon = levels["step_size"][-1]  # in units of the widths, which no curvature is much above
    assert np.all(np.abs(powers(q).mean(0) - mean) < (epsilon**2 / 2 + 4 / np.sqrt(N)) * std)
    assert np.abs(levels["acceptance_rate"][-3:] - kernel.target_acceptance).max() < 0.15


def descend(kernel, kind):
    """Flat unconstrained positions at the end of a short ladder, statistics by level, expectations there."""
    path, *_, expect = on_the_plane(kind, T, ends=True)
    ladder = lehr.Ladder.log_snr(path.schedule, 12, t_min=T)
    run = lehr.AnnealedMCMC(path, kernel, ladder, 4, num_warmup=1, num_chains=N, num_samples=1, progress=False).run(0)
    x = run.samples["x"][:, 0]
    q = np.concatenate([np.log(run.samples["sigma"]), x], -1) if kind == "model" else x
    assert np.isfinite(q).all()
    return q, run.levels, expect
