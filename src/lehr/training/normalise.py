r"""The normaliser of an energy, found by sampling the energy itself.

An energy is a density up to a factor at every level of noise, f_σ = Z(σ) p_σ. A network that was trained
with its time derivative (:mod:`lehr.training.dual`) has a Z near one; nobody made it one. It is the
evidence of the energy alone: weighted particles that are led from noise, where the constant is known,
down to σ have on average a weight of Z(σ), whatever they meet on the way. One run knows it at all its
levels, and f_σ/Z(σ) is a density at each.

Data would not do in their place. E[∂ log f_σ/∂ log σ] is zero under the model's own p_σ; under data that
are distributed otherwise, be they those of the training or others, it is not, and its integral from noise
to a tenth of the data's width was off by nats where the evidence's error is a tenth of one.

References:
    Neal, Annealed importance sampling, Statistics and Computing 2001.
    Guth, Kadkhodaie & Simoncelli, Learning normalized image densities via dual score
    matching, 2025 (arXiv 2506.05310).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from lehr.annealing.drivers import AnnealedSMC
from lehr.annealing.run import FEWEST
from lehr.potentials.base import replace
from lehr.potentials.network import EnergyNetwork
from lehr.programs.diffusion import Diffusion

__all__ = ["normalise"]


def normalise(
    energy: EnergyNetwork, rng_key: jax.Array, *, num_levels: int = 24, num_particles: int = 2048
) -> EnergyNetwork:
    """The energy with its normaliser found and taken away; it counts as calibrated.

    Args:
        energy: a trained energy; of one with classes it is a run for each, and one for all together.
        rng_key: a JAX key.
        num_levels: levels between which log Z is linear in log σ, uniform over ``energy.sigma_range``. The runs have
            twice as many, where their pilots place them.
        num_particles: of each run.

    Raises:
        RuntimeError: if at some level fewer than five particles were effective: they have come upon a place where
            no data are and where the energy puts next to all of its mass, and it is no density worth a normaliser.
    """
    bare = replace(energy, log_normalizer=None)
    log_snr = -2 * np.log(np.geomspace(bare.sigma_range[0], bare.sigma_range[1], num_levels))
    end = float(bare.schedule.time(log_snr[0]))

    def alone(label: jax.Array) -> None:
        numpyro.sample("x", Diffusion(bare.given(label) if bare.num_classes else bare))

    driver = AnnealedSMC(alone, ladder=2 * num_levels, num_particles=num_particles, progress=False)

    def log_z(label: jax.Array, key: jax.Array) -> np.ndarray:
        levels = driver.sample(driver.prepare(driver.bind(label), end), key).levels
        effective = levels["ess_weights"]
        worst = int(np.argmin(effective))
        if effective[worst] < FEWEST:
            at, whose = levels["sigma"][worst], f" of label {int(label)}" if bare.num_classes else ""
            raise RuntimeError(
                f"at σ/α = {at:.3g} only {effective[worst]:.1f} of {num_particles} particles{whose} were effective: "
                "the energy puts its mass where no data are. Bound its correction (limit), or train it with less "
                "weight on time or on data that are spread less."
            )
        return np.interp(log_snr, levels["log_snr"], levels["log_evidence"])

    labels = jnp.arange(bare.num_classes + 1)
    found = np.stack([log_z(*one) for one in zip(labels, jax.random.split(rng_key, len(labels)), strict=True)])
    return replace(energy, log_normalizer=jnp.asarray(found if bare.num_classes else found[0]), calibrated=True)
