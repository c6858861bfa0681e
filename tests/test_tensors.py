"""Safetensors read by pieces: equal to the package's own reading; damage and pickles are named."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from transfusion_jax.tensors import check_shapes, open_tensors

DRAWN = np.random.default_rng(0).standard_normal((3, 4))
TENSORS = {
    "a": DRAWN.astype(np.float32),
    "b": DRAWN[0].astype(np.float16),
    "c": DRAWN.astype(ml_dtypes.bfloat16),
    "d": DRAWN,
    "scalar": np.array(3.5, np.float32),
}


def saved(path, tensors=TENSORS):
    safetensors.numpy.save_file(tensors, path)
    return path


def test_a_file_holds_what_was_saved_and_is_mapped(tmp_path):
    found = open_tensors(saved(tmp_path / "model.safetensors"))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
        base = found[name]
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap) and not found[name].flags.writeable


def test_a_directory_is_the_files_that_its_index_names(tmp_path):
    saved(tmp_path / "x-1.safetensors", {"a": TENSORS["a"]})
    saved(tmp_path / "x-2.safetensors", {"b": TENSORS["b"]})
    (tmp_path / "folder.safetensors").mkdir()
    assert open_tensors(tmp_path).keys() == {"a", "b"}  # without one, all of them
    saved(tmp_path / "other.safetensors", {"c": TENSORS["c"]})
    index = tmp_path / "x.safetensors.index.json"
    placed = {"a": "x-1.safetensors", "b": "x-2.safetensors"}
    index.write_text(json.dumps({"weight_map": placed}))
    assert open_tensors(tmp_path).keys() == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {**placed, "e": "x-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"index names \['e'\], which no file holds"):
        open_tensors(tmp_path)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names x-2\.safetensors, which is not there"):
        open_tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of safetensors"):
        open_tensors(tmp_path)
    for outside in ("../x-1.safetensors", str(tmp_path / "x-1.safetensors"), "in/x"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ValueError, match="is not the name of a file beside it"):
            open_tensors(tmp_path)
    index.unlink()
    index.mkdir()
    with pytest.raises(ValueError, match="is not an index of safetensors"):
        open_tensors(tmp_path)
    index.rmdir()
    index.touch()
    index.unlink()
    saved(tmp_path / "again.safetensors", {"a": TENSORS["a"]})
    with pytest.raises(ValueError, match="a is in another file too"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_damaged(tmp_path, kept):
    path = saved(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        open_tensors(tmp_path)


def headed(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


A = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        headed(b"no json"),
        headed([A]),
        headed({"a": []}),
        headed({"a": {**A, "dtype": "I64"}}),
        headed({"a": {**A, "shape": [5]}}),
        headed({"a": {**A, "shape": [-4], "data_offsets": [16, 0]}}),
        headed({"a": {**A, "data_offsets": [-16, 0]}}),
        headed({"a": {**A, "data_offsets": [16, 32]}}),
        headed({"a": {**A, "data_offsets": ["x", 16]}}),
        headed(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}'),
        headed(b"[" * 100_000),
        headed({"a": A, "b": A}),
        headed({"a": {**A, "shape": [1], "data_offsets": [12, 16]}}),
        headed({"a": {**A, "shape": [4] + [1] * 70}}),
        (1 << 60).to_bytes(8, "little") + bytes(100),
    ],
)
def test_a_header_that_does_not_fit_is_damage(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        open_tensors(tmp_path)


def test_what_is_no_safetensors_is_refused_and_a_pickle_says_how_to_convert_it(tmp_path):
    with pytest.raises(ValueError, match="no such file or directory"):
        open_tensors(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no safetensors in"):
        open_tensors(tmp_path)
    pickled = tmp_path / "pytorch_model.bin"
    pickled.write_bytes(b"\x80\x04.")
    for source in (tmp_path, pickled):
        with pytest.raises(ValueError) as refused:
            open_tensors(source)
        said = str(refused.value)
        assert "pytorch_model.bin is a pickle" in said and "weights_only=True" in said
        assert "\n" not in said


def test_the_first_three_that_do_not_fit_are_named():
    shapes = {f"t{i}": (i,) for i in range(6)}
    check_shapes(shapes, dict(reversed(shapes.items())), "never said")
    found = {**shapes, "t1": (9,), "t3": (9, 9), "new": (1,)}
    del found["t5"]
    with pytest.raises(ValueError) as refused:
        check_shapes(shapes, found, "they do not fit")
    assert str(refused.value) == (
        "they do not fit: new (1,) instead of nothing; t1 (9,) instead of (1,); "
        "t3 (9, 9) instead of (3,), and 1 more"
    )
