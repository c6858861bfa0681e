"""Runs that start from weights: `import safetensors` and `train.initial`."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_families
from autoencoder_cases import SMALL, parameters
from exported import a_tokenizer, flat, planned, run_directory, weights
from test_export_safetensors import refused, tiny_experiment

from transfusion_jax.autoencoder.codec import save_codec
from transfusion_jax.commands.main import main
from transfusion_jax.config import (
    DiffusionConfig,
    Experiment,
    MeshConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from transfusion_jax.config.stored import dumps, loads
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.preflight.data import data_facts, initial_facts
from transfusion_jax.pretraining import initial
from transfusion_jax.pretraining import run as run_module
from transfusion_jax.pretraining.initial import initialise_from, open_weights
from transfusion_jax.pretraining.run import open_run
from transfusion_jax.tensors import open_tensors
from transfusion_jax.training.checkpoint import Checkpoints

MESHES = {
    "one device": MeshConfig(data=1),
    "another mesh": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}


def export(run_dir, out, *flags):
    flags = ["--format", "safetensors", "--out", str(out), *flags]
    assert main(["export", str(run_dir), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of `tiny_experiment()` with weights of seed 3."""
    path = tmp_path_factory.mktemp("initial")
    run = run_directory(path / "run", tiny_experiment(), mesh=MeshConfig(data=1, fsdp=2))
    return export(run, path / "out")


def start(directory, experiment, mesh=MESHES["one device"], said=None):
    """The state of step 0 of a run that starts from a directory."""
    report = ([] if said is None else said).append
    plan = planned(experiment, mesh)
    return initialise_from(str(directory), plan, a_tokenizer(), report)(), plan


def same(left, right):
    left, right = flat(jax.device_get(left)), flat(jax.device_get(right))
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("linear", "one device"), *((name, "another mesh") for name in test_families.FAMILIES)],
)
def test_a_run_starts_from_an_import_of_an_export_on_any_mesh(name, mesh, tmp_path):
    experiment = tiny_experiment(name)
    out = export(run_directory(tmp_path / "run", experiment), tmp_path / "out")
    assert main(["import", "safetensors", str(out), "--out", str(tmp_path / "in")]) == 0
    state, plan = start(tmp_path / "in", experiment, MESHES[mesh])
    same(state.parameters, weights(experiment, 3))
    same(state.ema, weights(experiment, 3))
    assert int(state.step) == 0
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.optimizer))
    for found, expected in zip(*map(jax.tree.leaves, (state, plan.abstract)), strict=True):
        assert found.sharding.is_equivalent_to(expected.sharding, found.ndim)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_an_import_is_a_checked_copy_that_needs_nothing_of_the_export(exported, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "moved")
    assert main(["import", "safetensors", str(moved), "--out", str(tmp_path / "in")]) == 0
    shutil.rmtree(moved)
    before, after = open_tensors(exported), open_tensors(tmp_path / "in")
    assert list(before) == list(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])
    start(tmp_path / "in", tiny_experiment())


def test_weights_that_are_not_finite_are_no_import(exported, tmp_path, capsys):
    moved = shutil.copytree(exported, tmp_path / "moved")
    (file,) = moved.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    tensors["model.norm.weight"][3] = np.inf
    safetensors.numpy.save_file(tensors, file)
    assert main(["import", "safetensors", str(moved), "--out", str(tmp_path / "in")]) == 2
    said = capsys.readouterr().err
    assert said == "error: model.norm.weight has numbers that are not finite\n"
    assert not (tmp_path / "in").exists()


def test_rounded_weights_and_raw_ones_start_a_run_too(tmp_path):
    experiment = tiny_experiment()
    run = run_directory(tmp_path / "run", experiment)
    out = export(run, tmp_path / "out", "--dtype", "bfloat16", "--weights", "raw")
    state, _ = start(out, experiment)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), weights(experiment, 4))
    same(state.parameters, rounded)
    assert {x.dtype for x in jax.tree.leaves(state.parameters)} == {np.dtype(np.float32)}


