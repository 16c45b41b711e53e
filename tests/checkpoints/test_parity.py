"""U-Nets of every option, made by diffusers with random weights, against PyTorch itself.

Skipped without PyTorch: `pip install torch diffusers` into an environment of its own, then `pytest -m parity`.
"""

import jax
import numpy as np
import pytest

import lehr
from lehr.checkpoints.diffusers import read_unet

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
CONFIGS = {
    "cifar": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None,
              "norm_eps": 1e-6, "layers_per_block": 2},
    "scale and shift, resnets": {**RESNETS, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    "with a norm in the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "attention first": {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "downsample_type": "resnet",
                        "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
    "three levels": {"block_out_channels": (8, 16, 24), "down_block_types": ("DownBlock2D",) * 3,
                     "up_block_types": ("UpBlock2D",) * 3, "mid_block_scale_factor": 2.0, "act_fn": "mish"},
    "nothing in the middle": {"mid_block_type": None, "act_fn": "gelu"},
    "no attention in the middle": {"add_attention": False, "act_fn": "relu", "center_input_sample": True},
    "learned times": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "fourier times": {"time_embedding_type": "fourier"},
    "classes as times": {"class_embed_type": "timestep", "num_class_embeds": 5, "time_embedding_dim": 24},
    "an oblong, odd embedding": {"sample_size": (4, 8), "block_out_channels": (9, 15), "norm_num_groups": 3,
                                 "attention_head_dim": 3, "in_channels": 1, "out_channels": 1},
    "a variance too, old names": {"down_block_types": ("UNetResDownBlock2D", "AttnDownBlock2D"), "out_channels": 6,
                                  "attention_head_dim": 5, "upsample_type": "resnet"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradient_are_those_of_pytorch(name, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**SMALL | CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms start as zeros and ones, which hide mistakes
            parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    ours = read_unet(tmp_path)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *ours.config.event_shape)).astype(np.float32)
    v = rng.normal(size=x.shape).astype(np.float32)
    steps = np.array([0.0, 7.0, 999.0] if "learned" in name else [0.5, 7.25, 999.0], np.float32)
    labels = np.array([0, 2, 4])

    told = torch.tensor(steps).long() if "learned" in name else torch.tensor(steps)
    given = {} if ours.config.num_class_embeds is None else {"class_labels": torch.tensor(labels)}
    inputs = torch.tensor(x, requires_grad=True)
    expected = theirs(inputs, told, **given).sample[:, : x.shape[1]]
    expected.backward(torch.tensor(v))

    def output(x):
        if given:
            return jax.vmap(ours)(x, steps, labels)
        return jax.vmap(ours)(x, steps)

    def both(x):
        value, back = jax.vjp(output, x)
        return value, back(v)[0]

    value, gradient = jax.jit(both).lower(x).compile({"xla_backend_optimization_level": 0})(x)
    # Single precision through some twenty layers, relative to outputs and gradients of order one to ten.
    for got, want in ((value, expected.detach().numpy()), (gradient, inputs.grad.numpy())):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("rescale", [False, True])
def test_noise_tables_are_those_of_diffusers(schedule, rescale):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=rescale)
    ours = lehr.checkpoints.scheduler.read_noise(dict(theirs.config)).schedule
    # Their tables are products in single precision of a thousand factors, the last of them 1e-3 for cosines.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double().numpy(), rtol=1e-4, atol=1e-7)


def test_torch_reads_what_the_restricted_reader_reads(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    for new in (True, False):
        torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=new)
        got = lehr.checkpoints.torch_file.read_torch(tmp_path / "model.pt")
        assert got.keys() == state.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(got[name], tensor.numpy())
