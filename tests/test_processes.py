"""Several real processes: they train as one does, stop together, and notice when one is gone."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from coordination import Service

from transfusion_jax.commands.main import main
from transfusion_jax.errors import ProcessLost
from transfusion_jax.parallel import processes as processes_lib
from transfusion_jax.parallel.roll_call import call_roll

TINY = """
import os
import time
from dataclasses import replace
from runpy import run_path

from transfusion_jax.config import ProcessesConfig
from transfusion_jax.training.watchdog import Watch

moved = Watch.moved

def slowly(self):
    time.sleep(float(os.environ["PAUSE"]))
    return moved(self)

Watch.moved = slowly

def config():
    base = run_path({digits!r})["config"]()
    return replace(
        base,
        name="tiny",
        model=replace(base.model, layers=1, width=32, heads=2, mlp_width=64),
        data=replace(base.data, batch_rows=4, prefetch=2),
        optimizer=replace(base.optimizer, warmup_steps=2),
        train=replace(base.train, steps=20, log_every=1, checkpoint_every=5),
        processes=ProcessesConfig(heartbeat_timeout=10, initialization_timeout=60),
        evaluation=(),
    )
"""
DIGITS = Path(__file__).parents[1] / "experiments" / "digits.py"
LOSSES = ("loss", "text_loss", "image_loss")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    (path / "tiny.py").write_text(TINY.format(digits=str(DIGITS)))
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    workplace, run_dir, count: int, *arguments: str, pause=0.0, command="train"
) -> list[subprocess.Popen]:
    """A command in so many processes of one device each; training pauses after each step."""
    port = free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PAUSE": str(pause)}
    what = ["train", "tiny.py", "--run-dir", run_dir] if command == "train" else [command, run_dir]
    processes = []
    for number in range(count):
        flags = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
        flags = [*flags, "--process-id", str(number)] if count > 1 else []
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "transfusion_jax", *what, *arguments, *flags],
                cwd=workplace,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finished(processes) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        found.append((process.returncode, out, err))
    return found


def logged(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(run_dir: Path, step: int, processes) -> None:
    deadline = time.monotonic() + 200
    while not (rows := logged(run_dir)) or rows[-1]["step"] < step:
        assert all(process.poll() is None for process in processes), finished(processes)
        assert time.monotonic() < deadline, "training does not get that far"
        time.sleep(0.05)


def assert_same_losses(a: Path, b: Path) -> None:
    ours, theirs = logged(a), logged(b)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in LOSSES:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)


@pytest.fixture(scope="module")
def alone(workplace):
    """The run in one process."""
    (found,) = finished(start(workplace, "alone", 1))
    assert found[0] == 0, found
    return workplace / "alone"


def test_two_processes_train_as_one_stop_together_and_resume_alone(workplace, alone):
    run_dir = workplace / "two"
    processes = start(workplace, "two", 2, "--profile", "3:4", pause=0.4)
    wait_for_step(run_dir, 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    found = finished(processes)
    assert [code for code, _, _ in found] == [42, 42], found
    (stopped,) = re.findall(r"stopped by .* at step (\d+), saved", found[0][1])
    assert not re.sub(r"\[Gloo\].*\n", "", found[1][1])  # one process speaks
    assert (run_dir / "checkpoints" / stopped).is_dir() and 6 <= int(stopped) < 20
    traces = [file.relative_to(run_dir) for file in run_dir.rglob("*.xplane.pb")]
    assert sorted(file.parts[:2] for file in traces) == [
        ("profile", "process-0"),
        ("profile", "process-1"),
    ]
    ((code, out, err),) = finished(start(workplace, "two", 1))
    assert code == 0, err
    assert f"resuming from checkpoint {Path('two') / 'checkpoints' / stopped}" in out
    assert_same_losses(run_dir, alone)


@pytest.mark.slow
def test_when_one_is_killed_the_others_say_so_and_all_resume(workplace, alone):
    run_dir = workplace / "killed"
    processes = start(workplace, "killed", 2, pause=0.4)
    wait_for_step(run_dir, 7, processes)
    processes[1].kill()
    begin = time.monotonic()
    (code, _, err), _ = finished(processes)
    assert time.monotonic() - begin < 60
    assert code in (42, -signal.SIGABRT), err  # JAX may be faster
    assert re.search(r"process 1 of 2 is gone|task:1|\(stopped sending heartbeats\):\n1\n", err), (
        err
    )
    found = finished(start(workplace, "killed", 2))
    assert [code for code, _, _ in found] == [0, 0], found
    assert_same_losses(run_dir, alone)


@pytest.mark.slow
def test_a_directory_in_use_is_refused_by_name(workplace):
    first = start(workplace, "used", 1, "--train.steps", "4000")
    wait_for_step(workplace / "used", 1, first)
    ((code, _, err),) = finished(start(workplace, "used", 1, "--train.steps", "4000"))
    first[0].kill()
    first[0].communicate()
    assert code == 2 and f"used is in use by process {first[0].pid} on" in err
    assert err.count("\n") == 1


def test_a_process_in_which_nothing_moves_ends_itself(tmp_path):
    code = """
