"""`check`: each check on invented facts, the facts of this process, and real processes."""

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from transfusion_jax.commands.main import main
from transfusion_jax.config import MeshConfig, SourceConfig, TokenizerConfig
from transfusion_jax.config.stored import dumps
from transfusion_jax.data.sources.dataset import open_dataset
from transfusion_jax.host import cores
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.preflight import facts as facts_module
from transfusion_jax.preflight import run_directory
from transfusion_jax.preflight.data import data_facts
from transfusion_jax.preflight.facts import Facts, collect, versions
from transfusion_jax.preflight.judgement import Asked, Finding, judge, table
from transfusion_jax.preflight.needs import Needs, needs_of
from transfusion_jax.preparation.prepare import Preparation, prepare
from transfusion_jax.pretraining.state import blueprint

DIGITS = Path(__file__).parent.parent / "experiments" / "digits.py"
GIB = 2**30
CHECKS = [
    "experiment", "versions", "devices", "mesh", "memory", "data", "run directory", "space",
    "clocks",
]  # fmt: skip
ASKED = Asked(keep_checkpoints=3, plan="transfusion-jax plan x.py")


def fact(process: int, **changes) -> Facts:
    """What a process of a healthy pod knows."""
    healthy = Facts(
        process=process,
        host=f"host{process}",
        experiment="e" * 64,
        versions={"python": "3.12.1", "jax": "0.12.0"},
        platform="tpu",
        kind="TPU v5p",
        devices=4,
        needs=Needs(mesh="fsdp=16", state=2 * GIB, checkpoint=10 * GIB),
        memory=95 * GIB,
        data={"digits": {"digest": "built in"}, "data/mine": {"digest": "d" * 64}},
        directory=None,
        passes=False,
        free=100 * GIB,
        held=0,
        clock=1000.0,
    )
    return replace(healthy, **changes)


def pod(**changes) -> list[Facts]:
    """Four processes; the third differs."""
    return [fact(process, **(changes if process == 2 else {})) for process in range(4)]


def failures(facts: list[Facts]) -> dict[str, str]:
    """The problem of every check that fails."""
    return {finding.check: finding.text for finding in judge(facts, ASKED) if not finding.ok}


def test_all_checks_hold_on_a_healthy_pod_and_a_single_process():
    for facts in (pod(), [fact(0)]):
        findings = judge(facts, ASKED)
        assert [finding.check for finding in findings] == CHECKS
        assert failures(facts) == {}
    text = {finding.check: finding.text for finding in judge(pod(), ASKED)}
    assert text["devices"] == "16 TPU v5p in 4 processes on 4 hosts"
    assert text["versions"] == "python 3.12.1, jax 0.12.0"
    assert text["memory"] == (
        "state 2.00 GiB of 95.00 GiB a device; for activations as well: transfusion-jax plan x.py"
    )
    assert text["space"] == "100.00 GiB free for 4 checkpoints of 10.00 GiB"


NAMED = "process 2 (host2)"


@pytest.mark.parametrize(
    ("changes", "check", "parts"),
    [
        ({"experiment": "f" * 64}, "experiment", ["eeeeeeee on", f"ffffffff on {NAMED}"]),
        (
            {"versions": {"python": "3.12.1", "jax": "0.12.1"}},
            "versions",
            ["jax differs: 0.12.0 on process 0 (host0), process 1", f"0.12.1 on {NAMED}"],
        ),
        ({"versions": {"python": "3.12.1"}}, "versions", [f"not installed on {NAMED}"]),
        ({"devices": 3}, "devices", [f"3 TPU v5p on {NAMED}", "4 TPU v5p on process 0"]),
        ({"kind": "TPU v4"}, "devices", [f"4 TPU v4 on {NAMED}"]),
        ({"memory": GIB}, "memory", ["state 2.00 GiB of 1.00 GiB a device", "fsdp"]),
        (
            {"needs": Needs(mesh="fsdp=16", state=96 * GIB, checkpoint=10 * GIB)},
            "memory",
            ["state 96.00 GiB of 95.00 GiB"],
        ),
        ({"directory": "cannot write to x"}, "run directory", [f"cannot write to x (on {NAMED})"]),
        ({"clock": 1007.5}, "clocks", [f"{NAMED} is 7.5 s ahead of process 0", "at most 5 s"]),
        ({"clock": 992.0}, "clocks", [f"process 0 (host0) is 8.0 s ahead of {NAMED}"]),
        (
            {"data": {"digits": {"digest": "built in"}, "data/mine": {"digest": "c" * 64}}},
            "data",
            ["data/mine differs between hosts", f"cccccccc on {NAMED}"],
        ),
        (
            {"data": {"digits": {"digest": "built in"}, "data/mine": {"problem": "gone"}}},
            "data",
            [f"gone (on {NAMED})"],
        ),
    ],
)
def test_what_differs_on_one_host_fails_one_check_and_is_named(changes, check, parts):
    found = failures(pod(**changes))
    assert list(found) == [check]
    assert all(part in found[check] for part in parts), found


