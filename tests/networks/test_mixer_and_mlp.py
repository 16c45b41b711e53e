"""Networks against their formulas, written again in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lehr.networks import ElementwiseMLP, PatchMixer, ResidualMLP


def random_weights(module, seed=0):
    """The module with every weight drawn anew: those that start at zero would hide mistakes."""
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graphdef,
        jax.tree.unflatten(treedef, [jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]),
    )


def linear(layer, x):
    bias = 0.0 if layer.bias is None else np.asarray(layer.bias[...], float)
    return x @ np.asarray(layer.kernel[...], float) + bias


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def fourier(phase):
    return np.concatenate([np.cos(2 * np.pi * phase), np.sin(2 * np.pi * phase)])


def condition(network, c, label):
    e = linear(network.embed_c, fourier(np.asarray(network.c_frequencies[...], float) * c))
    return silu(e + np.asarray(network.embed_label.embedding[...], float)[label])


@pytest.mark.parametrize(("reach", "data_std"), [(None, None), (2.0, 0.5)])
def test_the_perceptron_is_its_formula(reach, data_std):
    network = random_weights(
        ResidualMLP(
            4, 4, width=6, num_blocks=2, num_frequencies=3, num_classes=2, reach=reach, limit=reach, data_std=data_std,
            rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    x, c, label = np.random.default_rng(1).normal(size=(2, 2)), 0.3, 1
    flat = x.ravel() if reach is None else x.ravel() / np.sqrt(1 + (x.ravel() / reach) ** 2)
    b = np.asarray(network.x_frequencies[...], float)
    features = fourier(b @ flat)
    if data_std is not None:
        noise = np.exp(2 * c) / (data_std**2 + np.exp(2 * c))
        features *= np.tile(np.exp(-2 * np.pi**2 * noise * np.sum(b**2, -1)), 2)
    h, e = linear(network.embed_x, np.concatenate([flat, features])), condition(network, c, label)
    for block in network.blocks:
        h = h + linear(block.contract, silu(linear(block.expand, h) + linear(block.condition, e)))
    expected = linear(network.readout, silu(h)).reshape(2, 2)
    if reach is not None:
        expected = expected / np.sqrt(1 + (expected / reach) ** 2)
    np.testing.assert_allclose(
        network(jnp.asarray(x), jnp.asarray(c), jnp.asarray(label)), expected, rtol=2e-4, atol=1e-4
    )


def test_the_elementwise_perceptron_is_its_formula():
    d, m, s = 4, 3, 0.5
    network = random_weights(
        ElementwiseMLP(
            d, width=6, num_blocks=2, num_frequencies=m, context=2, element_width=5, reach=3.0, limit=1.0, data_std=s,
            num_classes=2, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    x, c, label = np.random.default_rng(1).normal(size=(2, 2)), 0.3, 1

    def bounded(x, limit):
        return x / np.sqrt(1 + (x / limit) ** 2)

    b = np.asarray(network.x_frequencies[...], float)
    fade = np.exp(-2 * np.pi**2 * b**2 * np.exp(2 * c) / (s**2 + np.exp(2 * c)))
    u = np.stack([[*(fourier(b * value) * np.tile(fade, 2)), value] for value in bounded(x.ravel(), 3.0)])
    h, e = linear(network.embed_x, u.ravel()), condition(network, c, label)
    for block in network.blocks:
        h = h + linear(block.contract, silu(linear(block.expand, h) + linear(block.condition, e)))
    h = silu(h)
    expected = np.sum(bounded(linear(network.weigh, h), 1.0) * u.ravel())
    for u_i, told, own in zip(u, linear(network.inform, h).reshape(d, 2), network.position[...], strict=True):
        units = silu(linear(network.element, u_i) + linear(network.element_context, told) + np.asarray(own, float))
        expected += np.sum(bounded(linear(network.element_readout, silu(told)), 1.0) * units)
    found = network(jnp.asarray(x, jnp.float32), jnp.asarray(c), jnp.asarray(label))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)


def test_elements_share_their_layer_and_frequencies_are_quantiles():
    network = ElementwiseMLP(2, width=4, num_frequencies=3, bandwidth=2.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(network.x_frequencies[...], 2 * np.array([0.2104, 0.6745, 1.3830]), atol=1e-3)
    assert network.element.kernel[...].shape == (7, network.element_width)
    assert network(jnp.ones(2), jnp.asarray(0.0)) == 0.0


def test_the_mixer_is_its_formula():
    p, (height, width) = 2, (4, 6)
    network = random_weights(
        PatchMixer((height, width), patch=p, width=5, num_blocks=2, token_width=3, num_classes=2, rngs=nnx.Rngs(0))
    )
    x, c, label = np.random.default_rng(1).normal(size=(height, width)), -0.4, 2
    corners = [(i, j) for i in range(0, height, p) for j in range(0, width, p)]
    tokens = np.stack([x[i : i + p, j : j + p].ravel() for i, j in corners])

    def normalise(h):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)

    h, e = linear(network.embed_x, tokens) + np.asarray(network.position[...], float), condition(network, c, label)
    for block in network.blocks:
        scale, shift, gate, scale_in, shift_in, gate_in = np.split(linear(block.modulate, e), 6)
        across = (normalise(h) * (1 + scale) + shift).T
        h = h + gate * linear(block.spread, gelu(linear(block.gather, across))).T
        h = h + gate_in * linear(block.contract, gelu(linear(block.expand, normalise(h) * (1 + scale_in) + shift_in)))
    expected = np.zeros_like(x)
    for (i, j), values in zip(corners, linear(network.readout, normalise(h)), strict=True):
        expected[i : i + p, j : j + p] = values.reshape(p, p)
    found = network(jnp.asarray(x, jnp.float32), jnp.asarray(c), jnp.asarray(label))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_channels_stay_with_their_pixels():
    network = random_weights(PatchMixer((4, 4, 3), patch=2, width=5, num_blocks=1, token_width=3, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 3)))
    tokens = network._patches(x)
    np.testing.assert_array_equal(network._image(tokens, x.shape), x)
    np.testing.assert_array_equal(tokens[1], x[:2, 2:].ravel())


def test_no_label_is_any_label():
    network = random_weights(ResidualMLP(2, width=4, num_blocks=1, num_frequencies=2, num_classes=3, rngs=nnx.Rngs(0)))
    x, c = jnp.array([0.2, -1.0]), jnp.asarray(0.5)
    assert network(x, c) == network(x, c, jnp.asarray(3))
    assert network(x, c) != network(x, c, jnp.asarray(2))


def test_frequencies_along_axes_look_at_one_element_each():
    network = ResidualMLP(3, width=4, num_frequencies=7, axis_aligned=True, rngs=nnx.Rngs(0))
    rows = np.asarray(network.x_frequencies[...])
    assert np.array_equal(np.argmax(rows != 0, 1), np.arange(7) % 3)
    assert np.all(np.count_nonzero(rows, 1) == 1)


def test_a_module_says_how_it_was_made():
    for module in (
        ResidualMLP(3, 3, width=5, num_frequencies=2, bandwidth=0.2, reach=2.0, num_classes=4, rngs=nnx.Rngs(0)),
        PatchMixer((4, 4), patch=2, width=6, expansion=3, num_classes=2, rngs=nnx.Rngs(0)),
        ElementwiseMLP(3, width=5, context=2, limit=None, num_classes=2, rngs=nnx.Rngs(0)),
    ):
        again = type(module)(**module.arguments(), rngs=nnx.Rngs(0))
        assert nnx.split(again)[0] == nnx.split(module)[0]


def test_patches_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="multiples of patch = 4"):
        PatchMixer((10, 8), patch=4, rngs=nnx.Rngs(0))