import sys, time
from pathlib import Path
from transfusion_jax.training.watchdog import Watch

def stuck():
    time.sleep(100)

with Watch() as watch:
    watch.against_stalls(0.5, Path(sys.argv[1]))
    for _ in range(10):
        time.sleep(0.1)
        watch.moved()
    print("moved", flush=True)
    stuck()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 42 and done.stdout == "moved\n"
    assert "nothing has moved for" in done.stderr.splitlines()[-1]
    assert "in stuck" in (tmp_path / "stacks-0.txt").read_text()


@pytest.mark.slow
def test_a_run_in_which_nothing_moves_ends_itself(workplace):
    flags = ["--processes.stall-timeout", "30", "--train.steps", "30"]
    found = finished(start(workplace, "still", 1, *flags, pause=60.0))
    code, _, err = found[0]
    assert code == 42 and "nothing has moved for" in err.splitlines()[-1]
    assert "slowly" in (workplace / "still" / "stacks-0.txt").read_text()


def answers(monkeypatch, service: Service, work, processes) -> list:
    """What `work(process)` returns or raises in each of the processes, which are threads here."""
    here = threading.local()
    state = SimpleNamespace(client=service)
    monkeypatch.setattr(processes_lib.distributed, "global_state", state)
    monkeypatch.setattr(jax, "process_count", lambda: service.count)
    monkeypatch.setattr(jax, "process_index", lambda: here.process)
    questions = {process: itertools.count() for process in processes}

    class Questions:
        def __next__(self):
            return next(questions[here.process])

    monkeypatch.setattr(processes_lib, "_questions", Questions())

    def run(process):
        here.process = process
        try:
            return work(process)
        except ProcessLost as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(run, processes))


def test_processes_tell_each_other_in_three_calls_and_leave_nothing_behind(monkeypatch):
    service = Service(12)

    def work(process):
        return [processes_lib.gathered([question, process]) for question in range(5)]

    found = answers(monkeypatch, service, work, range(12))
    expected = [[[question, process] for process in range(12)] for question in range(5)]
    assert found == [expected] * 12
    assert set(service.values) == {f"transfusion_jax/4/{process}" for process in range(12)}
    calls = {name: service.calls.count(name) for name in set(service.calls)}
    assert calls == {"set": 60, "barrier": 60, "dir_get": 60, "delete": 4}


@pytest.mark.parametrize(("lost", "name"), [("task", "process 2"), ("coordinator", "process 0")])
def test_a_process_that_says_nothing_is_named(monkeypatch, lost, name):
    service = Service(4)
    service.lost = lost
    found = answers(monkeypatch, service, lambda process: processes_lib.gathered(1), [0, 1, 3])
    assert all(f"{name} of 4 does not answer: UNAVAILABLE" in said for said in found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "localhost:1"], "--num-processes and --process-id must be given too"),
        (["--process-id", "0"], "--coordinator and --num-processes must be given too"),
        ("--coordinator x:1 --num-processes 2 --process-id 2".split(), "must be in 0..1"),
        ("--coordinator x --num-processes 2 --process-id 0".split(), "must be HOST:PORT"),
    ],
)
def test_flags_that_cannot_work_are_one_line(workplace, capsys, flags, message):
    run_dir = workplace / "refused"
    code = main(["train", str(DIGITS), "--run-dir", str(run_dir), *flags])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["1/2"], "process 1 did not find process 0 at 127.0.0.1:{port} within"),
        (["0/3", "1/3"], "1 of 3 processes did not come within"),
        (["0/3", "1/3", "1/3"], "there are two processes with --process-id 1"),
        (["0/3", "1/2"], "process 1 was given --num-processes 2, process 0 3"),
        (["0/2", "0/2"], "is there another --process-id 0"),
    ],
)
def test_processes_that_do_not_make_a_run_are_one_line(given, message):
    port = free_port()
    code = "import sys; from transfusion_jax.parallel.roll_call import call_roll as c; "
    code += "c(sys.argv[1], int(sys.argv[3]), int(sys.argv[2]), 2.0)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"127.0.0.1:{port}", *who.split("/")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in given
    ]
    errors = [process.communicate()[1].splitlines()[-1] for process in processes]
    expected = message.format(port=port)
    assert any(error.startswith("ValueError: ") and expected in error for error in errors), errors
    assert all(process.returncode == 1 for process in processes)