@pytest.mark.parametrize("lacks", [0, 2])
def test_a_source_that_one_host_lacks_is_named(lacks):
    facts = [fact(i, **({"data": {"digits": {"digest": "built in"}}} if i == lacks else {}))
             for i in range(4)]  # fmt: skip
    text = failures(facts)["data"]
    assert "data/mine differs between hosts" in text and f"absent on process {lacks}" in text


def test_a_mesh_that_does_not_fit_leaves_memory_and_space_unknown():
    facts = [fact(process, needs=Needs(problem="mesh.data=3 do not fit")) for process in range(4)]
    found = failures(facts)
    assert list(found) == ["mesh", "memory", "space"]
    assert "mesh.data=3" in found["mesh"] and "process 2 (host2) and 1 more" in found["mesh"]


@pytest.mark.parametrize(
    ("free", "held", "fits"),
    [(40, 0, True), (39, 0, False), (10, 30, True), (9, 30, False)],
)
def test_space_is_that_of_the_kept_checkpoints_and_one_more(free, held, fits):
    """Four checkpoints of 10 GiB, less what is there; the leader alone measures."""
    facts = pod(free=0)
    facts[0] = fact(0, free=free * GIB, held=held * GIB)
    assert list(failures(facts)) == ([] if fits else ["space"])
    (finding,) = [finding for finding in judge(facts, ASKED) if finding.check == "space"]
    assert finding.passes == (not fits and held > 0)  # a run that is there may find room


@pytest.mark.parametrize("passes", [True, False])
def test_a_directory_may_come_back_where_it_may_in_all_processes(passes):
    facts = pod(directory="cannot write to x: [Errno 28] No space left on device", passes=True)
    facts[3] = fact(3, directory="cannot write to x", passes=passes)
    (finding,) = [finding for finding in judge(facts, ASKED) if not finding.ok]
    assert finding.passes == passes


@pytest.mark.parametrize("passes", [True, False])
def test_space_is_not_known_where_the_directory_cannot_be_read(passes):
    facts = [fact(0, directory="cannot read x", passes=passes, free=None)]
    failed = [finding for finding in judge(facts, ASKED) if not finding.ok]
    assert [finding.check for finding in failed] == ["run directory", "space"]
    assert {finding.passes for finding in failed} == {passes}


def test_devices_of_a_cpu_share_the_memory_of_the_machine():
    devices = jax.local_devices()
    least = facts_module._memory(devices)
    assert 0 < least == facts_module._memory(devices[:1]) // len(devices)


def test_devices_that_do_not_say_their_memory_hold_any_state():
    facts = [fact(0, memory=None, needs=Needs(mesh="one device", state=10**15))]
    assert failures(facts) == {}
    facts = [fact(0, memory=None, needs=Needs(state=10**15)), fact(1, memory=GIB)]
    assert "memory" in failures(facts)


def test_the_table_has_a_line_for_each_check():
    findings = [Finding("devices", True, "8"), Finding("mesh", False, "two\nlines")]
    assert table(findings) == "  ok    devices       8\n  FAILS mesh          two lines"


# The facts of this process


def test_facts_survive_the_way_to_other_processes(experiment, tmp_path):
    (found,) = collect(experiment, tmp_path / "run")
    assert Facts.of_json(json.loads(json.dumps(found.json()))) == found
    assert (found.process, found.platform, found.devices) == (0, "cpu", 8)
    assert found.host == socket.gethostname() and found.directory is None
    assert found.free > 0 and found.held == 0


