"""`sweep`: which points are run, skipped, resumed and named, on a stand-in for `train`; and real
runs."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import fails
from test_end_to_end import EXPERIMENT, wait_for_step

from transfusion_jax.commands import sweep as sweep_command
from transfusion_jax.commands.experiments import load_experiment, load_sweep
from transfusion_jax.commands.main import main
from transfusion_jax.config import stored
from transfusion_jax.evaluation.summary import trained_flops
from transfusion_jax.sweeps.runner import RESTARTS, progress

SWEEP = (
    EXPERIMENT.replace('evaluation=("sums", "likelihood"),', "")
    + """
from dataclasses import replace

def sweep():
    base = config()
    yield replace(base, name="a")
    yield replace(base, name="b", model=replace(base.model, layers=2))
    yield replace(base, name="c", optimizer=replace(base.optimizer, learning_rate=1e-3))

def published():
    return {"b": {"FID": 16.7, "CLIP": 25}}
"""
)
STAND_IN = """
import json, os, shutil, signal, sys, time
from pathlib import Path

train, spec, flag, directory, *overrides = sys.argv[1:]
assert (train, flag) == ("train", "--run-dir")
name, here = spec.rpartition(":")[2], Path(__file__).parent
with open(here / "started", "a") as file:
    file.write(f"{name} {' '.join(overrides)}".strip() + "\\n")
turn = [line.split()[0] for line in open(here / "started")].count(name)
codes = json.loads((here / "codes").read_text()).get(name, [0])
code = codes[min(turn, len(codes)) - 1]
directory = Path(directory)
directory.mkdir(parents=True, exist_ok=True)
shutil.copy(here / f"{name}.json", directory / "config.json")
if code == "until stopped":
    def stop(number, frame):
        (here / "stopped").write_text(signal.Signals(number).name)
        sys.exit(42)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    (here / "waiting").touch()
    time.sleep(60)