def test_weights_of_text_alone_leave_the_rest_to_the_seed(tmp_path):
    llama = tiny_experiment("llama")
    out = export(run_directory(tmp_path / "run", llama), tmp_path / "out")
    said = []
    experiment = tiny_experiment("linear")
    state, plan = start(out, experiment, said=said)
    text, drawn = flat(weights(llama, 3)), flat(plan.initialise().parameters)
    for name, value in flat(state.parameters).items():
        expected = drawn[name] if name.startswith("patches.") else text[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert any("5 parameters of patches are drawn from the seed" in line for line in said)


def changed(experiment, part, **changes):
    return replace(experiment, **{part: replace(getattr(experiment, part), **changes)})


@pytest.mark.parametrize(
    ("part", "changes", "problem"),
    [
        (
            "model",
            {"mlp_width": 64},
            r"down_proj\.weight \(32, 48\) instead of \(32, 64\); .* more",
        ),
        ("model", {"layers": 3}, r"model\.layers\.2\..* missing instead of"),
        ("model", {"layers": 1}, r"model\.layers\.1\..* instead of nothing"),
        ("model", {"patch_position": "learned"}, "image_config.patch_position 'rope' -> 'learned'"),
        # The shapes are the same, and the weights mean something else.
        ("model", {"heads": 2, "kv_heads": 1}, "text_config.num_attention_heads 4 -> 2"),
        ("model", {"rope_theta": 99.0}, "text_config.rope_theta 100.0 -> 99.0"),
        ("model", {"norm_placement": "post"}, "text_config.norm_placement 'pre' -> 'post'"),
        ("image", {"channels": 4, "patch": 1}, "image_config.channels 1 -> 4"),
        ("model", {"timestep": "after"}, "image_config.timestep 'before' -> 'after'"),
    ],
)
def test_weights_of_another_model_are_refused(exported, part, changes, problem):
    experiment = changed(tiny_experiment(), part, **changes)
    with pytest.raises(ValueError, match=problem):
        open_weights(str(exported), experiment)


def test_what_may_differ_is_said(exported):
    experiment = replace(tiny_experiment(), diffusion=DiffusionConfig(steps=200, prediction="v"))
    said = []
    start(exported, experiment, said=said)
    assert "  diffusion_config.num_train_timesteps 100 -> 200" in said
    assert "  diffusion_config.prediction_type 'epsilon' -> 'v'" in said
    same(start(exported, tiny_experiment(), said=[])[0].parameters, weights(tiny_experiment(), 3))


def test_codes_of_another_number_are_refused(tmp_path):
    """Rows of an embedding are as many with more codes and fewer tokens, and mean something
    else."""
    chameleon = tiny_experiment("chameleon")
    out = export(run_directory(tmp_path / "run", chameleon), tmp_path / "out")
    codes = chameleon.image.codes
    other = replace(
        chameleon,
        image=replace(chameleon.image, codes=codes - 2),
        model=replace(chameleon.model, vocab_size=chameleon.model.vocab_size + 2),
    )
    with pytest.raises(ValueError, match=f"image_config.codes {codes} -> {codes - 2}"):
        start(out, other)


def test_images_of_another_autoencoder_are_said(tmp_path):
    run = run_directory(tmp_path / "run", tiny_experiment())
    for seed, place in ((1, run / "autoencoder"), (2, tmp_path / "other")):
        save_codec(place, SMALL, parameters(SMALL, seed), 1.0, 0.0)
    out = export(run, tmp_path / "out")
    for place, differs in ((run / "autoencoder", 0), (tmp_path / "other", 1), (None, 0)):
        said = []
        plan = planned(tiny_experiment(), MESHES["one device"])
        initialise_from(str(out), plan, a_tokenizer(), said.append, place)
        assert len([line for line in said if "another autoencoder" in line]) == differs


def test_check_asks_for_the_tokenizer_of_the_weights(exported, tmp_path):
    def found(experiment: Experiment) -> str | None:
        data = data_facts(experiment, tmp_path / "run")
        assert not any("problem" in fact for fact in data.values())
        return initial_facts(experiment, tmp_path / "run")[str(exported)].get("problem")

    experiment = a_run(exported)
    assert found(experiment) is None
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["five numbers and six"] * 20, 290).model)
    asked = replace(experiment, tokenizer=TokenizerConfig(path=str(other)))
    assert "was trained with another tokenizer" in found(asked)


