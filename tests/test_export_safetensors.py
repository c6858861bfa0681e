"""What leaves as safetensors: the tensors, what is beside them, and what is refused."""

import json
import os
import shutil
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path

import autoencoder_cases
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import test_families
from exported import a_tokenizer, flat, run_directory, weights

from transfusion_jax import files
from transfusion_jax.autoencoder.codec import load_codec, save_codec
from transfusion_jax.commands.main import main
from transfusion_jax.config import MeshConfig, TrainConfig
from transfusion_jax.config.stored import dumps
from transfusion_jax.export import safetensors as safetensors_export
from transfusion_jax.export import shards
from transfusion_jax.export.safetensors import write
from transfusion_jax.export.shards import Described, write_shards
from transfusion_jax.export.trained import open_trained
from transfusion_jax.model.published import (
    from_published,
    parameters,
    tensor_name,
    tensors,
    to_published,
)
from transfusion_jax.tensors import open_tensors
from transfusion_jax.training import arrays
from transfusion_jax.training.arrays import StoredArrays
from transfusion_jax.training.checkpoint import CheckpointError


def tiny_experiment(name="linear", **changes):
    small = test_families.experiment(name)
    return replace(small, model=replace(small.model, vocab_size=304, **changes))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with checkpoints of steps 3 and 6, of which the second was made on four devices."""
    path = tmp_path_factory.mktemp("exported") / "run"
    run_directory(path, tiny_experiment(), (3, 6), MeshConfig(data=1, fsdp=2, tensor=2))
    (path / "ledger.json").write_text(
        '{"synthetic": {"documents": 1200, "in_rows": 1100, "rows": 70}}'
    )
    return path


def exported(run_dir, out, *flags):
    assert main(["export", str(run_dir), "--format", "safetensors", "--out", str(out), *flags]) == 0
    return open_tensors(out)


def refused(capsys, *arguments) -> str:
    """What a command that must end with bad input says."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("name", test_families.FAMILIES)
def test_every_parameter_has_a_tensor_and_comes_back_from_it(name):
    experiment = tiny_experiment(name)
    ours = flat(weights(experiment, 0))
    known = parameters(experiment)
    assert ours.keys() == known.keys()
    found = {}
    for tensor in tensors(experiment):
        value = np.asarray(ours[tensor.parameter])
        value = value if tensor.layer is None else value[tensor.layer]
        published = to_published(tensor.parameter, value)
        assert published.shape == tensor.published_shape and value.shape == tensor.shape
        back = from_published(tensor.parameter, published, tensor.shape)
        np.testing.assert_array_equal(back, value)
        assert np.shares_memory(back, value)
        found[tensor.name] = published
    assert len(found) == len(list(tensors(experiment)))
    assert sum(x.size for x in found.values()) == sum(x.size for x in ours.values())


def test_names_are_those_of_torch():
    assert tensor_name("transformer.blocks.mlp.down_FD", 7) == "model.layers.7.mlp.down_proj.weight"
    for ours, published in {
        "embedding_VD": "model.embed_tokens.weight",
        "patches.in_ZD": "model.patches.in_proj.weight",
        "patches.time_out_DD": "model.patches.time_out.weight",
        "patches.down.0.1.norm_in.bias": "model.patches.down.0.1.norm_in.bias",
        "patches.up.1.0.conv_in.kernel": "model.patches.up.1.0.conv_in.weight",
    }.items():
        assert tensor_name(ours) == published


