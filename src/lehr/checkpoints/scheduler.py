r"""The noise of a diffusers checkpoint, from the config of its scheduler.

Most schedulers state β_i, i = 0 … T − 1, and with ᾱ_i = Π_{j ≤ i} (1 − β_j) the network saw

    x_i = √ᾱ_i x₀ + √(1 − ᾱ_i) ε ,        told the step i.

β is a straight line (``linear``), the square of one (``scaled_linear``), a sigmoid of one
(``sigmoid``), what makes ᾱ a squared cosine (``squaredcos_cap_v2``), or a table
(``trained_betas``). With ``rescale_betas_zero_snr``, √ᾱ is shifted and scaled to end in zero. All of
it is computed in double precision. ``ScoreSdeVeScheduler`` is the exception: variance exploding, told σ, and
the network's output is the score.

References:
    Ho et al., NeurIPS 2020 (linear).  Rombach et al., CVPR 2022 (scaled linear).
    Nichol & Dhariwal, ICML 2021 (cosine).
    Lin et al., Common diffusion noise schedules and sample steps are flawed, WACV 2024 (rescaling).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from lehr.checkpoints.errors import CheckpointError
from lehr.predictions import Prediction
from lehr.schedules import VE, DiscreteSchedule, Schedule

__all__ = ["Noise", "alphas_cumprod", "read_noise"]

# Schedulers are ways to sample; these all share one description of the noise.
SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "SASolver", "UniPCMultistep",
    )
}  # fmt: skip
# What they say about sampling, and not about the noise that the network was trained with.
SAMPLING = {
    "algorithm_type", "clip_predicted_image", "clip_sample", "clip_sample_range", "corrector_order",
    "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "flow_shift",
    "interpolation_type", "lambda_min_clipped", "lower_order_final", "noise_sampler_seed", "predict_x0",
    "predictor_order", "sample_max_value", "set_alpha_to_one", "shift_terminal", "sigma_max", "sigma_min",
    "skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "tau_func", "tensor_format",
    "thresholding", "time_shift_type", "timestep_spacing", "timestep_values", "use_beta_sigmas", "use_dynamic_shifting",
    "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip
# What would make the network another one, unless it has this value.
FIXED = {"timestep_type": "discrete", "use_flow_sigmas": False}
NOISE = {
    "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "predict_epsilon": True,
}  # fmt: skip
# Schedulers of latent models state other β by default.
LATENT = {f"{name}Scheduler" for name in ("DPMSolverSDE", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete")}
PREDICTION: dict[str, Prediction] = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
MOST_STEPS = 100_000


class Noise(NamedTuple):
    """How a network was trained.

    Attributes:
        schedule: the noise.
        prediction: what its output is.
        time_input: what it is told.
    """

    schedule: Schedule
    prediction: Prediction
    time_input: str


def read_noise(config: dict[str, Any]) -> Noise:
    """The noise that a scheduler's config describes.

    Raises:
        CheckpointError: naming the key, for a scheduler, a key or a value that is not known.
    """
    config = dict(config)
    kind = config.get("_class_name", "DDPMScheduler")
    stated = {k: v for k, v in config.items() if not k.startswith("_")}
    if kind == "ScoreSdeVeScheduler":
        return _variance_exploding(stated)
    if kind not in SCHEDULERS:
        raise CheckpointError(f"scheduler {kind!r} is not supported; expected one of {', '.join(sorted(SCHEDULERS))}.")
    for key, value in FIXED.items():
        if stated.pop(key, value) != value:
            raise CheckpointError(f"a scheduler whose {key} is not {value!r} is not supported.")
    unknown = sorted(stated.keys() - SAMPLING - NOISE.keys())
    if unknown:
        raise CheckpointError(f"the scheduler's config has unknown keys: {', '.join(unknown)}.")
    latent = {"beta_start": 0.00085, "beta_end": 0.012} if kind in LATENT else {}
    noise = {**NOISE, **latent, **{k: v for k, v in stated.items() if k in NOISE}}
    predicted = noise["prediction_type"] if noise["predict_epsilon"] else "sample"
    if predicted not in PREDICTION:
        raise CheckpointError(f"prediction_type {predicted!r} is not supported; expected one of {list(PREDICTION)}.")
    try:
        schedule = DiscreteSchedule(
            alphas_cumprod(**{k: v for k, v in noise.items() if k not in ("prediction_type", "predict_epsilon")})
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the scheduler's config gives no noise schedule: {error}") from error
    return Noise(schedule, PREDICTION[predicted], "step")


def alphas_cumprod(
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: list[float] | None = None,
    num_train_timesteps: int = 1000,
    rescale_betas_zero_snr: bool = False,
) -> np.ndarray:
    """ᾱ of the training steps, shape (T,), in double precision.

    Args:
        beta_start: first β.
        beta_end: last β.
        beta_schedule: ``"linear"``, ``"scaled_linear"``, ``"squaredcos_cap_v2"`` or ``"sigmoid"``.
        trained_betas: all of β, in place of these.
        num_train_timesteps: T.
        rescale_betas_zero_snr: whether √ᾱ is made to end in zero.

    Raises:
        ValueError: for an unknown schedule or values that are none.
    """
    steps = num_train_timesteps
    if not isinstance(steps, int) or not 2 <= steps <= MOST_STEPS:
        raise ValueError(f"num_train_timesteps must be an integer from 2 to {MOST_STEPS}; got {steps!r}.")
    if trained_betas is not None:
        betas = np.asarray(trained_betas, np.float64)
    elif beta_schedule == "linear":
        betas = np.linspace(beta_start, beta_end, steps)
    elif beta_schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps) ** 2
    elif beta_schedule == "sigmoid":
        betas = beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    elif beta_schedule == "squaredcos_cap_v2":
        cosine = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
    else:
        raise ValueError(f"beta_schedule {beta_schedule!r} is not supported.")
    if betas.ndim != 1 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("β must lie between 0 and 1.")
    table = np.cumprod(1 - betas)
    if rescale_betas_zero_snr:
        root = np.sqrt(table)
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return table


def _variance_exploding(stated: dict[str, Any]) -> Noise:
    known = {"num_train_timesteps", "snr", "sigma_min", "sigma_max", "sampling_eps", "correct_steps", "tensor_format"}
    if stated.keys() - known:
        raise CheckpointError(f"the scheduler's config has unknown keys: {', '.join(sorted(stated.keys() - known))}.")
    try:
        schedule = VE(float(stated.get("sigma_min", 0.01)), float(stated.get("sigma_max", 1348.0)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the scheduler's config gives no noise schedule: {error}") from error
    return Noise(schedule, "score", "sigma")
