"""Where the time of a run went, by a clock that is set by hand; and of real, killed runs."""

import json
import time
from dataclasses import replace

import line
import pytest

from transfusion_jax.training.goodput import CHARGES, open_account
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.loop import train
from transfusion_jax.training.metrics import read_metrics
from transfusion_jax.training.observation import Observation, Observer
from transfusion_jax.training.watchdog import Watch


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Killed(BaseException):
    pass


@pytest.fixture
def clock():
    return Clock()


def silent(said: str) -> None:
    pass


def started(directory, step, clock, begun=None):
    return open_account(directory, step, silent, begun, clock)


def stored(directory) -> dict:
    return json.loads((directory / "goodput.json").read_text())


def steps(account, clock, seconds: float) -> None:
    with account.during("steps"):
        clock.now += seconds


def logged(directory, clock, step: int) -> None:
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": clock.now}) + "\n")


def test_every_second_is_charged_once(tmp_path, clock):
    account = started(tmp_path, 0, clock, begun=990.0)
    with account.during("steps"):
        clock.now += 4
        with account.during("checkpoints"):
            clock.now += 2
        account.charge("steps")
        clock.now += 1
        account.charge("data")
        clock.now += 3
    with account.during("evaluation"):
        clock.now += 10
    account.write()
    expected = dict(startup=10, steps=7, checkpoints=2, data=1, evaluation=10)
    assert stored(tmp_path)["seconds"] == dict.fromkeys(CHARGES, 0.0) | expected
    assert account.summary()["goodput"] == pytest.approx(7 / 30, abs=1e-5)
    assert sum(account.summary()["wall_shares"].values()) == pytest.approx(1, abs=1e-4)


def test_a_stopped_run_loses_nothing_and_its_absence_is_told_apart(tmp_path, clock):
    account = started(tmp_path, 0, clock)
    steps(account, clock, 10)
    logged(tmp_path, clock, 5)
    account.saved(5)
    account.write()
    clock.now += 500
    again = started(tmp_path, 5, clock, begun=clock.now - 3)
    assert again.seconds["repeated"] == 0 and again.seconds["steps"] == 10
    assert again.down == 497 and again.seconds["startup"] == 3 and again.starts == 2


def test_what_a_killed_process_did_since_its_last_note_is_repeated(tmp_path, clock):
    account = started(tmp_path, 0, clock)
    steps(account, clock, 10)
    account.saved(5)
    with account.during("steps"):
        clock.now += 6
        logged(tmp_path, clock, 8)
        clock.now += 100  # killed at some time in here
    again = started(tmp_path, 5, clock)
    assert again.seconds["steps"] == 10 and again.seconds["repeated"] == 6
    assert again.down == 100


def test_steps_after_the_checkpoint_that_is_resumed_are_repeated(tmp_path, clock):
    """The checkpoint of step 10 was begun and never finished, so the run resumes at step 5."""
    account = started(tmp_path, 0, clock)
    steps(account, clock, 10)
    account.saved(5)
    steps(account, clock, 7)
    account.saved(10)
    again = started(tmp_path, 5, clock)
    assert (again.seconds["steps"], again.seconds["repeated"]) == (10, 7)
    steps(again, clock, 8)
    again.saved(10)
    once_more = started(tmp_path, 0, clock)  # no checkpoint could be read
    assert (once_more.seconds["steps"], once_more.seconds["repeated"]) == (0, 25)


def test_a_process_that_began_before_the_account_ended_counts_no_time_twice(tmp_path, clock):
    account = started(tmp_path, 0, clock)
    steps(account, clock, 10)
    account.write()
    again = started(tmp_path, 0, clock, begun=995.0)
    assert sum(again.seconds.values()) == 10 and again.down == 0


def test_an_account_that_cannot_be_read_is_named_and_begun_anew(tmp_path, clock):
    said = []
    (tmp_path / "goodput.json").write_text('{"seconds": ')
    account = open_account(tmp_path, 5, said.append, None, clock)
    assert "goodput.json cannot be read" in said[0] and account.seconds["steps"] == 0
    assert stored(tmp_path)["starts"] == 1


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path, clock, monkeypatch):
    said = []
    account = open_account(tmp_path, 5, said.append, None, clock)

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transfusion_jax.training.goodput.write_json", full)
    account.write()
    assert "No space left on device" in said[0]


def test_a_run_accounts_for_its_time(tmp_path):
    def look(step, state, moved):
        time.sleep(0.02)
        return Observation(values={"seen": 1.0} if step == 3 else {})

    run = line.open_run(line.Line(), tmp_path, silent)
    run = replace(run, instruments=Instruments(observers=(Observer(1, look),)))
    begun = time.time() - 1
    outcome = train(run, silent, begun=begun)
    kept = stored(tmp_path)
    seconds = kept["seconds"]
    assert sum(seconds.values()) == pytest.approx(kept["time"] - begun, abs=0.02)
    assert 1 <= seconds["startup"] < 60 and seconds["compiling"] > 0 and seconds["steps"] > 0
    assert 12 * 0.02 <= seconds["validation"] < 12 * 0.02 + 5 and seconds["checkpoints"] > 0
    assert seconds["repeated"] == 0 and outcome.account.starts == 1
    rows = read_metrics(tmp_path)
    assert rows[2]["seen"] == 1 and "seen" not in rows[3]
    assert 0 < rows[-1]["goodput"] < 1 and rows[-1]["time"] >= begun


def test_a_killed_run_repeats_steps_and_says_so(tmp_path, monkeypatch):
    """Killed at step 9, it resumes from the checkpoint of step 5."""
    run = line.open_run(line.Line(), tmp_path, silent)

    def dying(step, state, moved):
        if step == 9:
            # A process that is killed writes nothing more.
            monkeypatch.setattr("transfusion_jax.training.goodput.write_json", lambda *_: None)
            raise Killed
        time.sleep(0.02)
        return Observation()

    with pytest.raises(Killed):
        train(replace(run, instruments=Instruments(observers=(Observer(1, dying),))), silent)
    monkeypatch.undo()
    before = stored(tmp_path)
    assert max(map(int, before["step_seconds_at_checkpoints"])) == 5
    outcome = train(line.open_run(line.Line(), tmp_path, silent), silent)
    after = stored(tmp_path)
    # Steps 6 to 8, in which the observer slept.
    assert after["seconds"]["repeated"] - before["seconds"]["repeated"] >= 0.04
    assert after["starts"] == 2 and int(outcome.state.step) == 12


def test_steps_of_a_stopped_and_resumed_run_add_up(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(7))
        train(line.open_run(line.Line(), tmp_path, silent), silent)
    before = stored(tmp_path)
    train(line.open_run(line.Line(), tmp_path, silent), silent)
    after = stored(tmp_path)
    assert after["starts"] == 2 and after["seconds"]["repeated"] == 0
    assert after["seconds"]["steps"] > before["seconds"]["steps"]
    assert set(after["step_seconds_at_checkpoints"]) == {"0", "5", "7", "10", "12"}
    assert after["down_seconds"] >= 0
