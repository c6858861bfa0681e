"""U-Net patches against the same network written with torch, from the module's docstring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transfusion_jax.config import ImageConfig, ModelConfig
from transfusion_jax.model.patches.timestep import sinusoid
from transfusion_jax.model.patches.unet import UNetPatches

torch = pytest.importorskip("torch")
F = torch.nn.functional

WIDTHS, D = (8, 12, 16), 20
IMAGE = ImageConfig(8, 16, 3, 4)


def made(blocks: int, remat: str = "none", position: str = "learned") -> UNetPatches:
    """Random weights everywhere, those that start at zero included."""
    config = ModelConfig(
        width=D,
        heads=2,
        compute_dtype="float32",
        patch_encoder="unet",
        unet_widths=WIDTHS,
        unet_blocks=blocks,
        patch_position=position,
        remat=remat,
    )
    graph, state = nnx.split(UNetPatches(config, IMAGE, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / max(np.prod(x.shape[:-1]), 4) ** 0.5,
                              jnp.float32),
        nnx.to_pure_dict(state),
    )  # fmt: skip
    return nnx.merge(graph, drawn)


class Torch:
    """The network of a `UNetPatches`, on one image [c, h, w] at one timestep."""

    def __init__(self, patches: UNetPatches):
        self.patches = patches

    def conv(self, layer, x, stride=1):
        kernel = torch.from_numpy(np.array(layer.kernel[...])).permute(3, 2, 0, 1)
        bias = torch.from_numpy(np.array(layer.bias[...]))
        if kernel.shape[-1] == 3:
            x = F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        return F.conv2d(x[None], kernel, bias, stride)[0]

    def norm(self, layer, x):
        scale, bias = (torch.from_numpy(np.array(p[...])) for p in (layer.scale, layer.bias))
        return F.layer_norm(x.permute(1, 2, 0), scale.shape, scale, bias, 1e-5).permute(2, 0, 1)

    def matrix(self, parameter):
        return torch.from_numpy(np.array(parameter[...]))

    def block(self, layer, x, time):
        y = self.conv(layer.conv_in, F.silu(self.norm(layer.norm_in, x)))
        y = y + (time @ self.matrix(layer.time_Ec))[:, None, None]
        y = self.conv(layer.conv_out, F.silu(self.norm(layer.norm_out, y)))
        return y + (x if layer.shortcut is None else self.conv(layer.shortcut, x))

    def time(self, t):
        p = self.patches
        waves = torch.from_numpy(np.array(sinusoid(jnp.asarray([[t]]))[0, 0]))
        return F.silu(F.silu(waves @ self.matrix(p.time_in)) @ self.matrix(p.time_out))

    def encode(self, x, t):
        p, skips, time = self.patches, [], self.time(t)
        x = self.conv(p.conv_in, x)
        for level, blocks in enumerate(p.down):
            if level:
                x = self.conv(p.halve[level - 1], x, stride=2)
            for block in blocks:
                x = self.block(block, x, time)
                skips.append(x)
        vectors = x.flatten(1).T @ self.matrix(p.in_cD)
        return vectors + self.matrix(p.position_PD), skips

    def decode(self, hidden, skips, t):
        p, time = self.patches, self.time(t)
        x = (hidden @ self.matrix(p.out_Dc)).T.reshape(skips[-1].shape)
        for level in (2, 1, 0):
            if level < 2:
                x = self.conv(p.double[level], F.interpolate(x[None], scale_factor=2)[0])
            for block in p.up[level]:
                x = self.block(block, torch.cat([x, skips.pop()]), time)
        return self.conv(p.conv_out, F.silu(self.norm(p.norm_out, x)))


@pytest.mark.long
@pytest.mark.parametrize("blocks", [1, 2])
def test_encoder_and_decoder_are_those_of_torch(blocks):
    patches = made(blocks)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, *IMAGE.shape)).astype(np.float32)
    hidden = rng.normal(size=(2, 3, IMAGE.patches, D)).astype(np.float32)
    t = np.asarray([[0, 5, 50], [300, 700, 999]], np.int32)
    vectors, carried = patches.encode(jnp.asarray(images), jnp.asarray(t))
    predicted = patches.decode(jnp.asarray(hidden), carried)
    theirs = Torch(patches)
    for b, m in np.ndindex(2, 3):
        image = torch.from_numpy(images[b, m]).permute(2, 0, 1)
        expected, skips = theirs.encode(image, t[b, m])
        np.testing.assert_allclose(vectors[b, m], expected, rtol=1e-3, atol=1e-4)
        drawn = theirs.decode(torch.from_numpy(hidden[b, m]), skips, t[b, m]).permute(1, 2, 0)
        np.testing.assert_allclose(predicted[b, m], drawn, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    images = jax.random.normal(jax.random.key(0), (1, 2, *IMAGE.shape))
    t = jnp.asarray([[3, 800]], jnp.int32)
    found = []
    for remat in ("none", "full"):
        graph, state = nnx.split(made(1, remat))

        def loss(state, graph=graph):
            patches = nnx.merge(graph, state)
            vectors, carried = patches.encode(images, t)
            return jnp.sum(jnp.sin(patches.decode(jnp.sin(vectors), carried)))

        found.append(jax.tree.leaves(jax.grad(loss)(state)))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_fresh_network_predicts_zero():
    config = ModelConfig(
        width=D, heads=2, compute_dtype="float32", patch_encoder="unet", unet_widths=WIDTHS
    )
    patches = UNetPatches(config, IMAGE, rngs=nnx.Rngs(params=0))
    vectors, carried = patches.encode(jnp.ones((1, 1, *IMAGE.shape)), jnp.zeros((1, 1), jnp.int32))
    assert np.abs(np.asarray(vectors)).max() > 0
    np.testing.assert_array_equal(patches.decode(vectors, carried), 0)
