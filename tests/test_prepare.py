"""Preparation: nothing is lost, killed and parallel runs make the same bytes, and what is wrong is
named."""

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from PIL import Image

from transfusion_jax.autoencoder.codec import load_codec, save_codec
from transfusion_jax.autoencoder.config import tiny
from transfusion_jax.autoencoder.vae import abstract_autoencoder
from transfusion_jax.commands.main import main
from transfusion_jax.config import DataConfig, SourceConfig
from transfusion_jax.data.packing import plan
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.dataset import open_dataset
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.preparation import directory, shards, vocabulary
from transfusion_jax.preparation.encoder import encoder_of
from transfusion_jax.preparation.ledger import ShardLedger, add_up, index_entries
from transfusion_jax.preparation.prepare import Preparation, PreparationFailed, parse_part, prepare
from transfusion_jax.preparation.readers.raw import Raw, Rejected
from transfusion_jax.preparation.shards import ENCODED
from transfusion_jax.preparation.splits import split_of

PICTURES = 60
SHARD_BYTES = 6700  # which makes 13 shards of the 89 items
DAMAGES = (
    "decompression bomb",
    "empty caption",
    "empty image file",
    "huge caption",
    "invalid JSON",
    "invalid UTF-8",
    "missing file",
    "not an image",
    "truncated image",
)


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Pairs with every kind of damage, edits and text."""
    root = tmp_path_factory.mktemp("inputs")
    (photos := root / "photos").mkdir()
    rng, pairs = np.random.default_rng(0), []
    for i in range(PICTURES):
        low = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        (photos / f"{i}.jpg").write_bytes(
            encoded(low.resize((50, 40), Image.Resampling.BICUBIC), "JPEG")
        )
        pairs.append({"file": f"{i}.jpg", "caption": f"picture number {i}"})
        pairs += [{"file": f"{i}.jpg", "caption": f"the other words of {i}"}] * (i % 3 == 0)
    jpeg = (photos / "1.jpg").read_bytes()
    damaged = {
        "none.jpg": b"",
        "text.jpg": b"no picture",
        "cut.jpg": jpeg[:-80],
        "bomb.png": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "blank.jpg": jpeg,
        "huge.jpg": jpeg,
    }
    for name, content in damaged.items():
        (photos / name).write_bytes(content)
    pairs += [{"file": name, "caption": "a caption"} for name in (*list(damaged)[:4], "gone.jpg")]
    pairs += [
        {"file": "blank.jpg", "caption": " \n"},
        {"file": "huge.jpg", "caption": "long " * 5000},
    ]
    lines = [json.dumps(pair).encode() for pair in pairs] + [
        b"{no json",
        b'{"file": "1.jpg", "caption": "\xff"}',
    ]
    (photos / "captions.jsonl").write_bytes(b"\n".join(lines))
    words = "the quick brown fox jumps over a lazy dog and many more words are written here".split()
    with (root / "mixed.jsonl").open("w") as file:
        for i in range(10):
            spans = [
                {"image": f"photos/{i}.jpg"},
                {"text": "make it another"},
                {"image": f"photos/{i + 1}.jpg"},
            ]
            file.write(json.dumps({"spans": spans}) + "\n")
            file.write(json.dumps({"text": " ".join(rng.choice(words, 30))}) + "\n")
    return root


@pytest.fixture(scope="session")
def settings(inputs) -> Preparation:
    return Preparation(
        (str(inputs / "photos"), str(inputs / "mixed.jsonl")),
        height=16,
        width=16,
        vocab_size=400,
        shard_bytes=SHARD_BYTES,
        reject_limit=0.5,
        held_out=0.2,
    )


def run(settings: Preparation, out: Path, part=None, finish: bool = False, said=None):
    return prepare(settings, out, part, finish, 2, (said if said is not None else []).append)


@pytest.fixture(scope="session")
def uninterrupted(settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(settings, out)
    return out


def content(out: Path) -> dict[str, str]:
    """Digest of every file that makes the data set."""
    files = [
        *sorted((out / "shards").iterdir()),
        *sorted((out / "splits").iterdir()),
        *(out / n for n in ("index.npy", "dataset.json", "tokenizer.model")),
    ]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tree(out: Path) -> dict[Path, tuple]:
    return {
        p: (p.stat().st_mtime_ns, p.stat().st_size)
        for p in out.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def flags(settings: Preparation, out: Path) -> list[str]:
    return [
        *settings.inputs,
        "--out",
        str(out),
        "--height",
        "16",
        "--width",
        "16",
        "--vocab-size",
        "400",
        "--shard-bytes",
        str(SHARD_BYTES),
        "--reject-limit",
        "0.5",
        "--held-out",
        "0.2",
        "--workers",
        "1",
    ]


def process(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "transfusion_jax", "prepare", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def the_error(capsys) -> str:
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# --- nothing is lost ---


def test_what_was_read_is_written_or_rejected_with_its_reason(uninterrupted, inputs):
    dataset = open_dataset(uninterrupted)
    info, total = dataset.info, dataset.info["ledger"]
    assert total["items"] == total["written"] + total["rejected"] == PICTURES + 9 + 20
    assert total["reasons"] == {reason: 1 for reason in DAMAGES}
    assert (info["documents"], info["images"]) == (PICTURES + 20, PICTURES + 20)
    lines = [
        json.loads(line) for line in (uninterrupted / "rejected.jsonl").read_text().splitlines()
    ]
    assert sorted(line["reason"] for line in lines) == sorted(DAMAGES)
    names = {line["reason"]: line["item"] for line in lines}
    assert names["missing file"] == "gone.jpg" and names["invalid JSON"].startswith(
        "captions.jsonl:"
    )
    kept = {
        line["reason"]: (uninterrupted / line["kept"]).read_bytes()
        for line in lines
        if "kept" in line
    }
    assert kept["not an image"] == b"no picture" and kept["invalid JSON"].strip() == b"{no json"
    ledger = json.loads((uninterrupted / "ledger.json").read_text())
    assert sum(entry["items"] for entry in ledger["inputs"].values()) == total["items"]
    for shard in info["shards"]:
        assert content(uninterrupted)[shard["name"]] == shard["sha256"]
    left = {
        "shards",
        "dataset.json",
        "index.npy",
        "splits",
        "ledger.json",
        "rejected.jsonl",
        "rejected",
        "tokenizer.model",
    }
    assert {path.name for path in uninterrupted.iterdir()} == left | {".lock"}


def test_records_hold_what_the_inputs_say(uninterrupted, inputs):
    dataset, index = open_dataset(uninterrupted), open_dataset(uninterrupted).index
    decode = dataset.tokenizer.decode
    for number in range(PICTURES):
        record = dataset.record(number)
        expected = [f"picture number {number}"] + [f"the other words of {number}"] * (
            number % 3 == 0
        )
        assert [decode(caption) for caption in record.captions] == expected
        ((kind, pixels),) = record.spans
        wanted = Image.open(inputs / "photos" / f"{number}.jpg").resize(
            (16, 16), 3, (5, 0, 45, 40), reducing_gap=3
        )
        assert kind == records.IMAGE and np.array_equal(pixels, np.asarray(wanted))
        assert index.text[number] == max(map(len, record.captions)) and index.images[number] == 1
    edit = dataset.record(PICTURES)
    assert [kind for kind, _ in edit.spans] == [
        records.IMAGE,
        records.TEXT,
        records.IMAGE,
    ] and not edit.captions
    assert decode(edit.spans[1][1]) == "make it another" and index.images[PICTURES] == 2
    np.testing.assert_array_equal(edit.spans[0][1], dataset.record(0).spans[0][1])


def test_records_survive_bytes():
    rng = np.random.default_rng(0)
    for entries, image in ((300, np.uint8), (1 << 16, np.float16), ((1 << 16) + 1, np.float16)):
        ids, shape = records.id_type(entries), (2, 4, 4, 3)
        images = (rng.random((2, *shape)) * 100).astype(image)
        texts = [rng.integers(entries, size=n) for n in (0, 3, 50)]
        spans = ((1, images[0]), (0, texts[1]), (1, images[1]))
        got = records.decode(
            records.encode(records.Record(tuple(texts), spans), ids), ids, np.dtype(image), shape
        )
        assert all(np.array_equal(a, b) for a, b in zip(got.captions, texts, strict=True))
        assert [kind for kind, _ in got.spans] == [1, 0, 1] and records.entry(got) == (53, 2)
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got.spans, spans, strict=True))


def test_ledgers_add_up(tmp_path):
    for k in range(3):
        ledger = ShardLedger()
        for number in range(10):
            ledger.read["a" if number % 2 else "b", ""] += 1
            ledger.reject(
                "a", Rejected("bad", f"\ud800{number}", b"content")
            ) if number < 6 else None
            ledger.index.append([number, k, 0])
        ledger.written["b", ""] += 4
        ledger.save(tmp_path / str(k), 100 + k, "digest")
    got = add_up(tmp_path / str(k) for k in range(3))
    assert got.ledger["total"] | {"captions": 0, "captions_dropped": {}} == got.ledger["total"]
    assert (got.ledger["total"]["items"], got.ledger["inputs"]["a"]["reasons"]) == (30, {"bad": 18})
    assert [shard["bytes"] for shard in got.shards] == [100, 101, 102] and got.documents == 30
    index = np.concatenate(list(index_entries(tmp_path / str(k) for k in range(3))))
    assert index[:, 0].tolist() == [*range(10)] * 3 and index[:, 1].tolist()[::10] == [0, 1, 2]
    assert len(got.rejections) == 18 and sum(bool(content) for *_, content in got.rejections) == 5


def test_names_of_files_may_be_no_unicode(inputs, tmp_path):
    """As where they were written in Latin-1."""
    folder = tmp_path / "\udce9"
    folder.mkdir()
    (folder / "caf\udce9.jsonl").write_text('{"text": "one"}\n{"file": "gone.jpg", "caption": "b"}')
    (folder / "1.jpg").write_bytes((inputs / "photos" / "1.jpg").read_bytes())
    (folder / "1.txt").write_text("a picture")
    settings = Preparation((str(folder),), height=16, width=16, vocab_size=400, reject_limit=0.5)
    run(settings, tmp_path / "out")
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())["total"]
    assert (ledger["items"], ledger["written"], ledger["rejected"]) == (3, 2, 1)
    with pytest.raises(ValueError, match="is not UTF-8"):
        run(settings, tmp_path / "\udcff")


def test_what_is_inside_an_input_is_no_place_for_its_data(tmp_path):
    for root in ("/", str(tmp_path)):
        with pytest.raises(ValueError, match="is inside the input"):
            directory.check_out(tmp_path / "out", (root,))


def test_the_held_out_split_follows_content_not_order_or_names(tmp_path):
    texts = [f"document number {i}" for i in range(400)]

    def split(name: str, texts: list[str]) -> set[str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        run(
            Preparation((str(path),), vocab_size=400, held_out=0.25, shard_bytes=5000),
            tmp_path / name,
        )
        dataset = open_dataset(tmp_path / name)
        chosen = dataset.numbers("held_out")
        return {dataset.tokenizer.decode(dataset.record(int(n)).spans[0][1]) for n in chosen}

    held_out = split("a", texts)
    assert 60 < len(held_out) < 140
    assert (
        split("b", texts[::-1] + texts[:50]) == held_out
    )  # and a document that comes twice is on one side
    assert split("c", texts[::2]) == held_out & set(texts[::2])


# --- killed, in parts, with a full disk ---


@pytest.mark.long
def test_a_killed_run_is_finished_to_the_byte(settings, uninterrupted, tmp_path):
    out, rng = tmp_path / "out", np.random.default_rng(0)
    for at in (1, 4, 8):
        running = process(*flags(settings, out))
        while running.poll() is None and len(list(out.glob("parts/*.msgpack"))) < at:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        running.send_signal(signal.SIGKILL)
        running.communicate()
    stale = out / "shards" / "000009.arrayrecord.0badcafe.partial"
    stale.write_bytes(b"left by a killed process")
    assert not (out / "dataset.json").exists()
    with pytest.raises(ValueError, match="not finished"):
        open_dataset(out)
    run(settings, out)
    assert content(out) == content(uninterrupted) and not list(out.rglob("*.partial"))


def test_killed_at_any_moment_of_the_start(settings, uninterrupted, tmp_path):
    """What a process can have left before its first shard."""
    for number, left in enumerate(([], [".lock"], [".lock", "identity.json.0badcafe.partial"])):
        (out := tmp_path / str(number)).mkdir()
        for name in left:
            (out / name).touch()
        run(replace(settings), out, (1, 3))
    for lost in (
        ["shards", "parts", "tokenizer.model"],
        ["parts/inputs/inputs.json"],
        ["parts/bounds.npy"],
    ):
        for name in lost:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        run(settings, out, (2, 3))
    run(settings, out)
    assert content(out) == content(uninterrupted)


def test_pixels_are_prepared_without_jax(inputs, tmp_path):
    program = (
        "import sys\n"
        "from transfusion_jax.commands.main import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'jax' not in sys.modules  # which takes a second to import, in every process\n"
        "sys.exit(code)\n"
    )
    flags = "--height 16 --width 16 --vocab-size 400 --shard-bytes 6700 --reject-limit 0.5".split()
    command = ["prepare", str(inputs / "photos"), *flags, "--out", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("order", [(3, 1, 2), (2, 3, 1)])
def test_parts_in_any_order_make_what_one_process_makes(settings, uninterrupted, tmp_path, order):
    for i in order:
        made = run(settings, tmp_path, (i, 3))
        assert (made is None) == (i != order[-1])
    assert content(tmp_path) == content(uninterrupted)


def test_parts_at_the_same_time(settings, uninterrupted, tmp_path):
    out = tmp_path / "out"
    running = [process(*flags(settings, out), "--part", f"{i}/3") for i in (1, 2, 3)]
    for one in running:
        _, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
    assert content(out) == content(uninterrupted)


def test_finish_names_what_is_missing(capsys, settings, uninterrupted, tmp_path):
    out = tmp_path / "out"
    for i in (1, 3):
        run(settings, out, (i, 3))
    assert main(["prepare", *flags(settings, out), "--finish"]) == 1
    assert "4 of 13 shards are missing: 2, 5, 8, 11" in the_error(capsys)
    said = []
    assert run(settings, out, (3, 3), said=said) is None and "part 3/3 is done" in said[-1]
    run(settings, out, (2, 3))
    assert main(["prepare", *flags(settings, out), "--finish"]) == 0
    assert content(out) == content(uninterrupted)


def test_parts_are_counted_from_nought_or_one():
    assert [parse_part(text)[0] % 4 for text in ("0/4", "4/4", "1/4")] == [0, 0, 1]
    for text in ("5/4", "1", "a/2", "0/0", "-1/4"):
        with pytest.raises(ValueError, match="--part"):
            parse_part(text)


def test_a_full_disk_is_named_and_survived(capsys, settings, uninterrupted, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        out = disk / "out"
        assert main(["prepare", *flags(settings, out), "--workers", "2"]) == 1
        assert "the disk is full" in the_error(capsys) and not list(out.rglob("*.partial"))
        assert not (out / "dataset.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run(settings, out)
        assert content(out) == content(uninterrupted)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_writer_that_finds_the_disk_full(
    capsys, settings, uninterrupted, tmp_path, monkeypatch, method
):
    class Full:
        """The second shard's writer fails as the real one does: with a RuntimeError."""

        made = 0

        def __init__(self, *arguments):
            Full.made += 1
            self.number, self.writer = Full.made, writer(*arguments)

        def write(self, data):
            self.writer.write(data)
            self.fail("write")

        def close(self):
            self.writer.close()
            self.fail("close")

        def fail(self, where):
            if self.number == 2 and where == method:
                raise RuntimeError(
                    "write() failed: No space left on device; writing x; Failed to close "
                    "chunk_writer"
                )

    writer = shards.ArrayRecordWriter
    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    assert main(["prepare", *flags(settings, tmp_path / "out")]) == 1
    assert "the disk is full" in the_error(capsys)
    assert not list(tmp_path.rglob("*.partial")) and len(list(tmp_path.rglob("*.msgpack"))) == 1
    run(settings, tmp_path / "out")
    assert content(tmp_path / "out") == content(uninterrupted)