@pytest.mark.parametrize(
    ("flags", "seed"),
    [
        ([], 6),
        (["--step", "3"], 3),
        (["--weights", "raw"], 7),
        (["--step", "3", "--weights", "raw"], 4),
    ],
)
def test_the_weights_asked_for_leave_and_torch_users_can_read_them(run_dir, tmp_path, flags, seed):
    found = exported(run_dir, tmp_path / "out", *flags)
    experiment = tiny_experiment()
    ours = flat(weights(experiment, seed))
    q_DNH = np.asarray(ours["transformer.blocks.attention.q_DNH"][1])
    out_NHD = np.asarray(ours["transformer.blocks.attention.out_NHD"][0])
    x_D, y_D = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    read = safetensors.numpy.load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert read.keys() == found.keys()
    np.testing.assert_allclose(
        read["model.layers.1.self_attn.q_proj.weight"] @ x_D,
        np.einsum("d,dnh->nh", x_D, q_DNH).reshape(-1),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        read["model.layers.0.self_attn.o_proj.weight"] @ y_D,
        np.einsum("nh,nhd->d", y_D.reshape(4, 8), out_NHD),
        rtol=1e-5,
    )
    for tensor in tensors(experiment):
        value = np.asarray(ours[tensor.parameter])
        value = value if tensor.layer is None else value[tensor.layer]
        np.testing.assert_array_equal(read[tensor.name], to_published(tensor.parameter, value))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["step"] == (3 if "--step" in flags else 6)
    assert config["weights"] == ("raw" if "--weights" in flags else "average")


