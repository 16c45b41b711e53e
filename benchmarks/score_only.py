"""What a Metropolis test for a score is worth, by the number of quadrature nodes.

A two-dimensional mixture of three modes and a long step: acceptance and spread beside those of the exact test.
"""

import jax
import jax.numpy as jnp
import numpy as np
from report import report

import lehr
from lehr.kernels.line_integral import PartlyKnown

N, STEPS = 8000, 60
TARGET = lehr.GaussianMixture([[-1.5, -0.5], [1.5, -0.5], [0.0, 1.5]], 0.6, [0.4, 0.35, 0.25])


def sample(kernel, log_density, step_size):
    step = kernel.build()

    def chain(key, q):
        state = kernel.init(key, q, log_density)
        keys = jax.random.split(key, STEPS)
        state, stats = jax.lax.scan(lambda s, k: step(k, s, log_density, step_size, jnp.ones(2)), state, keys)
        return state.position, jnp.mean(stats.acceptance_rate)

    start = TARGET.sample(jax.random.key(0), 0.0, (N,))
    q, rate = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(1), N), start)
    return np.asarray(q), float(jnp.mean(rate))


def main():
    exact = TARGET.at(0.0)
    std = np.asarray(TARGET.moments(0.0).std)
    kernels = {"exact test": (lehr.MALA(), exact)}
    for nodes in (2, 3, 4, 5):
        kernels[f"{nodes} nodes"] = (
            lehr.MALA(metropolis="line-integral", num_nodes=nodes),
            PartlyKnown(stand_in, stand_in),
        )
    kernels["a constant, with the score as its gradient"] = (lehr.MALA(), stand_in)
    rows, results = [("truth", "–", f"{std[0]:.3f}", f"{std[1]:.3f}", f"{np.sqrt(1 / (2 * N)):.3f}")], {}
    for name, (kernel, log_density) in kernels.items():
        q, rate = sample(kernel, log_density, 1.1)
        results[name] = {"acceptance": rate, "std": q.std(0).tolist()}
        rows.append((name, f"{rate:.3f}", f"{q[:, 0].std():.3f}", f"{q[:, 1].std():.3f}", ""))
    report(
        "score_only",
        f"MALA with ε = 1.1 on three modes, {N} chains",
        ("test", "acceptance", "std x", "std y", "rel. error"),
        rows,
        results,
    )


@jax.custom_jvp
def stand_in(x):
    return jnp.zeros(())


stand_in.defjvp(lambda primals, tangents: (jnp.zeros(()), jnp.vdot(TARGET.score(primals[0], 0.0), tangents[0])))

if __name__ == "__main__":
    main()