def test_a_state_needs_its_parameters_average_and_two_moments(experiment):
    whole = needs_of(replace(experiment, mesh=MeshConfig(data=8)))
    assert whole.problem is None and whole.mesh == "data=8"
    parameters = blueprint(experiment, make_mesh(MeshConfig(data=8))).parameters
    assert 0 <= whole.checkpoint - 4 * 4 * parameters < 100  # beside it: counters
    assert whole.state == whole.checkpoint
    cut = needs_of(replace(experiment, mesh=MeshConfig(data=1, fsdp=8)))
    assert cut.checkpoint == whole.checkpoint
    assert whole.state / 8 <= cut.state < whole.state / 6  # norms are whole everywhere


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "mesh.data=3"),
        (MeshConfig(data=1, tensor=8), "does not divide"),
    ],
)
def test_a_mesh_that_does_not_suit_is_a_problem(experiment, mesh, message):
    assert message in needs_of(replace(experiment, mesh=mesh)).problem


def test_what_train_would_refuse_of_rows_and_processes_is_a_problem(experiment, monkeypatch):
    rows = replace(experiment, data=replace(experiment.data, batch_rows=12))
    assert "data.batch_rows=12" in needs_of(rows).problem
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("transfusion_jax.parallel.processes.metadata.version", lambda _: "0.10.2")
    cut = replace(experiment, mesh=MeshConfig(data=1, fsdp=8))
    assert "needs jaxlib 0.12 or newer" in needs_of(cut).problem


def test_versions_tell_changed_code_of_the_same_version(tmp_path, monkeypatch):
    before = versions()
    assert before["jax"] == jax.__version__ and set(facts_module.PACKAGES) <= set(before)
    package = tmp_path / "transfusion_jax"
    package.mkdir()
    for text in ("a = 1", "a = 2"):
        (package / "__init__.py").write_text(text)
        fake = str(package / "__init__.py")
        monkeypatch.setattr("transfusion_jax.__file__", fake)
        assert versions() != before
        before = versions()


@pytest.fixture
def prepared(tmp_path) -> Path:
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {i} of a text"}) for i in range(40))
    )
    target = tmp_path / "prepared"
    inputs = (str(tmp_path / "texts.jsonl"),)
    prepare(Preparation(inputs=inputs), target, None, False, 1, lambda line: None)
    return target


def test_prepared_data_is_told_apart_and_damage_is_found(experiment, prepared, tmp_path):
    def found() -> dict[str, str]:
        sources = (SourceConfig("digits"), SourceConfig(str(prepared)))
        asked = replace(experiment, data=replace(experiment.data, sources=sources))
        facts = data_facts(asked, tmp_path)
        assert facts["digits"] == {"digest": "built in"}
        return facts[str(prepared)]

    whole = found()
    info = json.loads((prepared / "dataset.json").read_text())
    (prepared / "dataset.json").write_text(json.dumps(info | {"prepared_again": True}))
    assert found()["digest"] != whole["digest"]
    shard = prepared / "shards" / info["shards"][0]["name"]
    content = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(content))  # of the right size
    assert f"cannot read {prepared}: Corrupted" in found()["problem"]
    shard.unlink()
    assert "has lost the shard" in found()["problem"]
    (prepared / "dataset.json").unlink()
    assert str(prepared) in found()["problem"]
    with pytest.raises(ValueError):
        open_dataset(prepared)


def test_sources_that_do_not_fit_together_are_a_problem(experiment, prepared, tmp_path):
    def problem(*names: Path | str, **model) -> str | None:
        sources = tuple(SourceConfig(str(name)) for name in names)
        asked = replace(
            experiment,
            data=replace(experiment.data, sources=sources),
            model=replace(experiment.model, **model),
        )
        facts = data_facts(asked, tmp_path / "run")
        return facts[str(names[0])].get("problem")

    assert problem(prepared) is None
    assert "more than model.vocab_size=8" in problem(prepared, vocab_size=8)
    again = tmp_path / "again"
    (tmp_path / "others.txt").write_text("words of another kind " * 50)
    inputs = (str(tmp_path / "others.txt"),)
    prepare(Preparation(inputs=inputs), again, None, False, 1, lambda line: None)
    assert "were prepared with different tokenizers" in problem(prepared, again)


