"""Experiments as data: what is refused, what is stored, and that the presets are the paper's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.commands.main import load_experiment, main
from transfusion_jax.config import Experiment, OptimizerConfig, TrainConfig
from transfusion_jax.config import stored as stored_config
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


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("transfusion_*.py")), ids=lambda p: p.stem)
def test_experiments_of_the_paper_survive_json(file):
    experiment = load_experiment(str(file))
    assert stored_config.loads(stored_config.dumps(experiment), "x") == experiment
