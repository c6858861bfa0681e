import errno
import json
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import line
import pytest

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.commands.main import main
from transfusion_jax.config import Experiment, TokenizerConfig, TrainConfig
from transfusion_jax.config.fields import flattened
from transfusion_jax.config.stored import differences, dumps
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.errors import ComeAgain
from transfusion_jax.preflight.data import _known_tokenizer as known_tokenizer
from transfusion_jax.pretraining.run import open_run, stored, tokenizer_of
from transfusion_jax.training import directory as directory_lib
from transfusion_jax.training import lock as lock_lib
from transfusion_jax.training.directory import check_directory, open_directory
from transfusion_jax.training.lock import Lock
from transfusion_jax.training.loop import train
from transfusion_jax.training.metrics import read_metrics
from transfusion_jax.training.watchdog import Watch

DIGITS = str(Path(__file__).parent.parent / "experiments" / "digits.py")
LINE = line.Line()


def opened(path, experiment=LINE):
    """The directory of a run that is opened and closed."""
    run = line.open_run(experiment, path, lambda said: None)
    run.directory.close()
    return run


def test_a_new_directory_gets_its_config_last(tmp_path):
    def interrupted(path):
        (path / "ledger.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_directory(tmp_path / "run", LINE, None, (), interrupted, print)
    assert not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "run" / "stacks-0.txt").touch()  # it stood still
    check_directory(LINE, tmp_path / "run")  # the next start may use it
    opened(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["slope"] == 2


def test_what_is_no_run_directory_is_refused(tmp_path):
    (tmp_path / "photo.png").write_text("")
    with pytest.raises(ValueError, match=r"not a run directory .* holds photo\.png"):
        check_directory(LINE, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        check_directory(LINE, tmp_path / "photo.png")


def test_a_run_that_lost_its_tokenizer_gets_no_other(tmp_path):
    """One trained anew on the same text could number its words otherwise."""
    experiment = Experiment("run", train=TrainConfig(steps=200))
    (tmp_path / "config.json").write_text(dumps(experiment))
    with pytest.raises(ValueError, match="has lost its tokenizer.model"):
        stored(tmp_path, print)
    with pytest.raises(ValueError, match="has lost its tokenizer.model"):
        tokenizer_of(experiment, tmp_path)


def test_what_an_interrupted_start_left_is_not_the_tokenizer_of_the_next(experiment, tmp_path):
    """It may have been started with another one."""
    left = train_tokenizer(["five numbers and six"] * 20, 290)
    asked = train_tokenizer(["a small red star"] * 20, 290)
    (tmp_path / "asked.model").write_bytes(asked.model)
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.model").write_bytes(left.model)
    config = TokenizerConfig(path=str(tmp_path / "asked.model"))
    started = replace(experiment, tokenizer=config)
    assert tokenizer_of(started, run).model == asked.model
    assert known_tokenizer(experiment, run, []) is None  # one is yet to be trained
    (run / "config.json").write_text(dumps(started))
    assert tokenizer_of(started, run).model == left.model


def test_fields_that_may_change_are_stored_anew_and_others_are_refused(tmp_path):
    path = tmp_path / "run"
    opened(path)
    opened(path, replace(LINE, colour="blue", train=replace(LINE.train, log_every=2)))
    config = json.loads((path / "config.json").read_text())
    assert config["colour"] == "blue" and config["train"]["log_every"] == 2
    with pytest.raises(ValueError, match=r"what differs: slope: 2\.0 -> 3\.0"):
        opened(path, replace(LINE, slope=3.0, colour="green"))
    assert json.loads((path / "config.json").read_text())["colour"] == "blue"


def test_the_config_is_replaced_atomically(tmp_path, monkeypatch):
    """A run that dies while it stores another config still has the one before."""
    path = tmp_path / "run"
    opened(path)
    before = (path / "config.json").read_text()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("transfusion_jax.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(path, replace(LINE, colour="blue"))
    assert (path / "config.json").read_text() == before


def test_data_that_changed_under_a_run_is_named(tmp_path):
    path = tmp_path / "run"
    run = line.open_run(LINE, path, lambda said: None)
    run.directory.save(run.initialise(), 1.5)
    run.directory.close()
    again = opened(path)
    assert again.directory.train_seconds == 1.5 and again.directory.start == 0
    abstract = run.initialise()
    with pytest.raises(ValueError, match="has changed since it was trained: sums, digits"):
        check = directory_lib._check_data
        check(path, (("sums", "a"), ("lines", "b"), ("digits", "c")), ["x", "b", "y"])
    with pytest.raises(ValueError, match="has changed since it was trained: points"):
        open_directory(
            path,
            replace(LINE, colour="blue"),
            abstract,
            (("points", "others"),),
            lambda path: None,
            lambda said: None,
        )
    assert json.loads((path / "config.json").read_text())["colour"] == "red"


def test_an_autoencoders_digest_used_to_be_a_string(tmp_path):
    directory_lib._check_data(tmp_path, (("pictures", "abc"),), "abc")
    with pytest.raises(ValueError, match="changed since it was trained: pictures"):
        directory_lib._check_data(tmp_path, (("pictures", "abc"),), "abd")


@pytest.mark.parametrize(
    "full",
    [
        Experiment("name", train=TrainConfig(sample_prompts=("a two",)), evaluation=("sums",)),
        AutoencoderExperiment("name"),
    ],
    ids=["transformer", "autoencoder"],
)
def test_resumable_fields_exist(full):
    names = list(flattened(full))
    for beginning in full.RESUMABLE:
        assert any(name.startswith(beginning) for name in names), beginning


def test_each_kind_of_experiment_says_what_may_change(experiment):
    changed = replace(
        experiment,
        sampler=replace(experiment.sampler, steps=2, max_tokens=99),
        train=replace(experiment.train, log_every=7, seed=3),
    )
    assert differences(experiment, changed) == ["train.seed: 0 -> 3"]
    one = AutoencoderExperiment("one")
    other = replace(one, train=replace(one.train, sample_every=7, batch=8))
    assert differences(one, other) == ["train.batch: 256 -> 8"]


@pytest.mark.long
def test_a_resumed_pretraining_run_has_the_new_sampler_and_counts_once(
    experiment, tmp_path, monkeypatch
):
    counted = []
    for name in ("ledger", "fingerprints"):
        method = getattr(Data, name)

        def noted(self, method=method, name=name):
            counted.append(name)
            return method(self)

        monkeypatch.setattr(Data, name, noted)
    run = open_run(experiment, tmp_path / "run", lambda said: None)
    assert sorted(counted) == ["fingerprints", "ledger"]
    title, data = run.description().splitlines()[:2]
    assert title.startswith("small: a transformer of") and "1500 of 1500 documents" in data
    state = run.initialise()
    for seconds in (1.0, 2.0):
        run.directory.save(state, seconds)
        state = replace(state, step=state.step + 1)
    run.directory.close()

    del counted[:]
    numbers = tmp_path / "run" / "summary.json"
    numbers.write_text("{}")
    open_run(experiment, tmp_path / "run", lambda said: None).directory.close()
    assert numbers.exists()
    del counted[:]
    changed = replace(experiment, sampler=replace(experiment.sampler, steps=2, temperature=0.5))
    again = open_run(changed, tmp_path / "run", lambda said: None)
    again.directory.close()
    assert not numbers.exists()  # it was of the other sampler
    assert counted == ["fingerprints"]
    assert again.directory.start == 1 and again.directory.train_seconds == 2.0
    assert again.description().splitlines()[1] == data
    assert stored(tmp_path / "run", lambda said: None)[0] == changed


def test_a_directory_in_use_is_refused_until_it_is_closed(tmp_path):
    first = line.open_run(LINE, tmp_path / "run", print)
    holder = f"is in use by process {os.getpid()} on {socket.gethostname()} since"
    with pytest.raises(ValueError, match=holder):
        line.open_run(LINE, tmp_path / "run", print)
    first.directory.close()
    line.open_run(LINE, tmp_path / "run", print).directory.close()


def test_a_directory_that_another_run_took_before_the_lock_is_refused(tmp_path):
    """Two starts that find an empty directory: the second one hears of the first's config."""
    opened(tmp_path / "run", replace(LINE, slope=3.0))  # since `check_directory` passed ours
    with pytest.raises(ValueError, match=r"what differs: slope: 3\.0 -> 2\.0"):
        open_directory(tmp_path / "run", LINE, None, (), lambda path: None, print)
    Lock(tmp_path / "run" / "lock").release()  # not held by who was refused


def test_a_directory_is_held_until_the_run_is_evaluated(tmp_path, monkeypatch):
    held = []

    def summarise(directory, *_):
        with pytest.raises(ValueError, match="is in use"):
            Lock(directory / "lock")
        held.append(directory)
        return {}

    def open_line(experiment, directory, report):
        return line.open_run(LINE, directory, report)

    monkeypatch.setattr("transfusion_jax.pretraining.run.open_run", open_line)
    monkeypatch.setattr("transfusion_jax.commands.instruments.equipped", lambda run, *_: run)
    monkeypatch.setattr("transfusion_jax.evaluation.summary.summarise", summarise)
    assert main(("train", DIGITS, "--run-dir", str(tmp_path / "run"))) == 0
    assert held == [tmp_path / "run"]
    Lock(tmp_path / "run" / "lock").release()


def test_a_run_that_another_machine_holds_may_come_free(tmp_path, monkeypatch):
    """As where a host is gone, and an NFS server still keeps its lock."""
    first = line.open_run(LINE, tmp_path / "run", print)
    (tmp_path / "new").mkdir()
    new = Lock(tmp_path / "new" / "lock")
    (tmp_path / "boot").write_text("another boot")
    monkeypatch.setattr(lock_lib, "BOOT", tmp_path / "boot")
    with pytest.raises(ComeAgain, match=r"is in use by process .*; .* is gone, remove .*run/lock"):
        line.open_run(LINE, tmp_path / "run", print)
    with pytest.raises(ValueError, match="is in use by process"):  # there is no run yet
        line.open_run(LINE, tmp_path / "new", print)
    (tmp_path / "run" / "lock").unlink()
    line.open_run(LINE, tmp_path / "run", print).directory.close()
    first.directory.close()
    new.release()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("where", ["check_owner", "Lock", "write_atomic"])
def test_storage_that_fails_under_a_run_may_come_back(tmp_path, monkeypatch, number, where):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    changed = replace(LINE, colour="blue")
    opened(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(directory_lib, where, failing)
        with pytest.raises(ComeAgain, match=r"cannot open the run in .*run \(\w+.*\); the same"):
            opened(tmp_path / "run", changed)
        if where != "write_atomic":
            with pytest.raises(ValueError, match=os.strerror(number)):  # there is no run yet
                opened(tmp_path / "another")
    opened(tmp_path / "run", changed)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["colour"] == "blue"


def test_storage_that_says_nothing_may_be_that_of_a_run(tmp_path, monkeypatch):
    """As where an NFS mount is stale: not even whether there is a run can be asked."""

    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    opened(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stale)
        patch.setattr(Path, "stat", stale)
        with pytest.raises(ComeAgain, match="cannot open the run"):
            check_directory(LINE, tmp_path / "run")


def test_a_directory_is_held_on_a_disk_that_is_too_full_for_a_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        lock = Lock(tmp_path / "lock")
    with pytest.raises(ValueError, match="is in use by another process"):
        Lock(tmp_path / "lock")
    lock.release()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB; making one takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.filterwarnings(  # of event files that tensorboardX can neither write nor close
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_run_goes_on_when_the_disk_is_full_at_its_start(small_disk, monkeypatch):
    experiment = replace(LINE, train=replace(LINE.train, checkpoint_every=2))
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(7))
        train(line.open_run(experiment, small_disk / "run", print), print)
    metrics = small_disk / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps({"step": 8, "loss": 1.0}) + "\n")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    said = []

    def report(text):
        said.append(text)
        if "could not save" in text and "/10 " in text:
            filler.unlink()  # somebody makes room

    outcome = train(line.open_run(experiment, small_disk / "run", report), report)
    assert int(outcome.state.step) == 12
    assert any("could not save" in text and "last good one is step 7" in text for text in said)
    rows = [row["step"] for row in read_metrics(small_disk / "run")]
    assert rows[:7] == [*range(1, 8)] and rows[-1] == 12 and rows == sorted(set(rows))
    assert max(int(place.name) for place in (small_disk / "run" / "checkpoints").iterdir()) == 12


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[["line", "x"]], [["line", "y"]]], "process 1 reads other data than process 0: line"),
        ([True, False], "process 1 does not see"),
    ],
)
def test_processes_that_do_not_share_what_they_must(tmp_path, monkeypatch, answers, message):
    kind = type(answers[0])
    monkeypatch.setattr(
        directory_lib,
        "gathered",
        lambda value: answers if isinstance(value, kind) else [value, value],
    )
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "run")