def test_validation_without_held_out_rows_is_a_problem(experiment, tmp_path):
    (tmp_path / "words.txt").write_text("a few words " * 50)

    def problem(held_out: float) -> str | None:
        out = tmp_path / f"data_{held_out}"
        inputs = (str(tmp_path / "words.txt"),)
        prepare(
            Preparation(inputs=inputs, held_out=held_out), out, None, False, 1, lambda line: None
        )
        asked = replace(
            experiment,
            data=replace(experiment.data, sources=(SourceConfig(str(out)),)),
            train=replace(experiment.train, validate_every=5),
        )
        return data_facts(asked, tmp_path / "run")[str(out)].get("problem")

    assert "train.validate_every=5: no held-out rows in" in problem(0.0)
    assert problem(0.9) is None


def test_a_tokenizer_that_is_missing_is_a_problem(experiment, tmp_path):
    path = str(tmp_path / "x.model")
    asked = replace(experiment, tokenizer=TokenizerConfig(path=path))
    assert path in data_facts(asked, tmp_path)[path]["problem"]
    Path(path).write_text("x")
    assert data_facts(asked, tmp_path)[path]["digest"].startswith("2d711642")


def test_the_directory_is_left_as_it_was(experiment, tmp_path):
    directory = tmp_path / "runs" / "a"
    assert run_directory.directory_problem(experiment, directory) is None
    assert list(tmp_path.iterdir()) == []
    directory.mkdir(parents=True)
    assert run_directory.directory_problem(experiment, directory) is None
    assert list(directory.iterdir()) == []


def test_a_directory_that_cannot_be_used_is_a_problem(experiment, tmp_path):
    (tmp_path / "file").touch()
    for path, message in [("file/run", "cannot write to"), ("file", "is a file")]:
        line, passes = run_directory.directory_problem(experiment, tmp_path / path)
        assert message in line and not passes
    (tmp_path / "notes.txt").touch()
    assert "holds" in run_directory.directory_problem(experiment, tmp_path)[0]


STORAGE = [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, errno.EDQUOT, errno.ESTALE]


@pytest.mark.parametrize("number", [*STORAGE, errno.EACCES])
@pytest.mark.parametrize("method", ["write_text", "read_text"])
def test_storage_that_fails_under_a_run_is_as_it_is_to_train(
    experiment, tmp_path, monkeypatch, number, method
):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    directory = tmp_path / "run"
    monkeypatch.setattr(Path, method, failing)
    line, passes = run_directory.directory_problem(experiment, directory)
    assert os.strerror(number) in line and not passes  # there is no run yet
    directory.mkdir()
    (directory / "config.json").write_bytes(dumps(experiment).encode())
    line, passes = run_directory.directory_problem(experiment, directory)
    assert os.strerror(number) in line and passes == (number in STORAGE)


@pytest.mark.parametrize("method", ["_free", "_held"])
def test_storage_that_does_not_say_its_size_may_come_back(
    experiment, tmp_path, monkeypatch, method
):
    def failing(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    (tmp_path / "config.json").write_text(dumps(experiment))
    monkeypatch.setattr(facts_module, method, failing)
    (found,) = collect(experiment, tmp_path)
    assert "Stale file handle" in found.directory and found.passes and found.free is None


def test_a_process_that_does_not_see_the_leaders_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "PATIENCE", 0.0)
    assert "is not the directory" in run_directory._read(tmp_path, "abc")[0]
    run_directory.token_file(tmp_path, "abc").write_text("xyz")
    assert "does not hold" in run_directory._read(tmp_path, "abc")[0]


def test_what_checkpoints_hold_already_is_counted(experiment, tmp_path):
    (tmp_path / "config.json").write_text(dumps(experiment))
    place = tmp_path / "checkpoints" / "3" / "state"
    place.mkdir(parents=True)
    (place / "array").write_bytes(bytes(1000))
    assert collect(experiment, tmp_path)[0].held == 1000


# The command