if code == 0:
    (directory / "summary.json").write_text(json.dumps({"steps": 120, "drawn": turn / 8}))
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(code)
"""


class Place:
    """A folder with a sweep of the points a, b and c, and a stand-in that runs them."""

    def __init__(self, path: Path):
        self.path = path
        (path / "three.py").write_text(SWEEP)
        (path / "stand_in.py").write_text(STAND_IN)
        for experiment in load_sweep(str(path / "three.py")).experiments:
            (path / f"{experiment.name}.json").write_text(stored.dumps(experiment))
        self.ends_with()

    def ends_with(self, **codes: list) -> None:
        """What the runs of a point do, in turn; the last of it from then on."""
        (self.path / "codes").write_text(json.dumps(codes))

    def started(self) -> list[str]:
        file = self.path / "started"
        return file.read_text().splitlines() if file.exists() else []

    def summary(self, name: str) -> dict:
        return json.loads((self.path / "runs" / "three" / name / "summary.json").read_text())


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_command, "PROGRAM", (sys.executable, str(tmp_path / "stand_in.py")))
    return Place(tmp_path)


def test_all_points_run_in_directories_of_their_own_and_the_table_is_left(place, capsys):
    assert main(("sweep", "three.py")) == 0
    assert place.started() == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("point 1 of 3, a: 00:00")]
    assert "point 3 of 3, c" in said and "left" in said
    out = place.path / "runs" / "three"
    text = (out / "table.md").read_text()
    assert text in said and text.count("finished") == 3
    assert [line[:2] for line in (out / "table.csv").read_text().splitlines()[1:]] == [
        "a,",
        "b,",
        "c,",
    ]
    assert (out / "table.png").stat().st_size > 1000
    # Again: nothing is left to do.
    assert main(("sweep", "three.py")) == 0
    assert place.started() == ["a", "b", "c"]
    assert capsys.readouterr().out.count("finished already") == 3


def test_a_failed_point_is_named_at_the_end_and_stops_no_other(place, capsys):
    place.ends_with(a=[1], b=[2])
    assert main(("sweep", "three.py")) == 1
    found = capsys.readouterr()
    assert place.started() == ["a", "b", "c"]  # what failed is not tried again
    message = "error: 2 of 3 points failed: a (exit code 1), b (exit code 2)\n"
    assert found.err == message
    assert found.out.count("not finished") == 2 and place.summary("c")
    place.ends_with()
    assert main(("sweep", "three.py")) == 0
    assert place.started() == ["a", "b", "c", "a", "b"]


def test_a_point_that_asks_for_it_or_was_killed_is_started_again(place, capsys):
    place.ends_with(a=[42, "killed", 0], c=[42])
    assert main(("sweep", "three.py")) == 1
    found = capsys.readouterr()
    assert place.started() == ["a"] * 3 + ["b"] + ["c"] * (1 + RESTARTS)
    assert "1 of 3 points failed: c (exit code 42)" in found.err
    assert "a: exit code 137, started again" in found.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_point_that_runs_and_ends_the_sweep_with_42(place, number):
    place.ends_with(b=["until stopped", 0])
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # which nohup ignores
        "from transfusion_jax.commands import sweep\n"
        "from transfusion_jax.commands.main import main\n"
        "sweep.PROGRAM = (sys.executable, 'stand_in.py')\n"
        "code = main(['sweep', 'three.py'])\n"
        "assert 'jax' not in sys.modules  # which would take the devices from the runs\n"
        "sys.exit(code)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    while not (place.path / "waiting").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    passed_on = signal.SIGTERM if number == signal.SIGHUP else number
    assert (place.path / "stopped").read_text() == passed_on.name
    assert run.returncode == 42, err
    assert err == f"error: stopped by {number.name}; the same command does the rest\n"
    assert place.started() == ["a", "b"]
    assert main(("sweep", "three.py")) == 0
    assert place.started() == ["a", "b", "b", "c"]


def test_points_are_chosen_by_name_or_index(place, capsys):
    assert main(("sweep", "three.py", "--index", "2", "--out", "elsewhere")) == 0
    assert place.started() == ["c"]
    assert (place.path / "elsewhere" / "c" / "summary.json").exists()
    assert (place.path / "elsewhere" / "table.md").read_text().count("not run") == 2
    assert not (place.path / "runs").exists()
    assert main(("sweep", "three.py", "--only", "c", "a")) == 0
    assert place.started() == ["c", "a", "c"]  # in the order of the sweep


@pytest.mark.parametrize("code", [42, "killed"])
def test_an_array_job_is_started_again_from_outside(place, capsys, code):
    place.ends_with(c=[code, 0])
    assert main(("sweep", "three.py", "--index", "2")) == 42
    assert "c (exit code" in capsys.readouterr().err
    assert place.started() == ["c"]
    assert main(("sweep", "three.py", "--index", "2")) == 0
    place.ends_with(b=[1])
    assert main(("sweep", "three.py", "--index", "1")) == 1


def test_overrides_hold_for_every_point(place):
    for name in "abc":
        experiment = load_sweep("three.py", ["--train.steps", "7"]).experiments["abc".index(name)]
        (place.path / f"{name}.json").write_text(stored.dumps(experiment))
    assert main(("sweep", "three.py", "--train.steps", "7", "--data.batch-rows", "4")) == 0
    assert place.started() == [f"{name} --train.steps 7 --data.batch-rows 4" for name in "abc"]


def test_points_that_overrides_make_one_are_refused(place, capsys):
    rate = ("--optimizer.learning-rate", "1e-3")
    assert main(("sweep", "three.py", *rate)) == 2
    expected = "a and c are one experiment with --optimizer.learning-rate 1e-3"
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert place.started() == []


def test_a_folder_may_have_a_colon_in_its_name(place):
    folder = place.path / "a:b"
    folder.mkdir()
    (folder / "three.py").write_text(SWEEP)
    assert load_experiment("a:b/three.py:b").model.layers == 2
    assert load_experiment("a:b/three.py").name == load_experiment("three.py").name
    with pytest.raises(ValueError, match="there is no experiment file a:b/none.py"):
        load_experiment("a:b/none.py")


@pytest.mark.parametrize("content", ["3", "[]", "{}", "null"])
def test_a_summary_without_numbers_is_named(place, capsys, content):
    assert main(("sweep", "three.py", "--only", "a")) == 0
    file = Path("runs", "three", "a", "summary.json")
    file.write_text(content)
    assert main(("sweep", "three.py", "--table")) == 2
    assert capsys.readouterr().err == f"error: {file} holds no numbers of a run\n"
    (file.parent / "config.json").write_bytes(b"\xff")
    assert main(("sweep", "three.py", "--table")) == 2
    assert "a/config.json does not hold an experiment" in capsys.readouterr().err


def test_another_sampler_evaluates_again_and_keeps_no_number_of_the_one_before(place, capsys):
    assert main(("sweep", "three.py", "--only", "a")) == 0
    place.ends_with(a=[0, 1])
    assert main(("sweep", "three.py", "--only", "a", "--sampler.guidance", "9")) == 1
    assert place.started() == ["a", "a --sampler.guidance 9"]
    capsys.readouterr()
    assert main(("sweep", "three.py", "--table", "--sampler.guidance", "9")) == 0
    (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| a ")]
    assert "not finished" in row


def test_damage_of_another_point_stops_none(place, capsys):
    assert main(("sweep", "three.py", "--only", "b")) == 0
    Path("runs", "three", "b", "summary.json").write_text("{")
    capsys.readouterr()
    assert main(("sweep", "three.py", "--index", "0")) == 0
    said = capsys.readouterr().out
    assert "b is left out: runs/three/b/summary.json is not JSON" in said
    rows = [line.split("|")[1:3] for line in said.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in rows[2:]] == [
        ["a", "finished"],
        ["b", "unusable"],
        ["c", "not run"],
    ]
    assert "b/summary.json is not JSON" in fails(capsys, "sweep", "three.py", "--index", "1")


@pytest.mark.parametrize(
    ("part", "changes", "message", "status"),
    [
        ("model", {"layers": 1}, "holds a run of another config", "unusable"),
        ("sampler", {"guidance": 7.5}, "was measured with another sampler", "not finished"),
    ],
)
def test_a_point_that_ran_another_config_than_was_read_has_failed(
    place, capsys, part, changes, message, status
):
    """As where the sweep's file changes while it runs."""
    ran = json.loads((place.path / "b.json").read_text())
    ran[part] |= changes
    (place.path / "b.json").write_text(json.dumps(ran))
    assert main(("sweep", "three.py")) == 1
    said = capsys.readouterr()
    assert said.err == "error: 1 of 3 points failed: b (exit code 1)\n"
    assert f"point 2 of 3, b: runs/three/b {message}" in said.out
    (row,) = [line for line in said.out.splitlines() if line.startswith("| b ")]
    assert status in row and "0.125" not in row