def test_bfloat16_is_the_nearest(run_dir, tmp_path):
    whole, half = (
        exported(run_dir, tmp_path / dtype, "--dtype", dtype) for dtype in ("float32", "bfloat16")
    )
    assert {x.dtype for x in half.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for name, tensor in whole.items():
        np.testing.assert_array_equal(half[name], tensor.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_are_bounded_and_their_index_is_right(tmp_path):
    values = {f"t{i}": np.full((5, 4), i, np.float32) for i in range(5)}
    planned = {name: Described(x.shape, x.dtype) for name, x in values.items()}
    write_shards(tmp_path, planned, values.items(), largest=170)  # two tensors of 80 bytes
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 400
    files = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert index["weight_map"] == dict(
        zip(values, [files[0], files[0], files[1], files[1], files[2]], strict=True)
    )
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == files
    for name, file in index["weight_map"].items():
        read = safetensors.numpy.load_file(tmp_path / file)
        np.testing.assert_array_equal(read[name], values[name])
    with safetensors.safe_open(tmp_path / files[0], framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers asks for it
    assert shards.LARGEST == 5 * 10**9


def test_a_part_of_one_array_is_held_at_a_time(run_dir, tmp_path, monkeypatch):
    trained = open_trained(run_dir, None, "average", print)
    whole = exported(run_dir, tmp_path / "whole")
    held, read = [], StoredArrays._rows

    def watched(self, name, start, stop):
        assert all(reference() is None for reference in held), name
        assert stop - start == 1 or not trained.stacked(name)
        array = read(self, name, start, stop)
        held.append(weakref.ref(array))
        return array

    monkeypatch.setattr(arrays, "MOST", 1)
    trained.arrays.verify()
    monkeypatch.setattr(StoredArrays, "_rows", watched)
    write(trained, tmp_path, "float32", print)
    layers = trained.experiment.model.layers
    assert len(held) == sum(layers if trained.stacked(name) else 1 for name in trained.shapes)
    for name, tensor in open_tensors(tmp_path).items():
        np.testing.assert_array_equal(tensor, whole[name])


def test_what_is_beside_the_tensors(run_dir, tmp_path):
    exported(run_dir, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.model", "README.md"} <= names
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == a_tokenizer().model
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Transfusion"]
    assert config["text_config"]["rope_theta"] == 100.0
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 100.0
    assert config["text_config"]["num_key_value_heads"] == 2
    assert config["image_config"]["patch_size"] == 2
    assert config["diffusion_config"]["num_train_timesteps"] == 100
    assert (config["boi_token_id"], config["eoi_token_id"]) == (298, 299)
    assert (config["tokenizer_size"], config["text_config"]["vocab_size"]) == (300, 304)
    sampling = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sampling["max_new_tokens"] == 20 and sampling["do_sample"] is False
    assert sampling["image_sampler"]["context_timestep"] == 7
    stored = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert stored == json.loads((run_dir / "config.json").read_text())


@pytest.mark.parametrize("config", [autoencoder_cases.SMALL, autoencoder_cases.VQ])
def test_the_autoencoder_and_the_tokenizer_leave_for_diffusers_and_transformers(
    run_dir, tmp_path, config
):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    save_codec(copy / "autoencoder", config, autoencoder_cases.parameters(config), 0.5, 0.25)
    exported(copy, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())
    kind = {"kl": "AutoencoderKL", "vq": "VQModel"}[config.kind]
    assert described["_class_name"] == kind and described["scaling_factor"] == 0.5
    if config.kind == "kl":
        ours, theirs = (load_codec(path) for path in (copy / "autoencoder", tmp_path / "out/vae"))
        assert (theirs.scale, theirs.shift) == (0.5, 0.25)
        x_BHWC = autoencoder_cases.images(1, 16, 16, 3)
        np.testing.assert_array_equal(ours.encode(x_BHWC)[0], theirs.encode(x_BHWC)[0])
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert tokenizer["added_tokens"][-1]["id"] == 299  # EOI
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_an_autoencoder_that_diffusers_does_not_have_leaves_as_it_is(run_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    config = replace(autoencoder_cases.VQ, latent_projection=False)
    save_codec(copy / "autoencoder", config, autoencoder_cases.parameters(config), 1.0, 0.0)
    exported(copy, tmp_path / "out")
    assert "the autoencoder is as this package has it: diffusers" in capsys.readouterr().out
    ours, theirs = (load_codec(path) for path in (copy / "autoencoder", tmp_path / "out/vae"))
    assert ours.digest == theirs.digest


def test_the_card_has_settings_data_metrics_and_licence(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    exported(copy, tmp_path / "bare")
    assert "no `summary.json`" in (tmp_path / "bare" / "README.md").read_text()
    (copy / "summary.json").write_text('{"steps": 6, "accuracy": 0.987654321, "goodput": {"a": 1}}')
    exported(copy, tmp_path / "last")
    exported(copy, tmp_path / "raw", "--weights", "raw")
    card, raw = ((tmp_path / name / "README.md").read_text() for name in ("last", "raw"))
    assert card.startswith("---\nlicense: unknown\n") and "## Licence" in card
    exported(copy, tmp_path / "free", "--license", "CC-BY-4.0")
    free = (tmp_path / "free" / "README.md").read_text()
    assert free.startswith("---\nlicense: cc-by-4.0\n") and "under CC-BY-4.0." in free
    count = sum(x.size for x in open_tensors(tmp_path / "last").values())
    assert f"One transformer of {count:,} parameters" in card
    assert "| synthetic | 1 | 1,200 | 1,100 | 70 |" in card
    assert "| accuracy | 0.987654 |" in card and "| heads, of keys and values | 4, 2 |" in card
    note = "not of the weights here"
    assert note in raw and note not in card


def test_a_damaged_checkpoint_is_named_and_the_one_before_leaves(run_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    progress = copy / "checkpoints" / "6" / "ema" / "d"
    for path in [*progress.iterdir(), *(progress.parent / "ocdbt.process_0" / "d").iterdir()]:
        content = bytearray(path.read_bytes())
        for at in range(len(content) // 2, len(content) // 2 + 8):
            content[at] ^= 0xFF
        path.write_bytes(content)
    exported(copy, tmp_path / "out")
    said = capsys.readouterr().out
    assert "checkpoints/6 is damaged" in said and "average weights of step 3 of" in said
    with pytest.raises(CheckpointError, match="no checkpoint of step 6 in"):
        open_trained(copy, 6, "average", print)
    for text in ("[]", '{"tree_metadata": null}', '{"tree_metadata": {"a": 5}}'):
        (copy / "checkpoints" / "6" / "ema" / "_METADATA").write_text(text)
        assert open_trained(copy, None, "average", print).step == 3


def test_a_checkpoint_that_goes_while_it_leaves_is_one_line(run_dir, tmp_path, monkeypatch, capsys):
    """A trainer deletes old ones."""
    copy = shutil.copytree(run_dir, tmp_path / "run")
    write_shards = safetensors_export.write_shards

    def gone(*arguments):
        shutil.rmtree(copy / "checkpoints" / "6")
        write_shards(*arguments)

    monkeypatch.setattr(safetensors_export, "write_shards", gone)
    words = ["export", str(copy), "--format", "safetensors", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_an_export_is_on_the_disk_before_it_has_its_name(run_dir, tmp_path, monkeypatch):
    """A machine that goes down would otherwise leave the name with empty files."""
    synced, named = set(), []
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: synced.add(os.readlink(f"/proc/self/fd/{fd}"))
    )
    replace_ = os.replace

    def renamed(source, target):
        if Path(target).name == "out":
            named.extend(str(x) for x in (Path(source), *Path(source).rglob("*")))
            assert set(named) <= synced
        replace_(source, target)

    monkeypatch.setattr(files.os, "replace", renamed)
    exported(run_dir, tmp_path / "out")
    assert len(named) > 8


def test_a_signal_clears_away_what_is_half_written(run_dir, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(safetensors_export, "write_shards", stopped)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    words = ["export", str(run_dir), "--format", "safetensors", "--out", str(tmp_path / "out")]
    try:
        assert main(words) == 1
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_checksum_of_what_leaves_is_compared(run_dir, monkeypatch, capsys):
    """A value that decodes, but is not the one that was saved."""
    read = StoredArrays._rows

    def changed(self, name, *rows):
        array = read(self, name, *rows)
        if name == "patches.in_ZD":
            array = array.copy()
            array[1, 1] = np.nextafter(array[1, 1], np.float32(9))
        return array

    monkeypatch.setattr(StoredArrays, "_rows", changed)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_trained(run_dir, None, "average", print)
    assert "checksum" in capsys.readouterr().out


def test_bad_input_is_one_line(run_dir, tmp_path, capsys):
    def export(run, *flags, format="safetensors", out=tmp_path / "out"):
        return refused(capsys, "export", run, "--format", format, "--out", out, *flags)

    assert "no config.json" in export(tmp_path / "nothing")
    assert "invalid choice: 'onnx'" in export(run_dir, format="onnx")
    assert "no checkpoint of step 4" in export(run_dir, "--step", "4")
    empty = tmp_path / "fresh"
    empty.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(run_dir / name, empty)
    assert "there is no checkpoint" in export(empty)
    full = tmp_path / "full"
    full.mkdir()
    (full / "photo.png").touch()
    assert "is not empty: it holds photo.png" in export(run_dir, out=full)
    assert "is a file" in export(run_dir, out=full / "photo.png")
    for licence in ("my own", "", "mit\n", '"mit"'):
        assert "is no identifier of a licence" in export(run_dir, "--license", licence)
    assert "llama has no model card" in export(run_dir, "--license", "mit", format="llama")
    assert "cannot be made" in export(run_dir, out="/proc/export")
    place = run_dir / "checkpoints" / "99"
    assert "is among the run's checkpoints" in export(run_dir, out=place) and not place.exists()
    broken = shutil.copytree(run_dir, tmp_path / "broken")
    (broken / "summary.json").write_text("[1]")
    assert "summary.json is damaged: not a JSON object" in export(broken)
    (broken / "summary.json").unlink()
    for ledger in ('{"synthetic": 5}', '{"synthetic": {"documents": "x"}}', "{"):
        (broken / "ledger.json").write_text(ledger)
        assert "ledger.json is damaged" in export(broken)
    (broken / "config.json").write_bytes(b"\xff")
    assert "config.json does not hold an experiment" in export(broken)
    (broken / "config.json").unlink()
    (broken / "config.json").mkdir()
    assert "it has no config.json" in export(broken)
    other = shutil.copytree(run_dir, tmp_path / "other")
    changed = replace(tiny_experiment(), train=TrainConfig())
    changed = replace(changed, model=replace(changed.model, mlp_width=64))
    (other / "config.json").write_text(dumps(changed))
    said = export(other)
    assert "transformer.blocks.mlp.down_FD (2, 48, 32) instead of (2, 64, 32)" in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))


def test_a_link_is_followed_and_the_working_directory_stays(run_dir, tmp_path, capsys, monkeypatch):
    """It cannot be renamed to a link, and a shell would be left in a directory that is gone."""
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    exported(run_dir, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = refused(capsys, "export", run_dir, "--format", "safetensors", "--out", ".")
    assert "is the working directory" in said and not list((tmp_path / "here").iterdir())
