"""GHMC: what the turn of the momentum on rejection is for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr

N, STEPS, DISCARDED = 2000, 400, 100
EPSILON, L, DAMPING = 1.6, 3, 0.9


def log_density(x):
    return -jnp.sum(x**2) / 2


def estimate(squares):
    """E[x²] and its standard error, from (chains, draws): chains are independent, draws are not."""
    means = np.asarray(squares).mean(1)
    return means.mean(), means.std() / np.sqrt(len(means))


def run(kernel, epsilon=EPSILON):
    """x² along independent chains from exact draws of N(0, 1), and the acceptance rates."""
    step = kernel.build()

    def chain(key):
        key_start, key_init, key_steps = jax.random.split(key, 3)
        state = kernel.init(key_init, jax.random.normal(key_start, (1,)), log_density)

        def move(state, key):
            state, stats = step(key, state, log_density, jnp.asarray(epsilon), jnp.ones(1))
            return state, (state.position[0] ** 2, stats.acceptance_rate)

        return jax.lax.scan(move, state, jax.random.split(key_steps, STEPS))[1]

    return jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), N))


def without_the_turn(key):
    """The same moves for N(0, 1), but a rejected chain goes on in its direction."""
    key_start, key_steps = jax.random.split(key)

    def move(state, key):
        x, p = state
        key_noise, key_test = jax.random.split(key)
        p = DAMPING * p + jnp.sqrt(1 - DAMPING**2) * jax.random.normal(key_noise)
        y, r = x, p
        for _ in range(L):
            r -= EPSILON / 2 * y
            y += EPSILON * r
            r -= EPSILON / 2 * y
        log_ratio = (x**2 + p**2 - y**2 - r**2) / 2
        accepted = jnp.log(jax.random.uniform(key_test)) < log_ratio
        x, p = jnp.where(accepted, y, x), jnp.where(accepted, r, p)
        return (x, p), x**2

    return jax.lax.scan(move, tuple(jax.random.normal(key_start, (2,))), jax.random.split(key_steps, STEPS))[1]


def test_turning_rejected_chains_round_keeps_the_variance():
    squares, acceptance = run(lehr.GHMC(L, DAMPING))
    mean, error = estimate(squares)
    assert error < 0.01
    assert abs(mean - 1) < 3 * error
    assert 0.3 < float(acceptance.mean()) < 0.9  # many are rejected


def test_without_the_turn_the_variance_comes_out_wrong():
    squares = jax.jit(jax.vmap(without_the_turn))(jax.random.split(jax.random.key(0), N))
    mean, error = estimate(squares[:, DISCARDED:])
    assert error < 0.01
    assert mean == pytest.approx(1.42, abs=0.05)


@pytest.mark.parametrize("epsilon", [0.8, 1.6])
def test_without_memory_ghmc_is_hmc(epsilon):
    """The same acceptance, the same variance, and the same correlation of x² over one step."""
    one, other = run(lehr.GHMC(L, damping=0.0), epsilon), run(lehr.HMC(L), epsilon)
    for f in (lambda s, a: s, lambda s, a: a, lambda s, a: s[:, 1:] * s[:, :-1]):
        (a, error_a), (b, error_b) = (estimate(f(*result)) for result in (one, other))
        assert abs(a - b) < 4 * np.hypot(error_a, error_b)


def test_a_momentum_that_is_kept_carries_a_chain_on():
    """At short steps one transition alone correlates with the next, and more so the less is forgotten."""

    def persistence(damping):
        kernel = lehr.GHMC(1, damping)
        step = kernel.build()

        def chain(key):
            key_start, key_init, *keys = jax.random.split(key, 4)
            x = [kernel.init(key_init, jax.random.normal(key_start, (1,)), log_density)]
            for k in keys:
                x.append(step(k, x[-1], log_density, jnp.asarray(0.05), jnp.ones(1))[0])
            return jnp.stack([b.position[0] - a.position[0] for a, b in itertools.pairwise(x)])

        moves = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(1), N)))
        return np.corrcoef(moves.T)[0, 1]

    for damping in (0.0, 0.5, 0.9):
        assert persistence(damping) == pytest.approx(damping, abs=4 / np.sqrt(N) + 0.05**2)
