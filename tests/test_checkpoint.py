import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfusion_jax.training import checkpoint as checkpoint_lib
from transfusion_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointUnreadable,
    checksum,
    load_average,
)
from transfusion_jax.training.state import State

PROGRESS = {"train_seconds": 0.0, "data": ["x"]}


@pytest.fixture
def state():
    """A small state at step 20; no two of its arrays are equal."""
    draw = np.random.default_rng(0).normal

    def network():
        return {
            "kernel": jnp.asarray(draw(size=(64, 32)), jnp.float32),
            "scale": jnp.asarray(draw(size=32), jnp.bfloat16),
        }

    return State(
        step=jnp.int32(20),
        parameters=network(),
        ema=network(),
        optimizer=({"count": jnp.int32(18), "moments": network()}, ()),
        skipped=jnp.int32(2),
        skipped_in_a_row=jnp.int32(1),
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def checkpoints(path, said=None, keep=3):
    return Checkpoints(path / "checkpoints", keep, (said if said is not None else []).append)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_all_of_a_state_comes_back_with_its_progress(state, tmp_path):
    saved = checkpoints(tmp_path)
    saved.save(state, {"train_seconds": 1.5, "data": ["x", "y"]})
    assert saved.wait()
    restored, progress = saved.restore(abstract(state))
    saved.close()
    same(restored, state)
    assert float(progress["train_seconds"]) == 1.5 and progress["data"] == ["x", "y"]


def test_what_is_loaded_for_use_is_the_average(state, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        load_average(tmp_path / "checkpoints", abstract(state.ema), print)
    saved = checkpoints(tmp_path)
    for each in (replace(state, step=state.step - 5, ema=state.parameters), state):
        saved.save(each, PROGRESS)
    saved.close()
    step, loaded = load_average(tmp_path / "checkpoints", abstract(state.ema), print)
    assert step == 20
    same(loaded, state.ema)
    assert not np.array_equal(loaded["kernel"], state.parameters["kernel"])


def _truncate(step_dir):
    largest = max((p for p in step_dir.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def _flip_bits(step_dir):
    for path in step_dir.rglob("d/*"):
        content = bytearray(path.read_bytes())
        for at in range(len(content) // 2, len(content) // 2 + 8):
            content[at] ^= 0xFF
        path.write_bytes(content)


def _empty(step_dir):
    for path in list(step_dir.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip_bits, _empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(state, tmp_path, damage):
    saved = checkpoints(tmp_path)
    older = replace(state, step=state.step - 5)
    for each in (older, state):
        saved.save(each, PROGRESS)
    saved.close()
    damage(tmp_path / "checkpoints" / "20")

    said: list[str] = []
    reopened = checkpoints(tmp_path, said)
    restored, _ = reopened.restore(abstract(state))
    assert int(restored.step) == 15
    assert any("20 is damaged" in line for line in said), said
    same(restored, older)
    # Step 20 can be saved again, and the damaged one is kept aside.
    reopened.save(state, PROGRESS)
    assert reopened.wait() and reopened.steps == [15, 20]
    assert (tmp_path / "damaged" / "20").exists()
    reopened.close()


@pytest.mark.parametrize("part", ["parameters", "ema", "optimizer"])
def test_the_checksum_of_each_part_is_compared(state, tmp_path, monkeypatch, part):
    """Damage that still decodes: here the part is intact, and the sum stored with it is not."""

    def wrong(tree):
        return checksum(tree) + jnp.uint32(tree is getattr(state, part))

    saved = checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("transfusion_jax.training.checkpoint.checksum", wrong)
        saved.save(state, PROGRESS)
    saved.close()
    said: list[str] = []
    with pytest.raises(CheckpointError):
        checkpoints(tmp_path, said).restore(abstract(state))
    assert f"the checksum of its {part} is wrong" in said[0]


def test_no_readable_checkpoint_is_an_error_and_none_at_all_is_not(state, tmp_path):
    saved = checkpoints(tmp_path)
    assert saved.restore(abstract(state)) is None
    saved.save(state, PROGRESS)
    saved.close()
    _empty(tmp_path / "checkpoints" / "20")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        checkpoints(tmp_path).restore(abstract(state))
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        load_average(tmp_path / "checkpoints", abstract(state.ema), lambda line: None)


def test_a_save_that_fails_leaves_the_last_good_one(state, tmp_path, monkeypatch):
    said: list[str] = []
    saved = checkpoints(tmp_path, said)
    saved.save(state, PROGRESS)
    assert saved.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved._manager, "save_checkpointables_async", full)
    saved.save(replace(state, step=state.step + 1), PROGRESS)
    assert "No space left" in said[-1] and "last good one is step 20" in said[-1]
    assert saved.steps == [20] and not saved.wait()
    # Once there is room again, the next save succeeds.
    saved.save(replace(state, step=state.step + 2), PROGRESS)
    assert saved.wait() and saved.steps == [20, 22]
    saved.close()


def test_a_save_that_has_no_room_is_not_begun(state, tmp_path, monkeypatch):
    """Several processes would wait in Orbax for the one that fails."""
    said = []
    saved = checkpoints(tmp_path, said)
    saved.save(state, PROGRESS)
    later = replace(state, step=state.step + 5)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        saved.save(later, PROGRESS)
    needed = int(1.1 * sum(x.nbytes for x in jax.tree.leaves(state))) + 2**20
    assert said == [
        f"could not save checkpoint {tmp_path / 'checkpoints' / '25'} (it takes {needed:,} bytes, "
        "and 1,000 are free); the last good one is step 20"
    ]
    assert not saved.wait() and saved.steps == [20]
    saved.save(later, PROGRESS)
    assert saved.wait() and saved.steps == [20, 25]
    shutil.rmtree(tmp_path / "checkpoints")
    saved.save(replace(state, step=state.step + 9), PROGRESS)
    assert "(No such file or directory)" in said[-1]
    saved.close()


def test_a_save_without_room_stops_the_run_if_asked(state, tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path / "checkpoints", 3, print, "stop")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match="stopped, as train.failed_save='stop' says"):
            saved.save(state, PROGRESS)
    saved.close()


def two_saved(state, path, said):
    saved = checkpoints(path, said)
    for step in (20, 25):
        saved.save(replace(state, step=jnp.int32(step)), PROGRESS)
    assert saved.wait()
    return saved


def test_an_error_of_reading_is_tried_again_and_is_no_damage(state, tmp_path, monkeypatch):
    said = []
    saved = two_saved(state, tmp_path, said)
    load = checkpoint_lib.ocp.load_checkpointables
    errors = [OSError(5, "Input/output error"), ValueError("UNAVAILABLE: timed out")]

    def flaky(*arguments):
        if errors:
            raise errors.pop()
        return load(*arguments)

    monkeypatch.setattr(checkpoint_lib, "RETRIES", (0.0, 0.0))
    monkeypatch.setattr(checkpoint_lib.ocp, "load_checkpointables", flaky)
    restored, _ = saved.restore(abstract(state))
    assert int(restored.step) == 25 and errors == []
    errors += [OSError(5, "Input/output error")] * 3
    with pytest.raises(CheckpointUnreadable, match=r"process 0 cannot read .*/25 \(.*Input/output"):
        saved.restore(abstract(state))
    assert saved.steps == [20, 25] and not (tmp_path / "damaged").exists()
    saved.close()


@pytest.mark.parametrize(
    ("other", "used"),
    [
        ([None, None], 25),
        ([["damage", "cannot be decoded"], None], 20),  # only this process could read step 25
        ([["passing", "stale file handle"], None], None),
        ([["missing", "stale file handle"], None], None),  # this process sees the file
    ],
    ids=["readable", "damaged", "unreadable", "not seen"],
)
def test_what_another_process_finds_holds_for_all(state, tmp_path, monkeypatch, other, used):
    said = []
    saved = two_saved(state, tmp_path, said)
    answers = list(other)

    def gathered(value):
        """Another process says the same, but of what it reads what the test says."""
        return [value, answers.pop(0) if value is None and answers else value]

    monkeypatch.setattr(checkpoint_lib, "gathered", gathered)
    if used is None:
        with pytest.raises(CheckpointUnreadable, match="process 1 cannot read .*stale file"):
            saved.restore(abstract(state))
        assert not (tmp_path / "damaged").exists()
    else:
        restored, _ = saved.restore(abstract(state))
        assert int(restored.step) == used
        assert (tmp_path / "damaged" / "25").exists() == (used == 20)


def test_old_checkpoints_are_removed_by_policy(state, tmp_path):
    saved = checkpoints(tmp_path, keep=2)
    for extra in range(4):
        saved.save(replace(state, step=state.step + extra), PROGRESS)
    saved.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [22, 23]


def test_the_checksum_sees_a_flipped_bit_in_every_array(state):
    leaves, structure = jax.tree.flatten(state)
    assert {x.dtype.itemsize for x in leaves} == {2, 4} and len(leaves) > 8
    intact = int(checksum(state))
    for number, leaf in enumerate(leaves):
        bits = np.array(leaf)  # a copy, whose last element changes in its lowest bit
        bits.reshape(-1).view(np.uint8)[-bits.itemsize] ^= 1
        flipped = structure.unflatten([*leaves[:number], jnp.asarray(bits), *leaves[number + 1 :]])
        assert int(checksum(flipped)) != intact, f"array {number} of {structure}"


def test_the_checksum_is_the_sum_of_all_bits():
    tree = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([3, -1], jnp.int32)}
    wanted = sum(int(x) for leaf in tree.values() for x in np.array(leaf).view(np.uint32))
    assert int(checksum(tree)) == wanted % 2**32
    assert int(checksum({"b": tree["b"][::-1], "a": tree["a"][::-1]})) == wanted % 2**32
