"""Exports, and runs that start from them, in several real processes."""

import pytest
from exported import run_directory
from test_export_safetensors import tiny_experiment
from test_processes import DIGITS, TINY, assert_same_losses, finished, start

from transfusion_jax.commands.main import main

OUT = ["--format", "safetensors", "--out"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    (path / "tiny.py").write_text(TINY.format(digits=str(DIGITS)))
    return path


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.long
def test_two_processes_write_what_one_does_and_refuse_together(workplace):
    run = run_directory(workplace / "run", tiny_experiment())
    assert main(["export", str(run), *OUT, str(workplace / "one")]) == 0
    found = finished(start(workplace, "run", 2, *OUT, "two", command="export"))
    assert [code for code, _, _ in found] == [0, 0], found
    assert "written to two" in found[0][1] and found[1][1] == ""
    assert contents(workplace / "two") == contents(workplace / "one")
    found = finished(start(workplace, "run", 2, *OUT, "two", command="export"))
    assert [code for code, _, _ in found] == [2, 2], found
    assert all("error: two is not empty" in err for _, _, err in found)


@pytest.mark.slow
def test_what_two_processes_trained_leaves_and_starts_two_and_one(workplace):
    flags = ["--train.steps", "5"]
    found = finished(start(workplace, "first", 2, *flags))
    assert [code for code, _, _ in found] == [0, 0], found
    found = finished(start(workplace, "first", 2, *OUT, "weights", command="export"))
    assert [code for code, _, _ in found] == [0, 0], found
    for count in (1, 2):
        run = f"from_weights_{count}"
        found = finished(start(workplace, run, count, *flags, "--train.initial", "weights"))
        assert [code for code, _, _ in found] == [0] * count, found
        assert "starting from the weights in weights" in found[0][1]
    assert_same_losses(workplace / "from_weights_1", workplace / "from_weights_2")
    with pytest.raises(AssertionError):
        assert_same_losses(workplace / "from_weights_1", workplace / "first")