# --- what is refused ---


def test_another_data_set_is_never_touched(capsys, settings, uninterrupted, inputs):
    before = tree(uninterrupted)
    for change, message in (
        ({"height": 32}, "preparation.height: 16 -> 32"),
        ({"inputs": settings.inputs[:1]}, "inputs."),
        ({"held_out": 0.5}, "preparation.held_out: 0.2 -> 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(settings, **change), uninterrupted)
    captions = inputs / "photos" / "captions.jsonl"
    original = captions.read_bytes()
    captions.write_bytes(original.replace(b"number 3", b"number 4"))
    try:
        assert main(["prepare", *flags(settings, uninterrupted)]) == 2
        assert "which is left as it is; what differs: inputs." in the_error(capsys)
    finally:
        captions.write_bytes(original)
    assert tree(uninterrupted) == before
    said = []
    captions.touch()
    run(settings, uninterrupted, said=said)
    assert said[-1].endswith("is prepared already") and "have other times" in said[-2]
    said = []
    assert (
        run(settings, uninterrupted, said=said)["documents"] == PICTURES + 20
        and "prepared already" in said[-1]
    )
    assert tree(uninterrupted) == before


def test_foreign_directories_and_impossible_inputs(settings, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        run(settings, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        run(settings, tmp_path / "thesis.tex")
    for change, message in (
        ({"inputs": ()}, "name at least one input"),
        ({"inputs": (settings.inputs[0],) * 2}, "is named twice: all in it would be there twice"),
        (
            {"inputs": (settings.inputs[0], str(Path(settings.inputs[0]).parent))},
            "lies in .*: all in it would be there twice",
        ),
        ({"tokenizer": str(tmp_path / "no.model")}, "cannot read the tokenizer"),
        ({"tokenizer": str(tmp_path / "thesis.tex")}, "not a sentencepiece model"),
        ({"vocab_size": 5}, "vocab_size=5"),
        ({"reject_limit": 0.001}, r"1 files that the captions .*: gone\.jpg"),
    ):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match=message):
            run(replace(settings, **change), out)
        assert not out.exists() or not [p for p in out.iterdir() if p.name != ".lock"]
    assert (
        run(settings, tmp_path / "out", (1, 3)) is None
    )  # a refused setting has not claimed the place


def test_missing_pictures_are_listed(capsys, tmp_path):
    lines = [json.dumps({"file": f"{i}.jpg", "caption": "x"}) for i in range(7)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "captions.jsonl").write_text("\n".join(lines))
    assert main(["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    line = the_error(capsys)
    assert (
        "7 files that the captions of" in line
        and ": 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg, ..." in line
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_higher_limit_finishes_without_making_shards_again(
    capsys, settings, uninterrupted, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(
        PreparationFailed,
        match=r"9 of 89 items were rejected \(1 decompression bomb, .*reject_limit",
    ):
        run(replace(settings, reject_limit=0.05), out)
    before = tree(out / "shards")
    assert len(before) == 13 and not (out / "dataset.json").exists()
    run(replace(settings, reject_limit=0.2), out)
    assert (
        tree(out / "shards") == before
        and content(out)["index.npy"] == content(uninterrupted)["index.npy"]
    )


def test_damage_is_found_when_a_data_set_is_opened(settings, tmp_path):
    out = tmp_path / "out"
    run(settings, out)
    shard, index = out / "shards" / "000003.arrayrecord", out / "index.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=f"000003.arrayrecord has {len(whole) - 1} bytes, and {len(whole)}"
    ):
        open_dataset(out)
    shard.unlink()
    with pytest.raises(ValueError, match="lost the shard 000003.arrayrecord"):
        open_dataset(out)
    shard.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match="index.npy is not the one"):
        open_dataset(out).index  # noqa: B018  (reads it)
    with pytest.raises(ValueError, match="index.npy is not the one"):
        run(settings, out, finish=True)
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ValueError, match="index.npy has"):
        open_dataset(out)


# --- tokenizers ---


def test_a_given_tokenizer_is_used_as_it_is(settings, tokenizer, tmp_path):
    path = tmp_path / "given.model"
    path.write_bytes(tokenizer.model)
    run(replace(settings, tokenizer=str(path)), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.model
    path.write_bytes(train_tokenizer(["other text altogether"], 300).model)
    with pytest.raises(ValueError, match="what differs: tokenizer: "):
        run(replace(settings, tokenizer=str(path)), tmp_path / "out")


def test_a_trained_tokenizer_has_seen_all_inputs_however_long_their_texts(monkeypatch):
    monkeypatch.setattr(vocabulary, "SAMPLED_CHARACTERS", 80_000)
    words = ("alphabet", "borealis", "cinnamon", "dolphins")
    # One line each, the first alone more than the sample.
    readers = [
        (word, [Raw(word, (f"{word} " * (30_000 if word == "alphabet" else 3000),))])
        for word in words
    ]
    trained = vocabulary.trained_tokenizer(readers, 400)
    assert all(len(trained.encode(word)) == 1 for word in words)


@pytest.mark.parametrize("lacking", ["bos_id", "eos_id"])
def test_a_tokenizer_without_its_marks_is_refused(settings, tmp_path, lacking):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on"]),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        **{lacking: -1},
    )
    (tmp_path / "x.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="x.model has no BOS or EOS entry"):
        run(replace(settings, tokenizer=str(tmp_path / "x.model")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_are_those_of_sentencepiece(uninterrupted):
    model = (uninterrupted / "tokenizer.model").read_bytes()
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=model), Tokenizer(model)
    for text in (
        "the quick brown fox",
        "two  spaces",
        "lines\n\n\tand tabs\n",
        " ends ",
        "é 日本 🙂",
        "",
        "\n",
    ):
        assert ours.encode(text) == theirs.encode(text, out_type=int)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    assert ours.boi == theirs.get_piece_size() and ours.eoi == ours.boi + 1


# --- latents ---


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory) -> Path:
    """A tiny one with random weights."""
    directory, config, rng = (
        tmp_path_factory.mktemp("autoencoder"),
        tiny(),
        np.random.default_rng(0),
    )
    _, abstract = abstract_autoencoder(config)
    weights = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) / max(np.prod(x.shape[:-1]), 4) ** 0.5,
        nnx.to_pure_dict(abstract),
    )
    save_codec(directory, config, weights, 1.0, 0.0)
    return directory


def test_latents_are_stored_as_mean_and_deviation_and_scaled_to_unit_variance(
    settings, autoencoder, tmp_path
):
    out = tmp_path / "out"
    run(replace(settings, autoencoder=str(autoencoder)), out)
    dataset = open_dataset(out)
    info, codec = dataset.info["image"], load_codec(autoencoder)
    kept = load_codec(out / "autoencoder")
    assert info["autoencoder"] == codec.digest and (kept.scale, kept.shift) == (
        info["scale"],
        info["shift"],
    )
    assert (info["stored"], dataset.image_shape) == ("latents", (4, 4, 4))
    all_records = [dataset.record(n) for n in range(dataset.info["documents"])]
    stored = np.stack(
        [x for record in all_records for kind, x in record.spans if kind == records.IMAGE]
    )
    mean, deviation = stored[:, 0].astype(np.float64), stored[:, 1].astype(np.float64)
    std = np.sqrt((mean**2 + deviation**2).mean() - mean.mean() ** 2)
    assert info["shift"] == pytest.approx(mean.mean(), abs=1e-6) and info["scale"] == pytest.approx(
        1 / std, rel=1e-4
    )
    rng = np.random.default_rng(0)
    drawn = np.stack([dataset.image(x, rng) for x in stored for _ in range(40)])
    assert drawn.dtype == np.float32
    assert drawn.mean() == pytest.approx(0, abs=0.01) and drawn.std() == pytest.approx(1, rel=0.01)
    one, expected = (
        np.stack([dataset.image(stored[0], rng) for _ in range(4000)]),
        dataset.image(stored[0]),
    )
    np.testing.assert_allclose(expected, (mean[0] - info["shift"]) * info["scale"], atol=1e-3)
    np.testing.assert_allclose(one.mean(0), expected, atol=0.1 * info["scale"] * deviation[0].max())
    np.testing.assert_allclose(one.std(0), deviation[0] * info["scale"], rtol=0.06)


def test_a_batch_is_encoded_by_all_devices_as_by_one(autoencoder):
    codec = load_codec(autoencoder)
    pictures = np.random.default_rng(0).uniform(-1, 1, (ENCODED, 16, 16, 3)).astype(np.float32)
    expected = np.stack([np.asarray(x) for x in codec.encode(pictures)], axis=1)
    np.testing.assert_allclose(encoder_of(codec)(pictures), expected, atol=2e-3)


def test_an_autoencoder_that_does_not_fit_is_refused(settings, autoencoder, tmp_path):
    for change, message in (
        ({"height": 18}, "reduces by 4"),
        ({"channels": 1}, "takes 3 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(settings, autoencoder=str(autoencoder), **change), tmp_path / "out")
    with pytest.raises(ValueError, match="no such directory"):
        run(replace(settings, autoencoder=str(tmp_path / "nowhere")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- splits ---


def test_a_document_is_where_all_its_pictures_are_or_nowhere():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (400, 16, 16, 3), np.uint8)
    sides = [split_of(["a caption", picture], 0.25) for picture in pictures]
    assert set(sides) == {records.TRAIN, records.HELD_OUT}
    assert 0.18 < np.mean(np.equal(sides, records.HELD_OUT)) < 0.32
    for i in range(0, 400, 2):
        both = split_of([pictures[i], "make it red", pictures[i + 1]], 0.25)
        expected = sides[i] if sides[i] == sides[i + 1] else records.STRADDLING
        assert both == expected


@pytest.mark.parametrize("side", [1, 3, 8, 12, 16, 40, 256])
def test_pictures_that_differ_in_few_rows_are_on_both_sides(side):
    pictures = np.zeros((300, side, side, 1), np.uint8)
    rng = np.random.default_rng(0)
    pictures[:, side // 2] = rng.integers(0, 256, (300, side, 1), np.uint8)
    share = np.mean([split_of([picture], 0.25) == records.HELD_OUT for picture in pictures])
    assert 0.1 < share < 0.4


# --- from prepared data to rows ---


def test_rows_hold_every_training_document(uninterrupted, experiment):
    dataset = open_dataset(uninterrupted)
    image = dataset.image_config()
    data = DataConfig(sources=(SourceConfig(str(uninterrupted)),), row_length=256, batch_rows=4)
    sampler = replace(experiment.sampler, max_tokens=image.span)
    experiment = replace(experiment, image=image, data=data, sampler=sampler)
    for split in ("train", "held_out"):
        packed = Data(experiment, dataset.tokenizer, split)
        chosen = dataset.numbers(split)
        pictures = sum(int((row.image_start_BM < 256).sum()) for row in packed.once(1))
        assert pictures == dataset.index.images[chosen].sum()
    files = list((uninterrupted / "plans").glob("*/*/document.npy"))
    assert len(files) == 2  # of training and held-out data
    for file in files:  # damaged, of the same size
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    again = Data(experiment, dataset.tokenizer, "held_out")
    assert again.fingerprints() == packed.fingerprints()
    numbers = [
        document
        for r in range(len(again.sources[0]))
        for document, _, _ in again.sources[0].plan.row(r)
    ]
    assert sorted(numbers) == list(range(len(numbers)))


def web_lengths(pairs: int, texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of pairs with images of 256 patches, and of web pages; and which may be cut."""
    rng = np.random.default_rng(0)
    captions = np.clip(rng.lognormal(np.log(30), 0.7, pairs).astype(int), 1, 500)
    pages = np.clip(rng.lognormal(np.log(500), 1.0, texts).astype(int), 1, 100_000)
    return np.concatenate([captions + 260, pages]), np.repeat([False, True], [pairs, texts])


@pytest.mark.parametrize(("pairs", "texts"), [(1_000_000, 0), (500_000, 500_000), (0, 1_000_000)])
def test_a_million_documents_are_planned_in_seconds(pairs, texts):
    lengths, cut = web_lengths(pairs, texts)
    begin = time.process_time()
    packed = plan(lengths, 4096, cut)
    assert time.process_time() - begin < 3
    assert packed.filled(4096) > (0.98 if pairs else 0.9999) and not packed.rejected