def test_what_a_resumed_run_may_change_is_shown_as_it_ran(place, capsys):
    assert main(("sweep", "three.py")) == 0
    file = place.path / "runs" / "three" / "c" / "config.json"
    ran = json.loads(file.read_text())
    ran["model"]["remat"] = "minimal"
    file.write_text(json.dumps(ran))
    capsys.readouterr()
    assert main(("sweep", "three.py")) == 0
    said = capsys.readouterr().out
    assert "point 3 of 3, c: finished already, with model.remat=minimal\n" in said
    assert "model.remat=minimal" in next(x for x in said.splitlines() if x.startswith("| c "))


def test_a_table_that_cannot_be_read_is_written_anew(place):
    assert main(("sweep", "three.py")) == 0
    file = place.path / "runs" / "three" / "table.csv"
    before = file.read_bytes()
    file.write_bytes(b"\xff\x00" + before)
    assert main(("sweep", "three.py", "--table")) == 0
    assert file.read_bytes() == before


def test_another_suite_evaluates_again(place, capsys):
    assert main(("sweep", "three.py", "--only", "a")) == 0
    capsys.readouterr()
    assert main(("sweep", "three.py", "--dry-run", "--evaluation", "sums")) == 0
    assert "# a: not finished" in capsys.readouterr().out


