"""Preparation: raw pictures, captions and text become a data set that training reads at random.

DIR/dataset.json       what it is and what made it; written last, so a directory with it is whole
DIR/tokenizer.model    DIR/autoencoder/ (of latents)    DIR/shards/*.arrayrecord    DIR/index.npy
DIR/ledger.json        items read = written + rejected, by input and reason
DIR/rejected.jsonl     every rejected item, with its reason; DIR/rejected/ keeps a few of each
DIR/contact_sheet.png  DIR/sample.txt                   for a look

Items are numbered over all inputs, and shard k holds a fixed range of them. So any process can make any shard; parts
share the shards out, and what a killed process did not finish is made again, to the byte.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from transfusion_jax.config import require
from transfusion_jax.data.images import MODES
from transfusion_jax.data.readers import open_input
from transfusion_jax.data.readers.files import Captions
from transfusion_jax.data.readers.raw import Columns, Picture, Reader, Rejected
from transfusion_jax.data.shards import Encode, Settings, write_shard, write_whole
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer

Report = Callable[[str], None]
SAMPLED_ITEMS, SAMPLED_CHARACTERS = 100_000, 20_000_000  # that a tokenizer is trained on
FORMAT = 1


class PreparationFailed(Exception):
    """The work ran, and its outcome is no data set."""


@dataclass(frozen=True)
class Preparation:
    """What becomes of which inputs."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders, .jsonl, .tar, .parquet and .txt files, and tfds:NAME[:SPLIT]."""
    height: int = 256
    """Of the pictures, in pixels, after a centre crop and an antialiased resize."""
    width: int = 256
    channels: int = 3
    """3: RGB; 1: grey."""
    autoencoder: str = ""
    """Run directory of `transfusion-jax autoencoder`, or directory of a published AutoencoderKL; empty: raw pixels."""
    tokenizer: str = ""
    """A sentencepiece `.model`; empty: one is trained on a sample of the text."""
    vocab_size: int = 32_000
    """Entries of a tokenizer that is trained here, at most."""
    columns: Columns = Columns()
    held_out: float = 0.01
    """Share of the documents that is kept from training, chosen by a hash of their names."""
    max_caption: int = 10_000
    """Characters; a longer caption is rejected."""
    reject_limit: float = 0.01
    """Share of the items that may be rejected; with more, there is no data set."""
    shard_items: int = 2048
    """Items of one shard, which is also what a killed process has to do again."""

    def __post_init__(self):
        require(min(self.height, self.width) > 0, f"height={self.height} and width={self.width} must be positive")
        require(self.channels in MODES, f"channels={self.channels} must be 1 or 3")
        require(self.vocab_size > 0, f"vocab_size={self.vocab_size} must be positive")
        require(self.max_caption > 0, f"max_caption={self.max_caption} must be positive")
        require(self.shard_items > 0, f"shard_items={self.shard_items} must be positive")
        for name in ("held_out", "reject_limit"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be in 0..1")


def prepare(
    preparation: Preparation, out: Path, part: tuple[int, int] | None, finish_only: bool, workers: int, report: Report
) -> dict[str, Any] | None:
    """Makes the shards of a part (i of n; None: all), and the data set once no shard is missing.

    Returns the content of dataset.json, or None while other parts have work left.

    Raises:
      ValueError: an input cannot be used, or `out` holds something else.
      PreparationFailed: more items were rejected than may be, or `finish_only` and shards are missing.
    """
    require(bool(preparation.inputs), "name at least one input: a folder, .jsonl, .tar, .parquet, .txt or tfds:NAME")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `images.decode` has a lower limit
    _check_out(out)
    inputs = [reader for path in preparation.inputs for reader in open_input(path, preparation.columns)]
    items = sum(len(reader) for _, reader in inputs)
    require(items > 0, f"no pair found, nor any text, in {', '.join(preparation.inputs)}")
    _check_missing(inputs, items, preparation.reject_limit, report)
    codec = _codec(preparation)
    identity = {
        "format": FORMAT,
        "preparation": {k: v for k, v in dataclasses.asdict(preparation).items() if k != "reject_limit"},
        "inputs": [{"input": name, "items": len(reader)} for name, reader in inputs],
        "autoencoder": codec.digest if codec else None,
    }
    tokenizer = _given_tokenizer(preparation)
    if (done := _claim(out, identity)) is not None:
        report(f"{out} is prepared already")
        return done
    tokenizer = tokenizer or _trained_tokenizer(preparation, inputs, out, report)
    write_whole(out / "tokenizer.model", tokenizer.model)

    settings = Settings(
        tokenizer, preparation.height, preparation.width, preparation.channels, preparation.max_caption,
        preparation.held_out, _encoder(codec) if codec else None,
    )  # fmt: skip
    ranges = [range(at, min(at + preparation.shard_items, items)) for at in range(0, items, preparation.shard_items)]
    missing = [k for k in range(len(ranges)) if not _account(out, k).exists()]
    i, n = part or (0, 1)
    mine = [] if finish_only else [k for k in missing if k % n == i % n]
    left = sum(len(ranges[k]) for k in mine)
    with ThreadPoolExecutor(workers) as executor, tqdm(total=left, unit="item", desc="preparing") as bar:
        for k in mine:
            chosen = _chosen(inputs, ranges[k])
            write_shard(chosen, _shard(out, k), _account(out, k), settings, executor, 4 * workers, bar.update)
    missing = [k for k in range(len(ranges)) if not _account(out, k).exists()]
    if missing and not (out / "dataset.json").exists():  # another part may just have made it
        line = f"{len(missing)} of {len(ranges)} shards are not there yet, the first is {missing[0]}"
        if part is None:
            raise PreparationFailed(line)
        report(f"part {i}/{n} is done; {line}: the last part, or --finish, makes the data set")
        return None
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two parts may be done at the same time
        if (done := _claim(out, identity)) is not None:
            return done
        return _finish(preparation, identity, out, len(ranges), settings, codec)


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", counted from 0 or from 1: part 0/4 and part 4/4 are the same.

    Raises:
      ValueError: it is no such fraction.
    """
    i, slash, n = text.partition("/")
    require(bool(slash) and i.isdecimal() and n.isdecimal(), f"--part {text} must be i/n, as in 1/4")
    require(0 < int(n) and int(i) <= int(n), f"--part {text} is not one of {n} parts")
    return int(i), int(n)


def _check_out(out: Path) -> None:
    """Raises ValueError for a directory that is not one of ours."""
    require(not out.exists() or out.is_dir(), f"{out} is a file, not a directory")
    if out.exists() and not (out / "identity.json").exists() and not (out / "dataset.json").exists():
        foreign = sorted(p.name for p in out.iterdir() if not p.name.endswith(".partial"))
        require(not foreign, f"{out} is left as it is: it holds {''.join(foreign[:1])} and no prepared data")


def _claim(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Makes `out` the place of this preparation; returns its dataset.json if it is finished.

    Raises:
      ValueError: it holds another data set, or the inputs have changed.
    """
    identity = json.loads(json.dumps(identity))
    whole = json.loads((out / "dataset.json").read_text()) if (out / "dataset.json").exists() else None
    stored = whole["identity"] if whole else None
    if stored is None and (out / "identity.json").exists():
        stored = json.loads((out / "identity.json").read_text())
    if stored is not None and stored != identity:
        changed = [f"{name}: {old} -> {new}" for name, old, new in _changes(stored, identity)]
        raise ValueError(f"{out} holds other data, which is left as it is; what differs: {'; '.join(changed[:5])}")
    if stored is None:
        for folder in ("shards", "parts"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        write_whole(out / "identity.json", _json(identity))
    return whole


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def _check_missing(inputs: list[tuple[str, Reader]], items: int, limit: float, report: Report) -> None:
    """Names pictures that captions speak of and that are not there; raises ValueError if they are too many."""
    for name, reader in inputs:
        if isinstance(reader, Captions) and (missing := reader.missing()):
            line = f"{len(missing)} files that the captions of {name} name are not there: {', '.join(missing[:5])}"
            line += ", ..." if len(missing) > 5 else ""
            require(len(missing) <= limit * items, f"{line} (more than reject_limit={limit:g} of {items} items)")
            report(line)


def _chosen(inputs: list[tuple[str, Reader]], numbers: range) -> Iterator[tuple[str, Reader, int]]:
    """(input, reader, index) of the items with these numbers."""
    starts = np.cumsum([0, *(len(reader) for _, reader in inputs)])
    for number in numbers:
        at = int(np.searchsorted(starts, number, side="right")) - 1
        yield *inputs[at], number - int(starts[at])


def _given_tokenizer(preparation: Preparation) -> Tokenizer | None:
    if not preparation.tokenizer:
        return None
    try:
        return Tokenizer(Path(preparation.tokenizer).read_bytes(), preparation.tokenizer)
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {preparation.tokenizer}: {error.strerror}") from error


def _trained_tokenizer(
    preparation: Preparation, inputs: list[tuple[str, Reader]], out: Path, report: Report
) -> Tokenizer:
    """The tokenizer of an earlier start, or one trained on text of items drawn with a fixed seed."""
    if (path := out / "tokenizer.model").exists():
        return Tokenizer(path.read_bytes(), str(path))
    report("training a tokenizer")
    items = sum(len(reader) for _, reader in inputs)
    numbers = np.random.default_rng(0).permutation(items)[:SAMPLED_ITEMS]
    texts, characters = [], 0
    for number in numbers.tolist():
        (_, reader, index), *_ = _chosen(inputs, range(number, number + 1))
        try:
            raw = reader[index]
        except Rejected:
            continue
        for text in (*raw.captions, *(span for span in raw.spans if not isinstance(span, Picture))):
            texts += text.encode(errors="ignore").decode().splitlines()
            characters += len(text)
        if characters > SAMPLED_CHARACTERS:
            break
    require(any(text.strip() for text in texts), "there is no text to train a tokenizer on")
    return train_tokenizer(texts, preparation.vocab_size)


def _codec(preparation: Preparation):
    if not preparation.autoencoder:
        return None
    from transfusion_jax.autoencoder.pretrained import load_codec

    path = Path(preparation.autoencoder)
    trained = path / "autoencoder"  # in the run directory of `transfusion-jax autoencoder`
    codec = load_codec(trained if trained.is_dir() else path)
    codec.latent_shape(preparation.height, preparation.width)
    require(
        codec.config.channels == preparation.channels,
        f"the autoencoder takes {codec.config.channels} channels, not channels={preparation.channels}",
    )
    return codec


def _encoder(codec) -> Encode:
    def encode(pictures: np.ndarray) -> np.ndarray:
        mean, std = codec.encode(pictures)
        return np.stack([np.asarray(mean), np.asarray(std)], axis=1).astype(np.float16)

    return encode


def _finish(
    preparation: Preparation, identity: dict, out: Path, shards: int, settings: Settings, codec
) -> dict[str, Any]:
    """Puts the accounts of all shards together; the data set is whole once dataset.json is there."""
    accounts = [msgpack.unpackb(_account(out, k).read_bytes()) for k in range(shards)]
    ledger = _ledger(accounts)
    write_whole(out / "ledger.json", _json(ledger))
    _keep_rejected(accounts, out)
    total = ledger["total"]
    if total["rejected"] > preparation.reject_limit * total["items"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in total["reasons"].items())
        raise PreparationFailed(
            f"{total['rejected']} of {total['items']} items were rejected ({reasons}), more than "
            f"reject_limit={preparation.reject_limit:g}; they are listed in {out / 'rejected.jsonl'}"
        )
    text, images, held_out = np.asarray([row for a in accounts for row in a["index"]], np.int64).reshape(-1, 3).T
    require(len(text) > 0, "no document is left")
    np.save(out / "index.partial.npy", np.stack([text, images, held_out]).astype(np.int32))
    os.replace(out / "index.partial.npy", out / "index.npy")
    dataset = {
        "format": FORMAT,
        "documents": len(text),
        "held_out": int(held_out.sum()),
        "text_tokens": int(text.sum()),
        "images": int(images.sum()),
        "image": _image(preparation, codec, sum(np.asarray(a["moments"]) for a in accounts)),
        "tokenizer": {
            "entries": settings.tokenizer.size,
            "sha256": hashlib.sha256(settings.tokenizer.model).hexdigest(),
        },
        "shards": [
            {"name": _shard(out, k).name, "documents": len(a["index"]), "bytes": a["bytes"], "sha256": a["sha256"]}
            for k, a in enumerate(accounts)
        ],
        "index_sha256": hashlib.sha256((out / "index.npy").read_bytes()).hexdigest(),
        "ledger": total,
        "identity": identity,
    }
    if codec:
        from transfusion_jax.autoencoder.pretrained import save_codec

        latents = dataset["image"]
        save_codec(out / "autoencoder", codec.config, codec.parameters, latents["scale"], latents["shift"])
    write_whole(out / "dataset.json", _json(dataset))
    for k in range(shards):
        _account(out, k).unlink()
    (out / "parts").rmdir()
    (out / "identity.json").unlink()
    (out / ".lock").unlink()
    return json.loads(json.dumps(dataset))


def _image(preparation: Preparation, codec, moments: np.ndarray) -> dict[str, Any]:
    """How images are stored, and for latents what a model is fed: (latent - shift) * scale."""
    pixels = [preparation.height, preparation.width, preparation.channels]
    if codec is None:
        return {"stored": "pixels", "pixels": pixels, "shape": pixels}
    count, total, squares = moments
    mean = total / max(count, 1)
    std = float(np.sqrt(max(squares / max(count, 1) - mean**2, 1e-12)))
    # An autoencoder that brings its own scale is taken at its word, so that data sets made with it can be mixed.
    own = (codec.scale, codec.shift) != (1.0, 0.0)
    return {
        "stored": "latents",
        "pixels": pixels,
        "shape": list(codec.latent_shape(preparation.height, preparation.width)),
        "autoencoder": codec.digest,
        "measured_mean": mean,
        "measured_std": std,
        "shift": codec.shift if own else mean,
        "scale": codec.scale if own else 1 / std,
    }


def _ledger(accounts: list[dict]) -> dict[str, Any]:
    """Items and captions by input, and in all: read = written + rejected."""
    by_input: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for account in accounts:
        for name in ("read", "written", "rejected", "captions", "captions_dropped"):
            for source, reason, n in account[name]:
                by_input[source][name][reason] += n

    def entry(counts: dict[str, Counter]) -> dict[str, Any]:
        return {
            "items": counts["read"].total(),
            "written": counts["written"].total(),
            "rejected": counts["rejected"].total(),
            "reasons": dict(sorted(counts["rejected"].items())),
            "captions": counts["captions"].total(),
            "captions_dropped": dict(sorted(counts["captions_dropped"].items())),
        }

    total: dict[str, Counter] = defaultdict(Counter)
    for counts in by_input.values():
        for name, counter in counts.items():
            total[name] += counter
    return {"inputs": {name: entry(counts) for name, counts in by_input.items()}, "total": entry(total)}


def _keep_rejected(accounts: list[dict], out: Path) -> None:
    """Lists every rejected item, and keeps the content of a few of each reason for a look."""
    lines, kept = [], Counter()
    for source, item, reason, content in (r for account in accounts for r in account["rejections"]):
        line = {"input": source, "item": item, "reason": reason}
        if content and kept[reason] < 5:
            kept[reason] += 1
            ending = Path(item).suffix if reason not in ("invalid UTF-8", "invalid JSON") else ".txt"
            line["kept"] = f"rejected/{reason.replace(' ', '_')}_{kept[reason]}{ending[:8]}"
            (out / "rejected").mkdir(exist_ok=True)
            write_whole(out / line["kept"], content)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(out / "rejected.jsonl", "".join(lines).encode(errors="backslashreplace"))


def _shard(out: Path, k: int) -> Path:
    return out / "shards" / f"{k:06}.arrayrecord"


def _account(out: Path, k: int) -> Path:
    return out / "parts" / f"{k:06}.msgpack"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
