"""Run as a program by test_layout.py, on devices of its own: the same runs, whatever they are laid out on.

python on_devices.py OUT [COORDINATOR PROCESS]
"""

import sys

import jax
import numpy as np

if __name__ == "__main__" and len(sys.argv) > 2:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))

import numpyro
import numpyro.distributions as dist
from stand_ins import score_of

import lehr

MODES = lehr.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.3, [0.3, 0.7])
PRIOR = lehr.Gaussian(np.zeros(2), 1.0)


def measured(y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = numpyro.sample("x", lehr.Diffusion(MODES))
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def runs(**where):
    few = {"ladder": 6, "num_steps": 1, "pilot": 4, "progress": False, **where}
    yield "particles", lehr.AnnealedSMC(MODES * PRIOR, num_particles=64, **few), ()
    yield "islands", lehr.AnnealedSMC(MODES * PRIOR, num_particles=64, islands=4, threshold=0.9, **few), ()
    yield "scores", lehr.AnnealedSMC(score_of(MODES), num_particles=64, **few), ()
    yield "latents", lehr.AnnealedMCMC(measured, num_chains=16, num_samples=4, **few), (np.array([0.5, 0.2]),)
    nuts = lehr.NUTS(max_num_doublings=3)
    yield "trees", lehr.AnnealedMCMC(MODES, nuts, num_chains=16, num_samples=4, **few), ()
    yield "replicas", lehr.ReplicaExchange(MODES, num_chains=16, num_samples=4, num_warmup=4, **few), ()


if __name__ == "__main__":
    mesh = jax.make_mesh((jax.device_count(),), ("chains",)) if jax.device_count() > 1 else None
    kept = {}
    for name, driver, arguments in runs(sharding=mesh):
        run = driver.run(3, *arguments)
        kept |= {f"{name}.{site}": draws for site, draws in run.samples.items()}
        kept |= {f"{name}.{key}": run.levels[key] for key in ("acceptance_rate", "step_size")}
        if run.log_weights is not None:
            kept |= {f"{name}.log_weights": run.log_weights, f"{name}.evidence": run.levels["log_evidence"]}
    if jax.process_index() == 0:
        np.savez(sys.argv[1], devices=jax.device_count(), **kept)
