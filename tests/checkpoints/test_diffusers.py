"""Folders of diffusers: the same numbers as PyTorch's, from every layout that such folders have had."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stored import DIGITS, RANDOM, compiled, same

import lehr
from lehr.checkpoints.scheduler import alphas_cumprod, read_noise
from lehr.networks.embeddings import Positional

EPS = np.finfo(np.float32).eps


def noise_and_gradient(p, x, steps, v):
    def noise(x):
        return jax.vmap(p.noise)(x, p.schedule.time_of_step(steps))

    value, back = jax.vjp(noise, x)
    return value, back(v)[0]


# The same numbers.


@pytest.mark.parametrize("folder", [DIGITS, RANDOM], ids=lambda f: f.name)
def test_output_and_gradient_are_those_of_pytorch(folder):
    p, stored = lehr.load(folder), np.load(folder / "parity.npz")
    arguments = (p, stored["x_t"], stored["t"].astype(np.float32), stored["v"])
    program = compiled(noise_and_gradient, *arguments)
    noise, gradient = program(*arguments)
    # PyTorch's own rounding leaves 3e-6 of its double precision, and gradients reach 84.
    np.testing.assert_allclose(noise, stored["eps_hat"], atol=2e-5)
    np.testing.assert_allclose(gradient, stored["vjp"], atol=1e-4)
    if "t_float" in stored:  # steps between the trained ones
        noise, _ = program(p, stored["x_t"], stored["t_float"], stored["v"])
        np.testing.assert_allclose(noise, stored["eps_hat_tfloat"], atol=2e-5)


def test_double_precision_is_that_of_pytorch(monkeypatch):
    stored, waves = np.load(DIGITS / "parity.npz"), np.load(DIGITS / "waves.npz")["waves"]
    with jax.enable_x64(True):
        # PyTorch's embedding of the step is of single precision always, phases near 500 included; it shows as 1e-7.
        embedding = Positional(waves.shape[1], cosines_first=True, shift=0)
        np.testing.assert_allclose(jax.vmap(embedding)(stored["t"].astype(float)), waves, atol=5e-5)
        table = jnp.zeros((1000, waves.shape[1])).at[stored["t"]].set(waves.astype(float))
        monkeypatch.setattr(Positional, "__call__", lambda _, c: table[jnp.round(c).astype(int)])
        p = lehr.load(DIGITS)
        arguments = (np.asarray(stored["x_t"], float), p.schedule.time_of_step(stored["t"]))
        noise = compiled(jax.vmap(p.noise), *arguments)(*arguments)
    np.testing.assert_allclose(noise, stored["eps_hat_f64"], atol=1e-8)


def test_the_schedule_is_the_stored_one():
    p, stored = lehr.load(DIGITS), np.load(DIGITS / "parity.npz")
    # The stored table is a product of a thousand factors in single precision.
    np.testing.assert_allclose(p.schedule.alphas_cumprod, stored["alphas_cumprod"], rtol=1e-6)
    assert p.event_shape == (1, 8, 8)
    assert p.prediction == "noise"


def test_score_and_data_are_read_from_the_noise():
    p, stored = lehr.load(DIGITS), np.load(DIGITS / "parity.npz")
    i, alpha_bar = 9, np.asarray(stored["alphas_cumprod"], float)[stored["t"][9]]
    x, t, noise = stored["x_t"][i], p.schedule.time_of_step(stored["t"][i]), stored["eps_hat_f64"][i]
    score, data = compiled(lambda p, x: (p.score(x, t), p.denoise(x, t)), p, x)(p, x)
    np.testing.assert_allclose(score, -noise / np.sqrt(1 - alpha_bar), atol=2e-5)
    np.testing.assert_allclose(data, (x - np.sqrt(1 - alpha_bar) * noise) / np.sqrt(alpha_bar), atol=2e-5)


# Layouts.


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(RANDOM, tmp_path / "model"))


def weights(folder):
    return folder / "unet/diffusion_pytorch_model.safetensors"


def edit(file, drop=(), **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))


def test_an_older_folder_has_everything_at_its_root(folder):
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "unet/" + weights(folder).name):
        (folder / file).rename(folder / Path(file).name)
    (folder / "model_index.json").unlink()
    same(lehr.load(folder))


def test_half_precision_is_another_file_and_is_read_as_single(folder):
    half = {k: v.astype(np.float16) for k, v in load_file(weights(folder)).items()}
    save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    weights(folder).unlink()
    with pytest.raises(FileNotFoundError, match=r"fp16.*variant="):
        lehr.load(folder)
    p = lehr.load(folder, variant="fp16")
    same(p, atol=2**-11)  # weights are below one in size
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(p.network))


def test_bfloat16_is_read(folder):
    save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(weights(folder)).items()}, weights(folder))
    same(lehr.load(folder), atol=2**-8)


def test_averaged_weights_are_a_folder_of_their_own(folder):
    shutil.copytree(folder / "unet", folder / "unet_ema")
    edit(folder / "unet_ema/config.json", decay=0.9999, optimization_step=10, power=0.75)
    averaged = {k: v + 1 for k, v in load_file(weights(folder)).items()}
    save_file(averaged, folder / "unet_ema" / weights(folder).name)
    same(lehr.load(folder))
    with pytest.raises(AssertionError):
        same(lehr.load(folder, variant="ema"))
    shutil.copy(weights(RANDOM), folder / "unet_ema")
    save_file(averaged, weights(folder))
    same(lehr.load(folder, variant="ema"))


def test_shards_are_put_together(folder):
    tensors = load_file(weights(folder))
    names = sorted(tensors)
    where = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / "unet" / file)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    weights(folder).unlink()
    same(lehr.load(folder))


def test_old_names_of_attention_are_known(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        return name

    renamed = {rename(name): tensor for name, tensor in load_file(weights(folder)).items()}
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, weights(folder))
    same(lehr.load(folder))


def test_keys_that_older_configs_lack_have_the_defaults_of_then(folder):
    stated = json.loads((folder / "unet/config.json").read_text())
    old = {"act_fn", "attention_head_dim", "block_out_channels", "center_input_sample", "down_block_types"}
    old |= {"downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block", "norm_eps"}
    old |= {"norm_num_groups", "out_channels", "sample_size", "time_embedding_type", "up_block_types"}
    edit(folder / "unet/config.json", drop=stated.keys() - old)
    edit(folder / "scheduler/scheduler_config.json", drop=("prediction_type", "rescale_betas_zero_snr"))
    p = lehr.load(folder)
    same(p)
    assert (p.prediction, p.schedule.num_steps) == ("noise", 1000)


def test_what_checkpoints_do_not_say_can_be_said():
    p = lehr.load(RANDOM, mean=-0.25, std=0.4, feature_scale=0.1)
    np.testing.assert_allclose([p.mean[0, 0, 0], p.std[0, 0, 0], p.feature_scale], [-0.25, 0.4, 0.1], rtol=EPS)
    with pytest.raises(TypeError, match="says everything itself"):
        lehr.load("ring", variant="fp16")


# Noise.


def stated(**changes):
    return {"_class_name": "DDPMScheduler", **changes}


def test_every_beta_schedule_is_its_formula():
    steps = 8
    i = np.arange(steps)
    cosine = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = {
        "linear": 0.1 + 0.3 * i / 7,
        "scaled_linear": (np.sqrt(0.1) + (np.sqrt(0.4) - np.sqrt(0.1)) * i / 7) ** 2,
        "sigmoid": 0.1 + 0.3 / (1 + np.exp(6 - 12 * i / 7)),
        "squaredcos_cap_v2": np.minimum(1 - cosine[1:] / cosine[:-1], 0.999),
    }
    for name, beta in betas.items():
        settings = {"beta_start": 0.1, "beta_end": 0.4, "num_train_timesteps": steps, "beta_schedule": name}
        got = read_noise(stated(**settings)).schedule.alphas_cumprod
        np.testing.assert_allclose(got, np.cumprod(1 - beta), rtol=1e-13)
    np.testing.assert_allclose(
        read_noise(stated(trained_betas=[0.1, 0.2])).schedule.alphas_cumprod, [0.9, 0.72], rtol=1e-13
    )


def test_rescaling_ends_in_noise_alone_and_keeps_the_first_step():
    plain, rescaled = (alphas_cumprod(rescale_betas_zero_snr=r) for r in (False, True))
    assert rescaled[-1] == 0
    np.testing.assert_allclose(rescaled[0], plain[0], rtol=1e-12)
    ratio = np.diff(np.sqrt(rescaled)) / np.diff(np.sqrt(plain))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def test_predictions_are_what_the_scheduler_says():
    assert read_noise(stated(prediction_type="v_prediction")).prediction == "v"
    assert read_noise(stated(prediction_type="sample")).prediction == "data"
    assert read_noise(stated(predict_epsilon=False)).prediction == "data"
    assert read_noise(stated()).prediction == "noise"
    latent = read_noise({"_class_name": "HeunDiscreteScheduler"}).schedule
    assert latent.alphas_cumprod[0] == 1 - 0.00085
    exploding = read_noise({"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.02, "sigma_max": 50.0})
    assert exploding == (lehr.VE(0.02, 50.0), "score", "sigma")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        (stated(beta_schedule="exponential"), "beta_schedule 'exponential'"),
        (stated(prediction_type="flow_prediction"), "prediction_type 'flow_prediction'"),
        (stated(timestep_type="continuous"), "timestep_type"),
        (stated(colour="blue"), "unknown keys: colour"),
        (stated(num_train_timesteps=10**9), "num_train_timesteps"),
        (stated(beta_end=1.5), "between 0 and 1"),
        (stated(beta_start="small"), "no noise schedule"),
        (stated(trained_betas=[0.1, float("nan")]), "between 0 and 1"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": -1.0}, "sigma_min"),
        ({"_class_name": "ScoreSdeVeScheduler", "colour": 1}, "unknown keys: colour"),
    ],
)
def test_noise_that_is_not_known_is_refused_by_name(config, message):
    with pytest.raises(lehr.CheckpointError, match=message):
        read_noise(config)
