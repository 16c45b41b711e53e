"""One posterior on all devices of all processes, kept while it goes on.

    srun python cluster.py                                      as in cluster.slurm
    python cluster.py --coordinator 127.0.0.1:9000 --process 0 & python cluster.py ... --process 1      by hand

Every process runs the same program on the same data. Chains are spread over all devices; every process is left with
the whole Run, and the first of them writes files.
"""

import argparse
from pathlib import Path

import jax


def told():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", help="host:port of the first process; a cluster's own engine says it")
    parser.add_argument("--process", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/cluster"))
    parser.add_argument("--particles", type=int, default=1024)
    return parser.parse_args()


if __name__ == "__main__":  # first of all: to import BlackJAX makes an array, and then it is too late
    arguments = told()
    if arguments.coordinator is None:
        jax.distributed.initialize()  # Slurm, Kubernetes, Open MPI and TPU pods say where everybody is
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # processes on CPUs talk through this
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)

import numpy as np
import numpyro
import numpyro.distributions as dist

import lehr

PRIOR = lehr.load("ring") * lehr.load("bar")


def model(y):
    x = numpyro.sample("x", lehr.Diffusion(PRIOR))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    numpyro.sample("y", dist.Normal(x[1], sigma).expand([4]), obs=y)


def main(out, particles):
    chains = jax.make_mesh((jax.device_count(),), ("chains",))
    smc = lehr.AnnealedSMC(
        model, num_particles=particles, islands=jax.device_count(), sharding=chains, checkpoint=out / "checkpoint"
    )
    run = smc.run(jax.random.key(0), np.array([0.9, -0.3, 0.35, 0.1]), resume=True)

    if jax.process_index() == 0:
        run.print_summary()
        run.to_netcdf(out / "posterior.nc")


if __name__ == "__main__":
    main(arguments.out, arguments.particles)