def test_the_command_prints_every_check(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(("check", str(DIGITS), "--train.keep-checkpoints", "2")) == 0
    said = capsys.readouterr().out
    assert said.startswith("digits in runs/digits\n") and said.endswith("all checks hold\n")
    lines = [line for line in said.splitlines() if line.startswith("  ok")]
    assert [line[8:22].strip() for line in lines] == CHECKS
    assert "free for 3 checkpoints of" in said
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_is_exit_code_1_or_42_where_room_may_come(capsys, tmp_path, monkeypatch):
    line = ("check", str(DIGITS), "--run-dir", str(tmp_path / "run"))
    assert main((*line, "--mesh.data", "3")) == 1
    said = capsys.readouterr().out
    assert "  FAILS mesh" in said and "mesh.data=3" in said
    assert said.endswith("fails: mesh, memory, space\n")
    monkeypatch.setattr(facts_module, "_free", lambda directory: 10)
    assert main(line) == 1
    assert "do not fit into 10 B free" in capsys.readouterr().out
    monkeypatch.setattr(facts_module, "_held", lambda checkpoints: 1)
    assert main(line) == 42  # the run is there, and somebody may make room
    assert main((*line, "--mesh.data", "3")) == 1


def test_the_command_says_how_to_plan_the_same_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(facts_module, "_memory", lambda devices: 10**12)
    line = ("check", str(DIGITS), "--run-dir", str(tmp_path / "run"))
    assert main((*line, "--model.layers", "2")) == 0
    plan = f"transfusion-jax plan {DIGITS} --topology NAME --model.layers 2"
    assert plan in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("check", "name an experiment file"),
        (f"check {DIGITS} --run-dir gs://bucket/run", "gs://bucket/run is not a local path"),
        ("check none.py", "there is no experiment file none.py"),
        (f"check {DIGITS} --model.widht 3", "perhaps you meant --model.width"),
        (f"check {DIGITS} --evaluation fid", "'fid' is not one of"),
        (f"check {DIGITS} --profile 5", "--profile 5 is not START:STOP"),
        (f"check {DIGITS} --profile 10:9999", "must be steps from 1 to train.steps=1000"),
        (f"check {DIGITS} --num-processes 2", "--coordinator"),
        (f"check {DIGITS} --coordinator a:1 --num-processes 2 --process-id 2", "--process-id 2"),
    ],
)
def test_bad_input_of_check(capsys, words, message):
    assert main(tuple(words.split())) == 2
    line = capsys.readouterr().err
    assert message in line and line.startswith("error: ") and line.count("\n") == 1


def two_processes(arguments: list[list], places: list[Path]) -> list[tuple[int, str, str]]:
    """Runs `check` in two processes, each with arguments and a directory of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(DIGITS.parents[1])}
    command = [sys.executable, "-m", "transfusion_jax", "check"]
    flags = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    running = [
        subprocess.Popen(
            [*command, *map(str, arguments[process]), *flags, str(process)],
            cwd=places[process],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate(timeout=180) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, said, strict=True)]


def test_two_processes_agree_and_their_leader_speaks(tmp_path):
    places = [tmp_path, tmp_path]
    (code, said, _), (other, nothing, _) = two_processes([[DIGITS], [DIGITS]], places)
    assert (code, other) == (0, 0), said
    assert "2 cpu in 2 processes on 1 host" in said and "data=2" in said
    assert all(line.startswith("[Gloo]") for line in nothing.splitlines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # waits until a file must have been seen
def test_two_processes_that_differ_are_told_apart(tmp_path):
    """Another config, and with that relative path another run directory."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    arguments = [[DIGITS], [DIGITS, "--train.seed", 1]]
    (code, said, _), (other, _, _) = two_processes(arguments, places)
    assert (code, other) == (1, 1), said
    assert "is not the directory that process 0 writes to (on process 1" in said
    assert said.endswith("fails: experiment, run directory\n")


@pytest.mark.long
def test_an_experiment_that_one_process_lacks_is_bad_input_of_both(tmp_path):
    (tmp_path / "here.py").write_text(DIGITS.read_text())
    found = two_processes([["here.py"], ["here.py"]], [tmp_path, tmp_path.parent])
    assert [code for code, _, _ in found] == [2, 2]
    for _, _, line in found:
        assert "process 1: there is no experiment file here.py" in line


@pytest.mark.long
def test_check_looks_at_the_devices_that_train_would_use(capsys, tmp_path):
    """A lone process on CPUs makes one for each core, so in a process of its own."""
    command = [sys.executable, "-m", "transfusion_jax", "check", str(DIGITS)]
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cores()} cpu in 1 process" in done.stdout
