"""Experiments as data: what is refused, what is stored, and that the presets are the paper's."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from transfusion_jax.autoencoder.config import AutoencoderConfig, AutoencoderExperiment, LossConfig
from transfusion_jax.autoencoder.training.losses import Discriminator
from transfusion_jax.commands.experiments import load_experiment
from transfusion_jax.commands.main import main
from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SourceConfig,
    TrainConfig,
    paper,
)
from transfusion_jax.config import stored as stored_config
from transfusion_jax.data.sources import dataset
from transfusion_jax.training.update import learning_rate

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, r"optimizer\.learning_rate=0\.0 must be positive"),
        ({"learning_rate": float("nan")}, r"optimizer\.learning_rate=nan must be positive"),
        (
            {"final_learning_rate": -1e-5},
            r"optimizer\.final_learning_rate=-1e-05 must be between 0",
        ),
        (
            {"learning_rate": 1e-5},
            r"final_learning_rate=1\.5e-05 must be between 0 and optimizer\.learning_rate=1e-05",
        ),
        ({"warmup_steps": -1}, r"optimizer\.warmup_steps=-1 must not be negative"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay=-0\.1 must not be negative"),
        ({"b1": 1.0}, r"optimizer\.b1=1\.0 must be in \[0, 1\)"),
        ({"b2": -0.1}, r"optimizer\.b2=-0\.1 must be in \[0, 1\)"),
        ({"epsilon": 0.0}, r"optimizer\.epsilon=0\.0 must be positive"),
        ({"clip_norm": 0.0}, r"optimizer\.clip_norm=0\.0 must be positive"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_a_constant_rate_is_allowed():
    assert OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-3).final_learning_rate == 1e-3
    assert OptimizerConfig(final_learning_rate=0.0).final_learning_rate == 0.0


def test_a_warmup_longer_than_the_run_is_refused_before_anything_is_written(capsys, tmp_path):
    for command, file in (("train", "digits.py"), ("autoencoder", "vae_scenes.py")):
        run_dir = tmp_path / command
        arguments = (str(EXPERIMENTS / file), "--run-dir", str(run_dir), "--train.steps", "20")
        assert main([command, *arguments]) == 2
        assert "must not exceed train.steps=20" in capsys.readouterr().err
        assert not run_dir.exists()
    assert float(learning_rate(OptimizerConfig(warmup_steps=20), 20)(20)) == pytest.approx(3e-4)


@pytest.mark.parametrize("kind", [Experiment, AutoencoderExperiment])
def test_a_run_that_was_trained_with_a_longer_warmup_still_loads(kind):
    """Its weights can be used; only training it further is refused."""
    train = replace(kind("old").train, steps=20)
    old = kind("old", optimizer=OptimizerConfig(warmup_steps=4000), train=train)
    assert stored_config.loads(stored_config.dumps(old), "config.json", kind) == old


def test_a_stored_experiment_with_a_refused_value_is_named():
    text = json.loads(stored_config.dumps(Experiment("old")))
    text["optimizer"]["clip_norm"] = 0.0
    with pytest.raises(ValueError, match=r"config\.json does not hold.*clip_norm=0\.0"):
        stored_config.loads(json.dumps(text), "config.json")


def test_loss_weights_must_not_be_negative():
    with pytest.raises(ValueError, match=r"train\.image_loss_weight=-1\.0"):
        TrainConfig(image_loss_weight=-1.0)


def test_what_changes_no_number_may_change_at_a_resume():
    old = Experiment("old")
    model = replace(old.model, remat="minimal", layer_loop="unroll", unet_loop="unroll")
    assert not stored_config.differences(old, replace(old, model=model))
    assert stored_config.differences(old, replace(old, model=replace(old.model, layers=3)))


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("transfusion_*.py")), ids=lambda p: p.stem)
def test_experiments_of_the_paper_survive_json(file):
    experiment = load_experiment(str(file))
    assert stored_config.loads(stored_config.dumps(experiment), "x") == experiment


def test_the_presets_are_the_controlled_setting_of_section_4_1():
    """The noise limit is an ablation (Table 8), not the setting."""
    experiment = paper("0.76B")
    diffusion, data, optimizer = experiment.diffusion, experiment.data, experiment.optimizer
    assert diffusion.context_limit == diffusion.steps == 1000
    assert (diffusion.schedule, diffusion.prediction) == ("cosine", "epsilon")
    assert data.batch_rows * data.row_length == 2 * 1024**2 and data.row_length == 4096
    assert (data.image_first, experiment.train.image_loss_weight) == (0.2, 5.0)
    assert (experiment.train.steps, experiment.image.patches) == (250_000, 256)
    assert (optimizer.learning_rate, optimizer.final_learning_rate) == (3e-4, 1.5e-5)
    assert (optimizer.warmup_steps, optimizer.clip_norm, optimizer.weight_decay) == (4000, 1, 0.1)
    assert (optimizer.b1, optimizer.b2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (experiment.sampler.steps, experiment.sampler.guidance) == (250, 3.0)


def prepared(stored: str, channels: int) -> SimpleNamespace:
    return SimpleNamespace(
        stored=stored,
        image_shape=(32, 32, channels),
        image_config=lambda patch: ImageConfig(32, 32, channels, patch),
        row_length=lambda image, images: images * image.span,
        embedding_rows=384,
    )


@pytest.mark.parametrize(("name", "limit"), [("digits", 500), ("emoji", 200), ("own_data", 200)])
def test_experiments_with_a_noise_limit_say_so(name, limit, monkeypatch):
    monkeypatch.setattr(dataset, "open_dataset", lambda path: prepared("pixels", 3))
    assert load_experiment(str(EXPERIMENTS / f"{name}.py")).diffusion.noise_limit == limit


def test_only_pixels_are_clipped_to_their_range(monkeypatch):
    for stored, channels, clip in (("pixels", 3, 1.0), ("latents", 8, SamplerConfig().clip)):
        found = prepared(stored, channels)
        monkeypatch.setattr(dataset, "open_dataset", lambda path, found=found: found)
        assert load_experiment(str(EXPERIMENTS / "own_data.py")).sampler.clip == clip > 0


def test_the_noise_limit_is_off_at_0_and_whatever_the_steps():
    assert DiffusionConfig().context_limit == 1000
    assert DiffusionConfig(steps=50).context_limit == 50
    assert DiffusionConfig(noise_limit=50, steps=50).context_limit == 50
    assert DiffusionConfig(noise_limit=20, steps=50).context_limit == 20
    for limit in (-1, 51):
        with pytest.raises(ValueError, match=rf"noise_limit={limit} must be in 0\.\.diffusion"):
            DiffusionConfig(noise_limit=limit, steps=50)


def test_a_config_stored_before_the_noise_limit_was_off_keeps_its_limit():
    text = json.loads(stored_config.dumps(Experiment("old")))
    text["diffusion"] = {"schedule": "cosine", "steps": 1000, "prediction": "epsilon"}
    text["diffusion"]["noise_limit"] = 500
    del text["data"]["image_dropout"]
    loaded = stored_config.loads(json.dumps(text), "config.json")
    assert loaded.diffusion.context_limit == 500


@pytest.mark.parametrize("name", ["image_first", "caption_dropout", "image_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_shares_are_between_0_and_1(name, value):
    with pytest.raises(ValueError, match=rf"data\.{name}={value} must be in 0\.\.1"):
        DataConfig(**{name: value})


@pytest.mark.parametrize("name", ["guidance", "clip", "temperature"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(name, value):
    with pytest.raises(ValueError, match=f"sampler.{name}={value} must be a finite number"):
        SamplerConfig(**{name: value})


@pytest.mark.parametrize("name", ["guidance", "clip", "temperature", "image_temperature"])
@pytest.mark.parametrize("value", [1e-45, 1e300])
def test_what_float32_cannot_compute_with_is_refused(name, value):
    with pytest.raises(ValueError, match=f"sampler.{name}=.* must be 0 or in 1e-06..1e"):
        SamplerConfig(**{name: value})


def test_a_source_is_named_once():
    with pytest.raises(ValueError, match="data.sources names 'data/a' twice"):
        DataConfig(
            sources=(SourceConfig("data/a"), SourceConfig("data/b"), SourceConfig("data/a/"))
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimizer.learning-rate", "inf"],
        ["--sampler.max-tokens", "3000000000"],
        ["--optimizer.epsilon", "inf"],
        ["--train.image-loss-weight", "inf"],
        ["--data.sources.0.weight", "inf"],
        ["--data.max-epochs", "inf"],
        ["--train.seed", "-1"],
        ["--train.seed", str(2**32)],
        ["--model.rope-theta", "0"],
        ["--model.norm-epsilon", "-1"],
        ["--data.prefetch", "1001"],
    ],
)
def test_numbers_that_cannot_work_are_refused_by_name(arguments):
    name = arguments[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ValueError, match=rf"{name}=\S+ must"):
        load_experiment(str(EXPERIMENTS / "digits.py"), arguments)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("optimizer", {"kind": "Muon"}, "optimizer.kind='Muon' is not one of 'adamw', 'muon'"),
        ("model", {"norm_placement": "Pre"}, "model.norm_placement='Pre' is not one of"),
        ("model", {"experts": "moe"}, "model.experts='moe' is not one of"),
        ("model", {"family": "lama", "image_attention": "causal"}, "model.family='lama'"),
        ("diffusion", {"timesteps": "Uniform"}, "diffusion.timesteps='Uniform' is not one of"),
        ("sampler", {"kind": "DDIM"}, "sampler.kind='DDIM' is not one of 'ddpm', 'ddim'"),
        ("train", {"failed_save": "halt"}, "train.failed_save='halt' is not one of"),
        ("train", {"steps": 1e5}, "train.steps=100000.0 must be an integer"),
        ("train", {"steps": True}, "train.steps=True must be an integer"),
        ("train", {"ema_decay": False}, "train.ema_decay=False must be a number"),
        ("model", {"qk_norm": 1}, "model.qk_norm=1 must be True or False"),
        ("train", {"sample_prompts": ("a three")}, "train.sample_prompts='a three' must be a"),
        ("data", {"sources": [SourceConfig()]}, "must be a tuple"),
        ("data", {"sources": (SourceConfig("a", True),)}, "data.sources.0.weight=True must be a"),
        ("tokenizer", {"path": Path("x")}, "must be a text"),
        ("model", {"rope_scaling": "linear"}, "model.rope_scaling='linear' must be of RopeScaling"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_name_is_refused(part, values, message):
    """Python takes them as they are, and a name that is not "muon" would be AdamW."""
    base = Experiment("x")
    with pytest.raises(ValueError) as caught:
        replace(base, **{part: replace(getattr(base, part), **values)})
    assert message in str(caught.value)


def test_a_whole_number_that_was_stored_as_a_float_is_read():
    """Earlier versions took and stored it."""
    base = Experiment("x")
    text = stored_config.dumps(base).replace('"warmup_steps": 4000', '"warmup_steps": 4000.0')
    assert stored_config.loads(text, "old") == base and "4000.0" in text
    with pytest.raises(ValueError, match="optimizer.warmup_steps=4000.5 must be an integer"):
        stored_config.loads(text.replace("4000.0", "4000.5"), "old")


@pytest.mark.parametrize(("placement", "taken"), [("pre", True), ("post", False)])
def test_norms_after_layers_need_an_epsilon(placement, taken):
    """The norm of what a padding position gets from attention, zeros, would be 0 / 0."""
    with contextlib.nullcontext() if taken else pytest.raises(ValueError, match="nor 0 with"):
        ModelConfig(norm_epsilon=0.0, norm_placement=placement)


def test_whole_numbers_are_numbers():
    assert replace(Experiment("x"), sampler=SamplerConfig(guidance=2)).sampler.guidance == 2


def test_a_file_with_a_wrong_name_is_one_line(tmp_path, capsys):
    file = tmp_path / "x.py"
    file.write_text(
        "from transfusion_jax.config import Experiment, OptimizerConfig\n"
        "def config(): return Experiment('x', optimizer=OptimizerConfig(kind='Muon'))\n"
    )
    assert main(["train", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    assert "x.py: optimizer.kind='Muon' is not one of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_experiment_named_after_its_overrides_is_said(tmp_path, capsys):
    assert main(["train", "--model.layers", "6", str(tmp_path / "x.py")]) == 2
    assert "x.py comes after --FIELD VALUE: name the experiment first" in capsys.readouterr().err


def test_an_autoencoder_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="model.kind='gan' is not one of 'kl', 'vq'"):
        AutoencoderExperiment("x", model=AutoencoderConfig(kind="gan"))


@pytest.mark.parametrize(("layers", "size"), [(3, 23), (2, 11), (1, 5)])
def test_a_discriminator_that_sees_nothing_is_refused(layers, size):
    """Just below three pixels at its coarsest resolution there is no patch left."""

    def experiment(size: int, **loss) -> AutoencoderExperiment:
        model = AutoencoderConfig(size=size, multipliers=(1,))
        return AutoencoderExperiment(
            "x", model=model, loss=LossConfig(discriminator_layers=layers, **loss)
        )

    def patches(size: int) -> int:
        net = Discriminator(3, 4, layers, rngs=nnx.Rngs(0))
        return jax.eval_shape(net, jnp.zeros((1, size, size, 3))).size

    experiment(size + 1)
    with pytest.raises(ValueError, match=f"less than {size + 1} pixels"):
        experiment(size)
    experiment(size, gan=0.0)
    experiment(size, gan_start=10**6)  # beyond the last step
    assert patches(size + 1) == 1 and patches(size) == 0
