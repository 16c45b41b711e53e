"""The parts of a U-Net against their formulas; whole networks are tested against PyTorch's, with the checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lehr.networks.convolution import convolve
from lehr.networks.embeddings import Fourier, Learned, Positional
from lehr.networks.unet import UNet
from lehr.networks.unet_blocks import Attention
from lehr.networks.unet_config import UNetConfig

EPS = np.finfo(np.float32).eps
RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), float)


SHAPES = [(3, 1, ((1, 1), (1, 1))), (3, 2, ((1, 1), (1, 1))), (3, 2, ((0, 1), (0, 1))), (1, 1, ((0, 0), (0, 0)))]


@pytest.mark.parametrize(("size", "stride", "padding"), SHAPES)
def test_the_sum_of_products_is_the_convolution_and_so_is_its_gradient(size, stride, padding):
    x, kernel = array(6, 8, 3), array(size, size, 3, 5)

    def direct(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x[None], kernel, (stride, stride), padding, dimension_numbers=layout)[0]

    want, back = jax.vjp(direct, x, kernel)
    got, ours = jax.vjp(lambda x, kernel: convolve(x, kernel, stride=stride, padding=padding), x, kernel)
    # At most 9 × 5 × 24 products of order one, summed in another order.
    np.testing.assert_allclose(got, want, atol=64 * EPS)
    v = array(*want.shape)
    for a, b in zip(ours(v), back(v), strict=True):
        np.testing.assert_allclose(a, b, atol=128 * EPS)
    batch = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(
        jax.vmap(lambda x: convolve(x, kernel, stride=stride, padding=padding))(batch)[1], 2 * want, atol=128 * EPS
    )


@pytest.mark.parametrize("cosines_first", [True, False])
@pytest.mark.parametrize(("length", "shift"), [(8, 0), (9, 1)])
def test_positional_embedding_is_its_formula(length, shift, cosines_first):
    c, half = 17.25, length // 2
    phase = c * 10000.0 ** (-np.arange(half) / (half - shift))
    waves = [np.cos(phase), np.sin(phase)] if cosines_first else [np.sin(phase), np.cos(phase)]
    got = Positional(length, cosines_first=cosines_first, shift=shift)(jnp.asarray(c))
    # Frequencies are rounded to EPS in the exponent, up to 9; phases reach 17.
    np.testing.assert_allclose(got, np.concatenate([*waves, np.zeros(length % 2)]), atol=16 * 17 * EPS)


def test_fourier_embedding_is_of_the_logarithm():
    embedding = Fourier(4, rngs=nnx.Rngs(0))
    weight = np.asarray(embedding.weight[...], float)
    phase = 2 * np.pi * np.log(0.3) * weight
    np.testing.assert_allclose(
        embedding(jnp.asarray(0.3)), np.concatenate([np.sin(phase), np.cos(phase)]), atol=4 * EPS * np.abs(phase).max()
    )


def test_learned_embedding_runs_straight_between_steps_to_the_last():
    embedding = Learned(4, 3, rngs=nnx.Rngs(0))
    table = np.asarray(embedding.weight[...])
    for c, row in ((0.0, table[0]), (1.25, 0.75 * table[1] + 0.25 * table[2]), (3.0, table[3])):
        np.testing.assert_allclose(embedding(jnp.asarray(c)), row, rtol=8 * EPS, atol=8 * EPS)


def test_attention_of_two_heads_is_its_formula():
    attention = Attention(4, 2, None, 1e-5, rescale=2.0, rngs=nnx.Rngs(0))
    x = array(2, 3, 4)
    h = np.asarray(x, float).reshape(6, 4)
    q, k, v = (h @ np.asarray(to.kernel[...], float) for to in (attention.to_q, attention.to_k, attention.to_v))
    heads = []
    for part in (slice(0, 2), slice(2, 4)):
        weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(2))
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    out = np.concatenate(heads, 1) @ np.asarray(attention.to_out[0].kernel[...], float)
    np.testing.assert_allclose(attention(x), ((h + out) / 2).reshape(2, 3, 4), atol=64 * EPS)


SMALL = {
    "sample_size": 4,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "attention_head_dim": 4,
}


@pytest.mark.slow
def test_a_predicted_variance_is_not_read():
    level = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    one, both = (UNet(UNetConfig(**SMALL | level, out_channels=n), rngs=nnx.Rngs(0)) for n in (3, 6))
    nnx.update(both, nnx.state(one, lambda path, _: path[0] != "conv_out"))
    for name in ("kernel", "bias"):
        whole = getattr(both.conv_out, name)
        whole[...] = whole[...].at[..., :3].set(getattr(one.conv_out, name)[...]).at[..., 3:].set(jnp.nan)
    x, c = array(3, 4, 4), jnp.asarray(3.0)
    np.testing.assert_array_equal(*(nnx.jit(lambda unet: unet(x, c))(unet) for unet in (both, one)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "down_block_types 'SkipDownBlock2D'"),
        ({"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}, "up_block_types 'CrossAttnUpBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"time_embedding_type": "gaussian"}, "time_embedding_type 'gaussian'"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift 'spatial'"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity'"),
        ({"act_fn": "tanh"}, "act_fn 'tanh'"),
        ({"up_block_types": ("UpBlock2D",)}, "go together"),
        ({"block_out_channels": 4}, "one entry a resolution"),
        ({"block_out_channels": (4, -8)}, "block_out_channels must be positive"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"out_channels": 5}, "out_channels"),
        ({"downsample_padding": 2}, "downsample_padding"),
        ({"norm_num_groups": 3}, "groups"),
        ({"attention_head_dim": 16}, "heads of 16"),
        ({"attention_head_dim": "8"}, "attention_head_dim"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"sample_size": 5}, "divide by 2"),
        ({"sample_size": (4, 6, 8)}, "divide by 2"),
    ],
)
def test_a_structure_that_there_is_no_network_for_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**SMALL | changes)