def test_weights_without_a_tokenizer_need_one_with_their_special_tokens(exported, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "moved")
    (moved / "tokenizer.model").unlink()
    start(moved, tiny_experiment())
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(
        json.dumps(config | {"boi_token_id": config["boi_token_id"] + 1})
    )
    with pytest.raises(ValueError, match="came without a tokenizer; BOI is token 299 of theirs"):
        start(moved, tiny_experiment())


# A whole run


def a_run(exported, **changes) -> Experiment:
    """A run of two steps on built-in data, from the export."""
    base = replace(
        tiny_experiment(),
        name="from_weights",
        train=TrainConfig(steps=2, initial=str(exported), vocab_chunk=20, **changes),
    )
    base = changed(base, "data", sources=(SourceConfig("synthetic"),), batch_rows=8)
    base = changed(base, "tokenizer", path=str(exported / "tokenizer.model"))
    return changed(base, "optimizer", warmup_steps=0)


@pytest.mark.long
def test_a_new_run_starts_from_weights_and_a_resumed_one_does_not_read_them(exported, tmp_path):
    source = shutil.copytree(exported, tmp_path / "weights")
    experiment, said = a_run(source), []
    run = open_run(experiment, tmp_path / "run", said.append)
    state = run.initialise()
    same(state.ema, weights(tiny_experiment(), 3))
    assert f"starting from the weights in {source}" in said
    run.directory.save(replace(state, step=jax.numpy.int32(1)), 0.0)
    run.directory.close()
    stored = loads((tmp_path / "run" / "config.json").read_text(), "config.json")
    assert stored.train.initial == str(source)
    for path in source.glob("*.safetensors"):
        path.unlink()
    run = open_run(experiment, tmp_path / "run", said.append)
    same(run.directory.state.parameters, weights(tiny_experiment(), 3))
    run.directory.close()
    assert sum("starting from" in line for line in said) == 1
    other = changed(experiment, "train", initial=str(tmp_path))
    with pytest.raises(ValueError, match=r"another config; what differs: train\.initial"):
        open_run(other, tmp_path / "run", said.append)


def test_a_run_that_cannot_start_leaves_no_directory(exported, tmp_path):
    wrong = changed(a_run(exported), "model", mlp_width=64)
    with pytest.raises(ValueError, match="do not fit the model"):
        open_run(wrong, tmp_path / "run", print)
    assert not (tmp_path / "run").exists()


def test_check_finds_weights_that_do_not_fit(exported, tmp_path):
    experiment = a_run(exported)
    facts = initial_facts(experiment, tmp_path / "run")
    assert list(facts) == [str(exported)] and len(facts[str(exported)]["digest"]) == 64
    wrong = initial_facts(changed(experiment, "model", mlp_width=64), tmp_path / "run")
    assert "do not fit the model" in wrong[str(exported)]["problem"]
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)  # it is resumed
    assert initial_facts(experiment, tmp_path / "run") == {}
    assert initial_facts(tiny_experiment(), tmp_path) == {}


def test_another_tokenizer_is_refused_by_name(exported):
    other = train_tokenizer(["five numbers and six"] * 20, 290)
    with pytest.raises(ValueError, match=r"--tokenizer\.path .*/tokenizer\.model"):
        initialise_from(str(exported), planned(tiny_experiment()), other, print)


def test_what_one_process_finds_all_raise(exported, monkeypatch):
    monkeypatch.setattr(initial, "gathered", lambda own: [own, "it is not here"])
    with pytest.raises(ValueError, match="^process 1: it is not here"):
        start(exported, tiny_experiment())


