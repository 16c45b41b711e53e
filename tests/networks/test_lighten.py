"""Networks in less memory: the same numbers, fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lehr
from lehr.networks import ElementwiseMLP, PatchMixer, ResidualMLP
from lehr.networks.unet import UNet
from lehr.networks.unet_config import UNetConfig

SHAPE = (1, 16, 16)
T = 0.4


def awake(module, seed=0):
    """``module`` with all weights drawn: some start at zero, where all networks are one."""
    graphdef, state = nnx.split(module)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    draw = lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), (leaf.size,)).reshape(leaf.shape)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, state))


def unet():
    config = UNetConfig(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    return lehr.ScoreNetwork(
        awake(UNet(config, rngs=nnx.Rngs(0))), lehr.VPLinear(), SHAPE, time_input=lambda t: 999 * t
    )


def mixer():
    module = PatchMixer((16, 16), patch=4, width=32, num_blocks=3, rngs=nnx.Rngs(0))
    return lehr.EnergyNetwork(awake(module), lehr.VPCosine(), (16, 16), head="inner")


def perceptron():
    module = ResidualMLP(16, 16, width=64, num_blocks=3, data_std=1.0, rngs=nnx.Rngs(0))
    return lehr.EnergyNetwork(awake(module), lehr.VPCosine(), (16,), head="inner")


def elementwise():
    return lehr.EnergyNetwork(awake(ElementwiseMLP(16, width=64, rngs=nnx.Rngs(0))), lehr.VPCosine(), (16,))


POTENTIALS = {"unet": unet, "mixer": mixer, "mlp": perceptron, "elementwise": elementwise}


def answers(p):
    """x̂₀ and, of an energy, log p at a few points."""
    x = jax.random.normal(jax.random.key(1), (4, *p.event_shape))
    asked = [p.denoise] + ([p.log_density, p.score] if isinstance(p, lehr.EnergyPotential) else [])
    return jax.jit(jax.vmap(lambda x: [one(x, T) for one in asked]))(x)


@pytest.mark.parametrize("name", POTENTIALS)
def test_computing_activations_twice_changes_no_number(name):
    p = POTENTIALS[name]()
    for got, expected in zip(answers(lehr.lighten(p, remat=True)), answers(p), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POTENTIALS)
def test_half_the_bits_keep_what_eight_bits_can(name):
    """Each of some twenty roundings is by at most 2⁻⁹ of the activations; what comes out is float32."""
    p = POTENTIALS[name]()
    light = lehr.lighten(p, dtype=jnp.bfloat16)
    size = lambda p: sum(leaf.nbytes for leaf in jax.tree.leaves(p.network.params))  # noqa: E731
    assert size(light) < 0.6 * size(p)
    for got, expected in zip(answers(light), answers(p), strict=True):
        assert got.dtype == jnp.float32
        error = np.sqrt(np.mean((got - expected) ** 2)) / np.std(expected)
        assert 1e-5 < error < 0.05


@pytest.mark.parametrize("name", POTENTIALS)
def test_a_network_in_bfloat16_computes_in_it(name):
    light = lehr.lighten(POTENTIALS[name](), dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x: light.denoise(x, T))(jnp.zeros(light.event_shape)))
    products = [line for line in text.splitlines() if "dot_general[" in line]
    in_half = [line for line in products if "bf16[" in line.split("=")[0]]
    assert len(in_half) >= 0.7 * len(products) > 0


def test_a_deep_networks_gradient_keeps_less():
    """What is held between the way there and the way back, whatever a compiler makes of it."""
    module = PatchMixer((32, 32), patch=4, width=128, num_blocks=12, rngs=nnx.Rngs(0))
    p = lehr.EnergyNetwork(module, lehr.VPCosine(), (32, 32), head="inner")

    def kept(p):
        held = jax.eval_shape(lambda x: jax.vjp(lambda x: p.log_density(x, T), x)[1], jnp.zeros((32, 32)))
        return sum(leaf.size for leaf in jax.tree.leaves(held)) - sum(leaf.size for leaf in jax.tree.leaves(p))

    assert kept(lehr.lighten(p, remat=True)) < 0.2 * kept(p)


def test_every_network_of_a_composition_is_lightened():
    p = perceptron() * lehr.Gaussian(jnp.zeros(16), 1.0) * perceptron() ** 0.5
    light = lehr.lighten(p, dtype=jnp.bfloat16)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(light) if leaf.size > 1000}
    assert kinds == {jnp.dtype(jnp.bfloat16)}


def test_what_cannot_be_lightened_is_said_so():
    with pytest.raises(TypeError, match="no network"):
        lehr.lighten(lehr.Gaussian(jnp.zeros(2), 1.0), remat=True)
    with pytest.raises(TypeError, match="floating-point"):
        lehr.lighten(perceptron(), dtype=jnp.int8)
    function = lehr.ScoreNetwork((lambda w, x, c: w * x, jnp.ones(())), lehr.VPCosine(), (2,))
    with pytest.raises(TypeError, match="Flax NNX"):
        lehr.lighten(function, remat=True)
    assert lehr.lighten(function, dtype=jnp.bfloat16).denoise(jnp.ones(2), T).dtype == jnp.float32