def connected(port: int) -> socket.socket:
    """A connection to process 0, once it listens."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline


def test_a_stranger_does_not_disturb_a_roll_call():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        zero = pool.submit(call_roll, f"localhost:{port}", 3, 0, 20)
        stranger = connected(port)
        stranger.sendall(b'{"process": Infinity, "count": 3}\n')
        others = [pool.submit(call_roll, f"localhost:{port}", 3, i, 20) for i in (1, 2)]
        assert [each.result() for each in (zero, *others)] == [None] * 3
        stranger.close()


def test_a_process_that_has_died_is_not_present():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        zero = pool.submit(call_roll, f"localhost:{port}", 3, 0, 4)
        first = connected(port)
        first.sendall(b'{"process": 1, "count": 3}\n')
        first.close()
        two = pool.submit(call_roll, f"localhost:{port}", 3, 2, 4)
        for each in (zero, two):
            with pytest.raises(ValueError, match="1 of 3 processes did not come .*: 1"):
                each.result()


def test_a_process_that_was_started_again_is_no_second_one():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        zero = pool.submit(call_roll, f"localhost:{port}", 3, 0, 20)
        first = connected(port)
        first.sendall(b'{"process": 1, "count": 3}\n')
        first.close()  # it has died
        others = [pool.submit(call_roll, f"localhost:{port}", 3, i, 20) for i in (1, 2)]
        assert [each.result() for each in (zero, *others)] == [None] * 3


@pytest.mark.slow
def test_other_axes_than_data_are_refused_where_sums_would_be_wrong(workplace):
    found = finished(start(workplace, "fsdp", 2, "--mesh.data", "1", "--mesh.fsdp", "2"))
    if found[0][0] == 0:
        pytest.skip("this jaxlib computes the right sums")
    assert [code for code, _, _ in found] == [2, 2]
    assert "needs jaxlib 0.12 or newer" in found[0][2]


@pytest.mark.slow
def test_four_processes_then_two_then_one_read_every_row_once(workplace, alone):
    run_dir = workplace / "shrinking"
    for count, step in ((4, 7), (2, 13)):
        processes = start(workplace, "shrinking", count, pause=0.3)
        wait_for_step(run_dir, step, processes)
        for process in processes:
            process.kill()
        finished(processes)
    ((code, out, err),) = finished(start(workplace, "shrinking", 1))
    assert code == 0, err
    assert "resuming from checkpoint" in out
    assert_same_losses(run_dir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["start", "evaluation"])
def test_a_signal_beside_training_stops_all(workplace, when):
    name = f"beside-{when}"
    flags = (
        ["--train.steps", "4", "--evaluation", "digits", "likelihood", "sums"]
        if when == "evaluation"
        else []
    )
    processes = start(workplace, name, 2, *flags)
    if when == "start":
        while not (workplace / name / "lock").exists():
            assert processes[0].poll() is None, finished(processes)
            time.sleep(0.02)
        assert not logged(workplace / name)
    else:
        for line in processes[0].stdout:
            if line.startswith("evaluating"):
                break
    processes[1].send_signal(signal.SIGTERM)
    found = finished(processes)
    assert [code for code, _, _ in found] == [42, 42], found
    assert "stopped by" in found[0][1] + found[0][2]
    assert not (workplace / name / "summary.json").exists()


@pytest.mark.slow
def test_a_signal_during_validation_stops_all_at_the_next_batch(workplace, alone):
    run_dir = workplace / "validating"
    flags = ["--train.validate-every", "2", "--train.validation-rows", "80"]
    processes = start(workplace, "validating", 2, *flags, pause=0.5)  # 20 s at least
    wait_for_step(run_dir, 1, processes)  # which is logged when step 2 is on its way
    time.sleep(3)
    processes[1].send_signal(signal.SIGTERM)
    found = finished(processes)
    assert [code for code, _, _ in found] == [42, 42], found
    assert "validation and samples of step 2 were cut short" in found[0][1]
    assert not [name for name in logged(run_dir)[-1] if name.startswith("validation")]
    found = finished(start(workplace, "validating", 2))
    assert [code for code, _, _ in found] == [0, 0], found
    assert_same_losses(run_dir, alone)


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(workplace, alone):
    measured = []
    for count in (1, 2):
        out = workplace / f"metrics-{count}.json"
        flags = ["--suite", "likelihood", "--max-rows", "20", "--out", str(out)]
        found = finished(start(workplace, "alone", count, *flags, command="evaluate"))
        assert [code for code, _, _ in found] == [0] * count, found
        measured.append(json.loads(out.read_text()))
    one, two = measured
    assert one["text_perplexity"] == pytest.approx(two["text_perplexity"], rel=1e-5)
    assert one["likelihood_rows"] == two["likelihood_rows"] == 20
