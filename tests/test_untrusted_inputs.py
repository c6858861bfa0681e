"""Inputs from strangers: nothing else is read, nothing is run, and a preparation always ends."""

import io
import json
import os
import re
import signal
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import EpsImagePlugin, Image

from transfusion_jax.data.sources.dataset import open_dataset
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.images import decode, read_image
from transfusion_jax.preparation.config import Preparation
from transfusion_jax.preparation.finish import PreparationFailed
from transfusion_jax.preparation.prepare import prepare
from transfusion_jax.preparation.readers.raw import Columns

SECRET = b"the secret of this machine"


def png(color=(200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(["some words to train on"], 280).model)
    return str(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An input, with a secret beside it."""
    (tmp_path / "secret.txt").write_bytes(SECRET)
    (tmp_path / "secret.png").write_bytes(png())
    (folder := tmp_path / "in").mkdir()
    (folder / "a.png").write_bytes(png())
    return folder


def run(path: Path, model: str, **changes) -> tuple[dict[str, int], list[dict]]:
    """Prepares an input; the reasons with their counts, and the lines of rejected.jsonl."""
    out = (path.parent if path.is_dir() else path.parent.parent) / f"out {path.name}"
    settings = {"height": 4, "width": 4, "tokenizer": model, "reject_limit": 1.0, **changes}
    try:
        prepare(Preparation((str(path),), **settings), out, None, False, 1, lambda line: None)
    except PreparationFailed as error:
        assert "no document is left" in str(error)
    total = json.loads((out / "ledger.json").read_text())["total"]
    assert total["items"] == total["written"] + total["rejected"]
    for file in out.rglob("*"):
        assert not file.is_file() or SECRET not in file.read_bytes(), file
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    for line in lines:
        if "kept" in line:
            assert re.fullmatch(r"rejected/[A-Za-z0-9_-]+_\d+\.[a-z]+", line["kept"])
    return total["reasons"], lines


def jsonl(path: Path, *values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# --- what is outside ---


def test_nothing_outside_the_folder_is_read(folder, model, monkeypatch):
    opened = []
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda p, *a, **k: opened.append(str(p)) or real_open(p, *a, **k)
    )
    os.symlink(folder.parent / "secret.png", folder / "link.png")
    os.symlink(folder.parent, folder.parent / "up")
    os.symlink("a.png", folder / "inside.png")
    (folder / "sub").mkdir()
    beside = folder.with_name(folder.name + "2")  # its path begins with that of the folder
    beside.mkdir()
    (beside / "secret.png").write_bytes(png())
    outside = [str(beside / "secret.png"), "../secret.txt",
               "../secret.png", str(folder.parent / "secret.png"), "/etc/hostname",
               "link.png", "sub/../../secret.png", "../up/secret.png", "/proc/self/environ",
               "/dev/zero"]  # fmt: skip
    lines = [{"file": name, "caption": "x"} for name in outside]
    lines += [{"spans": [{"image": name}, {"text": "x"}]} for name in outside]
    inside = ["a.png", "inside.png", "sub/../a.png", "../in/a.png", str(folder / "a.png")]
    lines += [{"file": name, "caption": "x"} for name in inside]
    reasons, rejected = run(jsonl(folder / "x.jsonl", *lines), model)
    assert reasons == {"outside the input": 2 * len(outside)}
    assert not any("kept" in line for line in rejected)
    assert opened and not [path for path in opened if "secret" in path or path.startswith("/etc/h")]


def test_the_input_itself_may_be_a_link(folder, model):
    jsonl(folder / "x.jsonl", {"file": "a.png", "caption": "x"})
    os.symlink(folder, folder.parent / "linked")
    os.symlink(folder / "x.jsonl", folder.parent / "linked.jsonl")
    assert run(folder.parent / "linked", model)[0] == {}
    # Files are named relative to where the link is, so this one is another file.
    assert run(folder.parent / "linked.jsonl", model)[0] == {"missing file": 1}


def test_links_in_a_folder_that_lead_out_of_it(folder, model):
    os.symlink(folder.parent / "secret.png", folder / "b.png")
    (folder / "b.txt").write_text("a caption")
    os.symlink(folder.parent / "secret.txt", folder / "a.txt")
    os.symlink(folder.parent / "secret.txt", folder / "words.txt")
    os.symlink("nowhere", folder / "c.png")
    (folder / "c.txt").write_text("a caption")
    reasons, _ = run(folder, model)
    assert reasons == {"outside the input": 3, "missing file": 1}
    for name in ("x.jsonl", "x.tar", "x.parquet", "captions.jsonl"):
        os.symlink(folder.parent / "secret.txt", folder / name)
        with pytest.raises(ValueError, match="outside the input"):
            run(folder, model)
        (folder / name).unlink()
    os.symlink(folder.parent, folder / "folder")
    with pytest.raises(ValueError, match="a link to a folder, folder, which is not followed"):
        run(folder, model)


def test_the_data_set_cannot_be_made_inside_an_input(folder, model):
    with pytest.raises(ValueError, match="is inside the input"):
        prepare(Preparation((str(folder),)), folder / "out", None, False, 1, print)
    assert not (folder / "out").exists()


# --- what is no file ---


@pytest.fixture
def a_minute():
    """A test that waits for a pipe, or reads a device, fails after a minute."""

    def stop(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("a_minute")
def test_pipes_devices_and_folders_are_rejected_unread(folder, model):
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "words.txt")
    (folder / "b.png").mkdir()
    (folder / "pipe.txt").write_text("a caption")
    (folder / "a.txt").write_text("a caption")
    lines = [
        {"file": name, "caption": "x"} for name in ("pipe.png", "b.png", ".", "a.png/b", "a.png")
    ]
    assert run(jsonl(folder / "x.jsonl", *lines), model)[0] == {
        "not a regular file": 3,
        "missing file": 1,
    }
    (folder / "x.jsonl").unlink()
    assert run(folder, model)[0] == {"not a regular file": 2}


def test_members_of_a_tar_that_are_no_files(folder, model):
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
        ):
            info = tarfile.TarInfo(f"{number}.png")
            info.type = kind
            info.linkname = "../../secret.png"
            tar.addfile(info)
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert run(folder / "x.tar", model)[0] == {"not a regular file": 4}


# --- what is too large ---


def test_items_that_are_too_large_are_rejected_unread(folder, model):
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    large = file.getvalue()
    assert len(png()) < 1000 < 3000 < len(large)
    (folder / "b.png").write_bytes(large)
    (folder / "c.png").write_bytes(png())
    (folder / "a.txt").write_text("x")
    (folder / "b.txt").write_text("x")
    (folder / "c.txt").write_text("x" * 4000)
    (folder / "d.txt").write_text("x" * 4000)
    assert run(folder, model, max_item_bytes=3000)[0] == {"too large": 3}

    (other := folder.parent / "other").mkdir()
    with tarfile.open(other / "x.tar", "w") as tar:
        for name, data in (
            ("1.png", png()), ("1.txt", b"x"), ("2.png", large), ("2.txt", b"x"),
            ("3.png", png()), ("3.txt", b"x" * 4000), ("4.png", png()),
            ("4.json", b'{"caption": "' + b"x" * 4000 + b'"}'),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    table = {"image": [png(), large, png()], "caption": ["x", "x", "x" * 4000]}
    pyarrow.parquet.write_table(pyarrow.table(table), other / "x.parquet")
    (other / "b.png").write_bytes(large)
    jsonl(other / "x.jsonl", {"text": "x"}, {"text": "x" * 4000}, {"file": "b.png", "caption": "x"})
    assert run(other, model, max_item_bytes=3000)[0] == {"too large": 3 + 2 + 2}


# --- what would be run ---


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
(touched) (w) file closefile
showpage
%%EOF
"""


def test_postscript_never_reaches_its_interpreter(folder, model, monkeypatch):
    def interpreter(*args, **kwargs):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", interpreter)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    with pytest.raises(AssertionError):  # what Pillow does when it is not told otherwise
        Image.open(io.BytesIO(EPS)).load()
    with pytest.raises(ValueError, match="not an image"):
        decode(EPS, 4, 4, 3)
    (folder / "a.png").write_bytes(EPS)
    jsonl(folder / "captions.jsonl", {"file": "a.png", "caption": "x"})
    assert run(folder, model)[0] == {"not an image": 1}


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PCX"])
def test_only_the_formats_that_are_named_are_decoded(kind):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, kind)
    with pytest.raises(ValueError, match="not an image"):
        decode(file.getvalue(), 4, 4, 3)


def test_nothing_is_unpickled_but_the_weights_of_lpips():
    package = Path(prepare.__code__.co_filename).parents[1]
    pattern = re.compile(
        r"pickle\.load|torch\.load\(|allow_pickle=True|import (dill|joblib|shelve|marshal)\b"
    )
    found = {
        str(path.relative_to(package)): len(pattern.findall(path.read_text()))
        for path in package.rglob("*.py")
        if pattern.search(path.read_text())
    }
    # Under a pinned hash; and in the text of an error, as the way to convert a file.
    assert found == {
        "autoencoder/training/losses.py": 1,
        "autoencoder/training/resnet.py": 1,
        "tensors.py": 1,
    }


# --- names ---


ODD_NAMES = [
    "a\0b.png", "\0", "x.\0png", "a\nb.png", "..", "../..", "/", "//", "a/../../b", "~", "CON",
    "\x1b[31m.png", "a" * 300 + ".png", "x." + "y" * 300, "x.png/", "\ud800.png", "a.p/../../ng",
    "é\u202e.png", "." * 5000, "x.json/../../../../tmp/y",
]  # fmt: skip


def test_odd_names_are_items_like_others(folder, model):
    lines = [{"file": name, "caption": "x"} for name in ODD_NAMES]
    lines += [{"spans": [{"image": name}]} for name in ODD_NAMES]
    # Rejected with their content, so that files are kept under their names.
    lines += [{"file": name, "caption": "\ud800"} for name in ODD_NAMES]
    lines += [{"file": name, "caption": " "} for name in ODD_NAMES]
    lines += [{"file": "a.png", "caption": "x"}]
    reasons, rejected = run(jsonl(folder / "x.jsonl", *lines), model)
    assert sum(reasons.values()) == len(rejected) == 4 * len(ODD_NAMES)
    assert {"invalid UTF-8", "empty caption", "missing file", "outside the input"} <= reasons.keys()
    for name in ODD_NAMES[0:3]:
        assert any(line["item"] == name for line in rejected)
    assert all(len(line["item"]) < 10_000 for line in rejected)


def test_odd_names_on_disk_and_in_archives(folder, model):
    names = [b"\xff\xfe.png", b"new\nline.png", b"-rf.png", b"\x1b[0m.png", b"quote'\".png"]
    for name in names:
        (Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))).write_bytes(png())
    with tarfile.open(folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ["/abs/1.png", "../up/2.png", "a\nb/3.png", "x" * 400 + "/4.png", "é/5.png"]:
            for member, data in ((name, b"no picture"), (name[:-3] + "txt", b"x")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    jsonl(folder / "captions.jsonl", {"file": "a.png", "caption": "x"})
    reasons, _ = run(folder, model)
    assert reasons == {"no caption": len(names), "not an image": 5}


# --- random bytes ---


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A copy with some bytes changed, cut out, repeated or cut off."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 8)):
        at = int(rng.integers(len(data) + 1))
        size = int(rng.integers(1, 1 + min(64, max(len(data) // 4, 1))))
        match rng.integers(5):
            case 0:
                data[at : at + size] = rng.bytes(len(data[at : at + size]))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at : at + 1] = bytes([rng.choice([0, 10, 34, 92, 128, 255])])
            case 4 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Small valid files of every kind."""
    tars = []
    for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format_) as tar:
            for name, data in (
                ("1.png", png()),
                ("1.txt", b"x"),
                ("é" * 40 + ".png", png()),
                ("2.json", b'{"caption": "x"}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                info.mtime = 1.5
                tar.addfile(info, io.BytesIO(data))
        tars.append(file.getvalue())
    tables = []
    for table in ({"image": [png()] * 3, "caption": ["x", None, ["y"][0]]}, {"text": ["a", "b"]}):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(table), file)
        tables.append(file.getvalue())
    lines = [
        {"file": "a.png", "caption": "x"},
        {"spans": [{"image": "a.png"}, {"text": "t"}]},
        {"text": "words", "meta": {"x": [1, 2.5, None, True]}},
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    pictures = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (1, 2, 3)).save(file, kind)
        pictures.append(file.getvalue())
    return {
        "x.jsonl": [text],
        "captions.jsonl": [text],
        "x.tar": tars,
        "x.parquet": tables,
        "x.txt": [b"some words\nand more\n"],
        "a.png": pictures,
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["x.jsonl", "captions.jsonl", "x.tar", "x.parquet", "x.txt", "a.png"]
)
def test_random_bytes_are_refused_or_counted(tmp_path, model, name):
    """Whatever the bytes, every item is accounted for, or one line says what is wrong."""
    rng = np.random.default_rng(list(name.encode()))
    (folder := tmp_path / "in").mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "a.txt").write_text("a caption")
    valid = seeds(folder)[name]
    outcomes = {"made": 0, "refused": 0}
    for number in range(60):
        content = valid[number % len(valid)]
        data = mutated(content, rng) if number % 4 else rng.bytes(int(rng.integers(0, 3000)))
        (folder / name).write_bytes(data)
        settings = Preparation(
            (str(folder if name == "a.png" or number % 2 else folder / name),), height=4, width=4,
            tokenizer=model, reject_limit=1.0, columns=Columns(),
        )  # fmt: skip
        out = tmp_path / f"out{number}"
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's, which `prepare` ignores in a process of its own
            try:
                made = prepare(settings, out, None, False, 1, lambda line: None)
            except (ValueError, PreparationFailed) as error:
                assert str(error) and "Traceback" not in str(error)
                outcomes["refused"] += 1
                continue
        total = made["ledger"]
        assert total["items"] == total["written"] + total["rejected"]
        open_dataset(out).verify()
        outcomes["made"] += 1
    assert outcomes["made"] > 3


@pytest.mark.usefixtures("a_minute")
def test_a_prompt_s_picture_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="it is not a regular file"):
            read_image(path, 4, 4, 3)