def test_a_table_says_which_points_it_no_longer_has(place, capsys):
    assert main(("sweep", "three.py", "--only", "a")) == 0
    table = place.path / "runs" / "three"
    assert (table / "table.png").exists()
    file = place.path / "three.py"
    text = file.read_text().replace('name="a"', 'name="z"')
    file.write_text(text.replace('{"b": {"FID": 16.7, "CLIP": 25}}', "{}"))
    capsys.readouterr()
    assert main(("sweep", "three.py", "--table")) == 0
    assert "no longer in the table: a, which this sweep does not have" in capsys.readouterr().out
    # Nothing is finished in the new one: a picture would be that of the old.
    shown = (table / "table.md").read_text()
    assert "| z " in shown and not (table / "table.png").exists()


def test_list_dry_run_and_table_run_nothing(place, capsys):
    assert main(("sweep", "three.py", "--list")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  0  a  (as most points)",
        "  1  b  model.layers=2",
        "        published: FID 16.7, CLIP 25",
        "  2  c  optimizer.learning_rate=0.001",
    ]
    assert main(("sweep", "three.py", "--list", "--index", "2")) == 0
    assert capsys.readouterr().out == "  2  c  optimizer.learning_rate=0.001\n"
    line = ("sweep", "three.py", "--dry-run", "--only", "b", "--train.steps", "9")
    assert main(line) == 0
    status, command = capsys.readouterr().out.splitlines()
    assert status == "# b: not run"
    expected = "train three.py:b --run-dir runs/three/b --train.steps 9"
    assert shlex.split(command)[2:] == expected.split()
    assert not (place.path / "runs").exists()
    assert main(("sweep", "three.py", "--table")) == 0
    assert capsys.readouterr().out.count("not run") == 3
    assert {path.name for path in (place.path / "runs" / "three").iterdir()} == {
        "table.md",
        "table.csv",
        "table.png",
    }
    assert place.started() == []


def test_a_dry_run_says_what_is_finished(place, capsys):
    main(("sweep", "three.py", "--only", "b"))
    capsys.readouterr()
    assert main(("sweep", "three.py", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] == "#"] == [
        "# a: not run",
        "# b: finished",
        "# c: not run",
    ]
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sweep", "name a sweep file (see transfusion-jax sweep --help)"),
        ("sweep none.py", "there is no experiment file none.py"),
        ("sweep tiny.py", "tiny.py has no function sweep()"),
        ("sweep three.py --only a d", "there is no point 'd', only a, b, c"),
        ("sweep three.py --index 3", "--index 3 must be in 0..2"),
        ("sweep three.py --index -1", "--index -1 must be in 0..2"),
        ("sweep three.py --index 1 --only a", "not allowed with argument"),
        ("sweep three.py --list --table", "not allowed with argument"),
        ("sweep three.py --table --index 1", "--table shows all points"),
        ("sweep three.py --model.widht 3", "perhaps you meant --model.width"),
        ("sweep three.py --model.heads 3", "model.heads=3 must divide model.width=32"),
        ("sweep three.py --name x", "--name cannot be set"),
        ("sweep three.py --out three.py/x", "three.py is a file, not a directory"),
        ("sweep three.py --out gs://b/runs", "gs://b/runs is not a local path"),
        ("sweep three.py:a", "there is no experiment file three.py:a"),
    ],
)
def test_bad_input_starts_nothing(place, capsys, line, message):
    (place.path / "tiny.py").write_text(EXPERIMENT)
    assert message in fails(capsys, *line.split())
    assert place.started() == [] and not (place.path / "runs").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield config()\n    yield config()", "has two points called 'tiny'"),
        ("yield replace(config(), name='..')", "a point cannot be called '..'"),
        ("yield replace(config(), name='x/y')", "a point cannot be called 'x/y'"),
        ("yield replace(config(), name='')", "a point cannot be called ''"),
        ("yield replace(config(), name='lr:1')", "a point cannot be called 'lr:1': it is run as"),
        ("yield replace(config(), name='table.csv')", "a point cannot be called 'table.csv': it"),
        ("yield replace(config(), name='config.json')", "cannot be called 'config.json': it is"),
        ("yield replace(config(), name='a\\nb')", "a point cannot be called 'a\\nb': it is a"),
        ("yield replace(config(), name='-x')", "a point cannot be called '-x': it is a file, a f"),
        ("return []", "yields nothing"),
        ("yield int('x')", "invalid literal for int"),
        ("yield 3", "must yield experiments"),
        ("from types import SimpleNamespace as S; yield S(name='s')", "returns SimpleNamespace"),
        ("yield config()\n\ndef published(): return {'x': {}}", "has no point 'x'"),
        ("yield config()\n\ndef published(): return 3", "must return {point: {metric: number}}"),
        ("yield config()\n\ndef published(): return {'tiny': {'a': 'b'}}", "must return {point:"),
        ("yield config()\n\ndef published(): return {'tiny': 3}", "must return {point:"),
    ],
)
def test_bad_sweep_files(place, capsys, body, message):
    start = f"{EXPERIMENT}\nfrom dataclasses import replace\n\ndef sweep():\n    "
    (place.path / "bad.py").write_text(f"{start}{body}\n")
    assert message in fails(capsys, "sweep", "bad.py")
    assert not (place.path / "runs").exists()