@pytest.mark.parametrize("steps", [[], [3]])
def test_one_process_says_whether_the_run_has_begun(exported, tmp_path, monkeypatch, steps):
    """What each sees for itself on a network file system may differ for a while."""
    begun = []
    monkeypatch.setattr(run_module, "gathered", lambda own: [steps, own])
    monkeypatch.setattr(run_module, "initialise_from", lambda *_: begun.append("from weights"))
    open_run(a_run(exported), tmp_path / "run", lambda said: None).directory.close()
    assert begun == ([] if steps else ["from weights"])


def test_bad_input_is_one_line(exported, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from transfusion_jax.config.stored import loads\n"
        f"def config(): return loads({dumps(a_run(exported))!r}, 'own')\n"
    )

    def train(initial, *flags):
        flags = ["--run-dir", tmp_path / "run", "--train.initial", initial, *flags]
        return refused(capsys, "train", tmp_path / "own.py", *flags)

    assert "is not a directory" in train(tmp_path / "nothing")
    assert "not a local path" in train("gs://bucket/weights")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is a pickle" in train(bare)
    for path in exported.glob("model*"):
        shutil.copy(path, bare)
    assert "has no config.json of an export or import" in train(bare)
    short = shutil.copytree(exported, tmp_path / "short")
    file = short / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "safetensors is damaged" in train(short)
    assert "instead of" in train(exported, "--model.mlp-width", "64")

    def imported(source, name="safetensors", out=tmp_path / "in"):
        return refused(capsys, "import", name, source, "--out", out)

    assert "invalid choice: 'onnx'" in imported(exported, "onnx")
    assert "no such file or directory" in imported(tmp_path / "nothing")
    assert "is not empty" in imported(exported, out=bare)
    (bare / "model.safetensors.index.json").unlink()
    assert "it has no experiment.json" in imported(bare)
    assert "safetensors is damaged" in imported(short)
    other = shutil.copytree(exported, tmp_path / "other")
    fields = json.loads((other / "experiment.json").read_text())
    fields["model"]["mlp_width"] = 64
    (other / "experiment.json").write_text(json.dumps(fields))
    said = imported(other)
    assert "do not fit its experiment.json" in said and said.count("instead of") == 3
    assert not (tmp_path / "in").exists() and not (tmp_path / "run").exists()


def test_an_import_whose_files_disagree_is_one_line(exported, tmp_path, capsys):
    def imported(name, change) -> str:
        moved = shutil.copytree(exported, tmp_path / "moved", dirs_exist_ok=True)
        (moved / name).write_bytes(change((moved / name).read_bytes()))
        return refused(capsys, "import", "safetensors", moved, "--out", tmp_path / "in")

    def config(change):
        return lambda content: json.dumps(change(json.loads(content))).encode()

    other = config(lambda x: {**x, "text_config": {**x["text_config"], "rope_theta": 5.0}})
    said = imported("config.json", other)
    assert "is not of the model and tokenizer beside it: text_config.rope_theta is 5.0" in said
    bare = config(lambda x: {name: part for name, part in x.items() if name != "image_config"})
    assert "it has no image_config" in imported("config.json", bare)
    moved_boi = config(lambda x: {**x, "boi_token_id": 4})
    assert "boi_token_id is 4, not 298" in imported("config.json", moved_boi)
    for damaged in (b"{", b"[]", b"\xff"):
        assert "config.json is damaged" in imported("config.json", lambda _, x=damaged: x)
    assert "experiment.json does not hold" in imported("experiment.json", lambda _: b"\xff")
    assert "is not a sentencepiece model" in imported("tokenizer.model", lambda _: b"abc")
    larger = train_tokenizer(["a small red star"] * 20, 290).model
    assert "boi_token_id is 298, not" in imported("tokenizer.model", lambda _: larger)
    assert not (tmp_path / "in").exists()


def test_a_run_without_a_checkpoint_reads_them_again(exported, tmp_path):
    """One that was killed before its first."""
    said = []
    for _ in range(2):
        run = open_run(a_run(exported), tmp_path / "run", said.append)
        same(run.initialise().parameters, weights(tiny_experiment(), 3))
        run.directory.close()
    assert Checkpoints(tmp_path / "run" / "checkpoints", 1, print).steps == []
    assert sum("starting from" in line for line in said) == 2
