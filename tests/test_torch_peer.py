"""The PyTorch peer of the benchmarks does what our step does, so its speed may be compared."""

import importlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.diffusion.process import draw_training_noise
from transfusion_jax.pretraining.objective import batch_losses

torch = pytest.importorskip("torch")
# On a CPU its slow version is meant.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("torch_peer")


def shapes(kv_heads: int):
    """Rows of web-like lengths, packed and with images, of a tiny model."""
    experiment = tiny.small()
    model = replace(experiment.model, kv_heads=kv_heads, vocab_size=320)
    data = replace(experiment.data, row_length=96, batch_rows=4)
    return replace(experiment, model=model, data=data)


def as_peer(parameters: dict) -> dict:
    """Our parameters, or their gradients, under the peer's names and in its layout."""
    blocks = parameters["transformer"]["blocks"]
    attention, mlp, patches = blocks["attention"], blocks["mlp"], parameters["patches"]
    layers, D = attention["q_DNH"].shape[:2]
    flat = {name: attention[name].reshape(layers, D, -1) for name in ("q_DNH", "k_DKH", "v_DKH")}
    named = {
        "embedding": parameters["embedding_VD"],
        "output": parameters["output_DV"].T,
        "norm": parameters["transformer"]["norm"]["scale"],
        "time_in": patches["time_in"].T,
        "time_out": patches["time_out_DD"].T,
        "time_patch": patches["time_patch_DZ"].T,
        "patch_in": patches["in_ZD"].T,
        "patch_out": patches["out_DZ"].T,
    }
    for i in range(layers):
        named |= {
            f"blocks.{i}.attention_norm": blocks["attention_norm"]["scale"][i],
            f"blocks.{i}.qkv": np.concatenate([x[i] for x in flat.values()], -1).T,
            f"blocks.{i}.out": attention["out_NHD"][i].reshape(D, D).T,
            f"blocks.{i}.mlp_norm": blocks["mlp_norm"]["scale"][i],
            f"blocks.{i}.gate_up": np.concatenate([mlp["gate_DF"][i], mlp["up_DF"][i]], -1).T,
            f"blocks.{i}.down": mlp["down_FD"][i].T,
        }
    return {f"{name}.weight": torch.from_numpy(np.array(x)) for name, x in named.items()}


@pytest.mark.parametrize(("kv_heads", "remat"), [(4, False), (2, True)])
def test_losses_and_gradients_equal_ours(peer, kv_heads, remat):
    """FlexAttention has no backward pass on a CPU, so its loss alone is compared."""
    experiment = shapes(kv_heads)
    plan = tiny.planned(experiment)
    parameters = tiny.random_parameters(plan, seed=6)
    rows = Data(experiment, train_tokenizer(["synthetic text"], 300)).batches()[0]
    assert (rows.image_start_BM < 96).any() and (rows.segment_BL == 2).any()
    batch = jax.tree.map(jnp.asarray, rows)
    noise = draw_training_noise(jax.random.key(1), batch.image_limit_BM, batch.latents_BMhwc)

    @jax.jit
    @jax.value_and_grad
    def ours(parameters):
        model = nnx.merge(plan.graph, parameters)
        return batch_losses(model, batch, batch, noise, experiment.train).total

    expected, gradients = ours(parameters)
    model = peer.Transfusion(experiment, remat)
    missing = model.load_state_dict(as_peer(jax.device_get(parameters)), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == {"alpha", "sigma", "rope", "waves"}
    arrays = (
        peer.tensors(rows, "cpu"),
        torch.from_numpy(np.array(noise.noise_BMhwc)),
        torch.from_numpy(np.array(noise.t_BM)).long(),
    )
    with torch.no_grad():
        flex, _, _ = model(*arrays, peer.Intervals(4, 96, "cpu", flex=True))
    loss, text, image = model(*arrays, peer.Intervals(4, 96, "cpu", flex=False))
    assert flex.item() == pytest.approx(float(expected), rel=1e-5)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert text > 0 and image > 0
    loss.backward()
    theirs = dict(model.named_parameters())
    for name, gradient in as_peer(jax.device_get(gradients)).items():
        error = torch.linalg.vector_norm(theirs[name].grad - gradient)
        assert error <= 1e-4 * torch.linalg.vector_norm(gradient), name


def test_a_step_learns_and_averages(peer):
    experiment = shapes(4)
    rows = peer.tensors(
        Data(experiment, train_tokenizer(["synthetic text"], 300)).batches()[0], "cpu"
    )
    torch.manual_seed(0)
    model = peer.Transfusion(experiment)
    trainer = peer.Trainer(model, experiment, "cpu")
    first = float(trainer.step(rows))
    for _ in range(20):
        last = float(trainer.step(rows))
    assert last < 0.8 * first
    far, near = trainer.average[0] - trainer.weights[0], trainer.weights[0]
    assert 0 < torch.linalg.vector_norm(far) < torch.linalg.vector_norm(near)


def test_the_package_gets_the_text_and_images_of_a_row_in_order(peer):
    package = importlib.import_module("transfusion_pytorch_peer")
    experiment = shapes(4)
    batch = Data(experiment, train_tokenizer(["synthetic text"], 300)).batches()[0]
    for b, row in enumerate(package.samples(batch, experiment.image)):
        used = int((batch.segment_BL[b] > 0).sum())
        images = [x for x in row if x.is_floating_point()]
        assert sum(map(len, row)) == used
        assert len(images) == batch.image_weight_BM[b].sum()
        text = np.concatenate([x for x in row if not x.is_floating_point()])
        np.testing.assert_array_equal(text, batch.tokens_BL[b, :used][text_places(batch, b, used)])
        at = 0
        for piece in row:
            if piece.is_floating_point():
                (slot,) = np.flatnonzero(batch.image_start_BM[b] == at)
                first = batch.latents_BMhwc[b, slot, :2, :2].reshape(-1)
                np.testing.assert_array_equal(piece[0], first)
            at += len(piece)


def text_places(batch, b, used):
    """Which positions of a row are no patches."""
    patches = np.zeros(used, bool)
    size = batch.latents_BMhwc.shape[2:]
    for start in batch.image_start_BM[b]:
        patches[start : start + size[0] * size[1] // 4] = True
    return ~patches
