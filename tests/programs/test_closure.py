"""A model without its data: which programs are equal, what they compute, and that they are compiled once."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

import lehr
from lehr.networks.mlp import ResidualMLP
from lehr.programs.closure import close
from lehr.programs.guidance import Raw, Tweedie

X = jnp.array([0.3, -0.4])


def network(seed: int, kind=lehr.EnergyNetwork, std: float = 1.0) -> lehr.Potential:
    outputs = 0 if kind is lehr.EnergyNetwork else 2
    module = ResidualMLP(2, outputs, width=8, num_blocks=1, num_frequencies=4, rngs=nnx.Rngs(seed))
    kernel = module.readout.kernel  # starts at zero, where all networks are one
    kernel[...] = 0.3 * jax.random.normal(jax.random.key(seed), kernel.shape)
    return kind(module, lehr.VPCosine(), (2,), std=std)


def program(prior, a, tau, guidance=None, family=dist.Normal, power=1):
    """A freshly made model that closes over all that it is given."""

    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, tau))
        x = numpyro.sample("x", lehr.Diffusion(prior * lehr.Gaussian(a[0], tau)))
        numpyro.sample("expert", lehr.Diffusion(lehr.Gaussian(a[1, :1], 1.0)), obs=x[:1])
        numpyro.sample("y", family(a @ x**power, scale).to_event(1), obs=y)

    return lehr.Path(model, guidance)


ONE = {"prior": network(0) ** 1.5, "a": jnp.eye(2), "tau": jnp.array(0.5)}
TWO = {"prior": network(1, std=1.3) ** 0.7, "a": jnp.array([[1.0, 2.0], [0.5, -1.0]]), "tau": jnp.array(0.8)}
DATA = jnp.ones(2), jnp.array([0.2, 3.0])


def first(**changes) -> lehr.Path:
    return program(**(ONE | changes))(DATA[0])


def second(**changes) -> lehr.Path:
    """The same structure with other network parameters, exponent, operator, scales and data."""
    return program(**(TWO | changes))(DATA[1])


def value_and_gradient(structure, constants, position, t):
    return jax.value_and_grad(structure.log_density, 1)(constants, position, t)


def assert_equal(got, want):
    # the same operations in another order of fusion: float32 rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


# Which structures are equal


def test_data_weights_exponents_and_parameters_are_not_structure():
    one, two = close(first())[0], close(second())[0]
    assert one == two
    assert hash(one) == hash(two)
    assert one != "another thing"


@pytest.mark.parametrize(
    "change",
    [
        {"family": dist.Cauchy},
        {"guidance": Raw()},
        {"power": 2},
        {"prior": lehr.Gaussian(jnp.zeros(2)) ** 1.5},
        {"prior": network(0) * network(1)},
        {"prior": lehr.with_schedule(network(0), lehr.VPLinear()) ** 1.5},
    ],
    ids=["likelihood", "guidance", "integer", "potential", "factors", "schedule"],
)
def test_another_computation_is_another_structure(change):
    assert close(first(**change))[0] != close(second())[0]


def test_guidance_is_structure_by_value():
    assert close(first(guidance=Tweedie()))[0] == close(second(guidance=None))[0]


def test_an_integer_argument_is_structure_and_a_float_is_data():
    def model(y, n):
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(2))))
        numpyro.sample("y", dist.Normal(n * x, 1.0).to_event(1), obs=y)

    def structure(n):
        return close(lehr.Path(model)(jnp.ones(2), n))[0]

    assert structure(2) != structure(3)
    assert structure(2.0) == structure(3.0)


def likelihood_by(forward) -> lehr.Path:
    def model(y):
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(2))))
        numpyro.sample("y", dist.Normal(forward(x), 1.0).to_event(1), obs=y)

    return lehr.Path(model, Raw())(jnp.ones(2))


def with_derivative(forward, derivative) -> lehr.Path:
    function = jax.custom_jvp(forward)
    function.defjvp(lambda primals, tangents: (forward(*primals), derivative(*primals, *tangents)))
    return likelihood_by(function)


def test_the_same_values_with_another_derivative_are_another_structure():
    one, same, other = (
        close(with_derivative(lambda x: 2 * x, derivative))
        for derivative in (lambda x, v: 2 * v, lambda x, v: 2 * v, lambda x, v: 3 * v)
    )
    position = {"x": X}
    assert one[0] == same[0]
    assert one[0].log_density(one[1], position, 0.3) == other[0].log_density(other[1], position, 0.3)
    assert one[0] != other[0]


def test_arrays_inside_a_derivative_rule_are_never_taken_for_anothers():
    def path(a):
        return with_derivative(lambda x: x, lambda x, v: a @ v)

    a, b = jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    assert close(path(a))[0] == close(path(a))[0]
    assert close(path(a))[0] != close(path(b))[0]


def test_arrays_inside_a_jitted_function_are_never_taken_for_anothers():
    def path(a):
        return likelihood_by(jax.jit(lambda x: a @ x))

    a, b = jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    assert close(path(a))[0] == close(path(a))[0]
    assert close(path(a))[0] != close(path(b))[0]


def test_a_callback_is_structure_by_identity():
    def path(function):
        def forward(x):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return x + jax.lax.stop_gradient(jax.pure_callback(function, shape, jax.lax.stop_gradient(x)))

        return likelihood_by(forward)

    def make(a):
        return lambda x: np.asarray(a * x)

    double, triple = make(2), make(3)
    assert close(path(double))[0] == close(path(double))[0]
    assert close(path(double))[0] != close(path(triple))[0]


# What they compute


def test_one_structure_computes_the_density_of_every_path_like_it():
    structure, others = close(first())
    path = second()
    _, constants = close(path)
    key, t = jax.random.key(3), jnp.array(0.4)

    @jax.jit
    def computed(constants, position):
        start = structure.init(constants, key, t), structure.log_start(constants, position, t)
        return start, structure.widths(constants, position, t), value_and_gradient(structure, constants, position, t)

    @jax.jit
    def wanted(position):
        start = path.init(key, t), path.log_start(position, t)
        return start, path.widths(position, t), jax.value_and_grad(path.surrogate)(position, t)

    position = {"scale": jnp.array(0.2), "x": X}
    got = computed(constants, position)
    assert_equal(got, wanted(position))
    assert abs(got[2][0] - computed(others, position)[2][0]) > 1  # the data do matter


def test_the_level_and_the_parameters_of_a_score_are_arguments_too():
    structure, _ = close(lehr.Path(network(0, lehr.ScoreNetwork)))
    potential = network(1, lehr.ScoreNetwork)
    same, constants = close(lehr.Path(potential))
    assert structure == same
    for t in (0.3, 0.7):
        _, gradient = jax.jit(value_and_gradient, static_argnums=0)(structure, constants, {"x": X}, jnp.array(t))
        assert_equal(gradient["x"], potential.score(X, t))


# Compiled once

EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: EVENTS.append(event))


@contextmanager
def compilations():
    """The compilations while it is open, as a list that is complete when it closes."""
    found: list[str] = []
    start = len(EVENTS)
    yield found
    found += [event for event in EVENTS[start:] if event == "/jax/core/compile/backend_compile_duration"]


def smc(path, **settings) -> lehr.AnnealedSMC:
    given = {"ladder": 4, "num_particles": 16, "num_steps": 1, "num_warmup": 1, "progress": False} | settings
    return lehr.AnnealedSMC(path, lehr.HMC(num_integration_steps=2), **given)


@pytest.fixture(scope="module")
def warm() -> lehr.AnnealedSMC:
    """A sampler that has run once."""
    sampler = smc(program(**ONE))
    with compilations() as found:
        sampler.run(0, DATA[0])
    assert len(found) > 0  # the counter counts
    return sampler


def test_other_data_and_seeds_compile_nothing(warm):
    with compilations() as found:
        runs = [warm.run(seed, y) for seed, y in ((1, DATA[0]), (1, DATA[1]), (2, -DATA[1]))]
    assert len(found) == 0
    assert len({run.log_evidence for run in runs}) == 3


def test_a_new_closure_with_other_weights_exponents_and_parameters_compiles_nothing(warm):
    fresh = smc(program(**TWO))
    with compilations() as found:
        fresh.run(1, DATA[1])
    assert len(found) == 0
    assert fresh.log_evidence != warm.run(1, DATA[1]).log_evidence


def test_other_levels_and_another_threshold_compile_nothing(warm):
    fresh = smc(program(**ONE), ladder=lehr.Ladder([0.8, 0.5, 0.2, 0.05]), threshold=0.9)
    with compilations() as found:
        fresh.run(0, DATA[0])
    assert len(found) == 0