def test_a_point_of_two_is_not_trained_either(place, capsys):
    start = f"{EXPERIMENT}\ndef sweep():\n    yield config()\n    yield config()\n"
    (place.path / "bad.py").write_text(start)
    assert "has two points called 'tiny'" in fails(capsys, "train", "bad.py:tiny")


@pytest.mark.parametrize("how", [(), ("--only", "a"), ("--table",), ("--dry-run",)])
def test_directories_of_others_are_never_touched(place, capsys, how):
    other = place.path / "runs" / "three" / "b"
    other.mkdir(parents=True)
    (other / "config.json").write_text((place.path / "a.json").read_text())
    line = fails(capsys, "sweep", "three.py", *how)
    assert "runs/three/b holds a run of another config" in line and "model.layers: 1 -> 2" in line
    (other / "config.json").rename(other / "thesis.tex")
    assert "runs/three/b is not a run directory" in fails(capsys, "sweep", "three.py", *how)
    (other / "thesis.tex").rename(other.parent / "config.json")
    assert "runs/three holds a run" in fails(capsys, "sweep", "three.py", *how)
    assert place.started() == [] and list(other.iterdir()) == []


def test_help_shows_the_first_point(place, capsys):
    assert main(("sweep", "three.py", "--help")) == 0
    assert "--name STR" in (said := capsys.readouterr().out)
    assert "(default: a)" in said


def test_progress_reckons_with_the_mean_of_what_was_run():
    assert progress(0.0, [], 3) == "00:00 so far"
    assert progress(90.0, [60.0, 30.0], 4) == "01:30 so far, about 03:00 left"


def test_flops_of_a_run_are_those_of_all_its_steps(tmp_path):
    def log(*rows: tuple[int, float | None]) -> None:
        lines = [json.dumps({"step": step, "model_flops_per_step": n}) for step, n in rows]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))

    assert trained_flops(tmp_path) == {}
    log((1, 5.0), (10, 7.0), (16, 1.0))
    assert trained_flops(tmp_path) == {"model_flops": 5 + 9 * 7 + 6 * 1}
    log((1, 5.0), (10, None))
    assert trained_flops(tmp_path) == {}


@pytest.mark.slow
def test_real_runs_are_stopped_resumed_and_compared(tmp_path):
    text = SWEEP.replace('name="c", optimizer', 'name="c", mesh=MeshConfig(data=77), optimizer')
    (tmp_path / "three.py").write_text(text)
    command = [sys.executable, "-m", "transfusion_jax", "sweep", "three.py"]

    def start() -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    out = tmp_path / "runs" / "three"
    first = start()
    wait_for_step(out / "a", 30, first)
    first.send_signal(signal.SIGTERM)
    said, err = first.communicate(timeout=300)
    assert first.returncode == 42, said + err
    assert "stopped by SIGTERM at step" in said and "the same command does the rest" in err
    second = start()
    said, err = second.communicate(timeout=600)
    assert second.returncode == 1, said + err
    assert "resuming from checkpoint" in said and "mesh.data=77" in err
    assert err.endswith("error: 1 of 3 points failed: c (exit code 2)\n")
    assert (out / "table.md").read_text() in said
    a, b = (json.loads((out / name / "summary.json").read_text()) for name in "ab")
    assert a["tokens"] == b["tokens"] == 120 * 4 * 64
    assert 0 < a["model_flops"] < b["model_flops"] and a["parameters"] < b["parameters"]
