"""Preparation: raw pictures, captions and text become a data set that training reads at random.

DIR/dataset.json       what it is and what made it; written last, so a directory with it is whole
DIR/tokenizer.model    DIR/autoencoder/ (of latents)    DIR/shards/*.arrayrecord    DIR/index.npy
DIR/ledger.json        items read = written + rejected, by input and reason
DIR/rejected.jsonl     every rejected item, with its reason; DIR/rejected/ keeps a few of each
DIR/contact_sheet.png  DIR/sample.txt                   for a look

Items are numbered over all inputs, and shard k holds a fixed range of them. So any process can make any shard; parts
share the shards out, and what a killed process did not finish is made again, to the byte.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.errors import require
from transfusion_jax.files import write_atomic
from transfusion_jax.images import MODES
from transfusion_jax.preparation.finish import FORMAT, PreparationFailed, as_json, assemble
from transfusion_jax.preparation.readers.files import Captions
from transfusion_jax.preparation.readers.inputs import open_input
from transfusion_jax.preparation.readers.raw import Columns, Picture, Reader, Rejected
from transfusion_jax.preparation.shards import (
    ENCODED,
    Encode,
    Settings,
    finish_shard,
    in_order,
    write_shard,
)
from transfusion_jax.preparation.workers import Job, chosen, make_shards

Report = Callable[[str], None]
SAMPLED_ITEMS, SAMPLED_CHARACTERS = 100_000, 20_000_000  # that a tokenizer is trained on
SAMPLED_RUN = 64
LOCK = ".lock"


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
    """Share of the documents that is kept from training, chosen by a hash of what they hold."""
    max_caption: int = 10_000
    """Characters; a longer caption is rejected."""
    reject_limit: float = 0.01
    """Share of the items that may be rejected; with more, there is no data set."""
    shard_items: int = 512
    """Items of one shard, which is also what a killed process has to do again."""

    def __post_init__(self):
        require(
            min(self.height, self.width) > 0,
            f"height={self.height} and width={self.width} must be positive",
        )
        require(self.channels in MODES, f"channels={self.channels} must be 1 or 3")
        require(self.vocab_size > 0, f"vocab_size={self.vocab_size} must be positive")
        require(self.max_caption > 0, f"max_caption={self.max_caption} must be positive")
        require(self.shard_items > 0, f"shard_items={self.shard_items} must be positive")
        for name in ("held_out", "reject_limit"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be in 0..1")


def prepare(
    preparation: Preparation,
    out: Path,
    part: tuple[int, int] | None,
    finish_only: bool,
    workers: int,
    report: Report,
) -> dict[str, Any] | None:
    """Makes the shards of a part (i of n; None: all), and the data set once no shard is missing.

    Returns the content of dataset.json, or None while other parts have work left.

    Raises:
      ValueError: an input cannot be used, or `out` holds something else.
      PreparationFailed: more items were rejected than may be, or `finish_only` and shards are missing.
    """
    require(
        bool(preparation.inputs),
        "name at least one input: a folder, .jsonl, .tar, .parquet, .txt or tfds:NAME",
    )
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a picture is counted
    _check_out(out)
    inputs = [
        reader for path in preparation.inputs for reader in open_input(path, preparation.columns)
    ]
    items = sum(len(reader) for _, reader in inputs)
    require(items > 0, f"no pair found, nor any text, in {', '.join(preparation.inputs)}")
    _check_missing(inputs, items, preparation.reject_limit, report)
    codec, tokenizer = _codec(preparation), _given_tokenizer(preparation)
    identity = json.loads(
        as_json(
            {
                "format": FORMAT,
                "preparation": {
                    k: v for k, v in dataclasses.asdict(preparation).items() if k != "reject_limit"
                },
                "inputs": {
                    name: f"{len(reader)} items, {reader.digest()[:16]}" for name, reader in inputs
                },
                "tokenizer": hashlib.sha256(tokenizer.model).hexdigest() if tokenizer else None,
                "autoencoder": codec.digest if codec else None,
            }
        )
    )
    with _alone(out):
        if (done := _finished(out, identity)) is not None:
            report(f"{out} is prepared already")
            return done
        tokenizer = tokenizer or _trained_tokenizer(preparation, inputs, out, report)
        _claim(out, identity, tokenizer)

    settings = Settings(
        tokenizer, preparation.height, preparation.width, preparation.channels, preparation.max_caption,
        preparation.held_out, _encoder(codec) if codec else None,
    )  # fmt: skip
    ranges = [
        range(at, min(at + preparation.shard_items, items))
        for at in range(0, items, preparation.shard_items)
    ]
    job = Job(preparation.inputs, preparation.columns, out, preparation.shard_items, settings)
    i, n = part or (0, 1)
    if not finish_only:
        _write_shards(
            inputs, ranges, [k for k in _missing(job, ranges) if k % n == i % n], job, workers
        )
    with _alone(out):
        if (done := _finished(out, identity)) is not None:  # by another part, just now
            return done
        if not (missing := _missing(job, ranges)):
            done = assemble(job, len(ranges), preparation.reject_limit, identity, codec)
            _clean(out)
            return done
    some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    line = f"{len(missing)} of {len(ranges)} shards are not there yet: {some}"
    if part is None or finish_only:
        raise PreparationFailed(line)
    report(f"part {i}/{n} is done; {line}: the last part, or --finish, makes the data set")
    return None


def _write_shards(
    inputs: list[tuple[str, Reader]], ranges: list[range], mine: list[int], job: Job, workers: int
) -> None:
    """Makes these shards: on processes, or with an autoencoder on threads of this one, which has the devices."""
    with tqdm(total=sum(len(ranges[k]) for k in mine), unit="item", desc="preparing") as bar:
        if job.settings.encode is None and min(workers, len(mine)) > 1:
            for items in make_shards(job, mine, workers):
                bar.update(items)
            return
        with ThreadPoolExecutor(workers) as executor:
            items = itertools.chain.from_iterable(chosen(inputs, ranges[k]) for k in mine)
            loaded = in_order(items, job.settings, executor, ENCODED + 4 * workers)
            for k in mine:
                account = write_shard(
                    itertools.islice(loaded, len(ranges[k])), job.shard(k), job.settings, bar.update
                )
                finish_shard(account, job.shard(k), job.account(k))


def _missing(job: Job, ranges: list[range]) -> list[int]:
    return [k for k in range(len(ranges)) if not job.account(k).exists()]


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", counted from 0 or from 1: part 0/4 and part 4/4 are the same.

    Raises:
      ValueError: it is no such fraction.
    """
    i, slash, n = text.partition("/")
    require(
        bool(slash) and i.isdecimal() and n.isdecimal(), f"--part {text} must be i/n, as in 1/4"
    )
    require(0 < int(n) and int(i) <= int(n), f"--part {text} is not one of {n} parts")
    return int(i), int(n)


def _check_out(out: Path) -> None:
    """Raises ValueError for a directory that is not one of ours."""
    require(not out.exists() or out.is_dir(), f"{out} is a file, not a directory")
    if (
        out.exists()
        and not (out / "identity.json").exists()
        and not (out / "dataset.json").exists()
    ):
        foreign = sorted(
            p.name for p in out.iterdir() if p.name != LOCK and not p.name.endswith(".partial")
        )
        require(
            not foreign,
            f"{out} is left as it is: it holds {''.join(foreign[:1])} and no prepared data",
        )


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While no other part decides anything about `out`; a part that is killed lets go."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The content of dataset.json, if `out` is this preparation's and finished.

    Raises:
      ValueError: it holds another data set, or the inputs have changed.
    """
    whole = (
        json.loads((out / "dataset.json").read_text()) if (out / "dataset.json").exists() else None
    )
    stored = whole["identity"] if whole else identity
    if whole is None and (out / "identity.json").exists():
        stored = json.loads((out / "identity.json").read_text())
    if changed := [f"{name}: {old} -> {new}" for name, old, new in _changes(stored, identity)]:
        raise ValueError(
            f"{out} holds other data, which is left as it is; what differs: {'; '.join(changed[:5])}"
        )
    if whole:
        _clean(out)
    return whole


def _claim(out: Path, identity: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Makes `out` the place of this preparation."""
    write_atomic(out / "identity.json", as_json(identity))
    write_atomic(out / "tokenizer.model", tokenizer.model)
    for folder in ("shards", "parts"):
        (out / folder).mkdir(exist_ok=True)


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def _check_missing(
    inputs: list[tuple[str, Reader]], items: int, limit: float, report: Report
) -> None:
    """Names pictures that captions speak of and that are not there; raises ValueError if they are too many."""
    for name, reader in inputs:
        if isinstance(reader, Captions) and (missing := reader.missing()):
            line = f"{len(missing)} files that the captions of {name} name are not there: {', '.join(missing[:5])}"
            line += ", ..." if len(missing) > 5 else ""
            require(
                len(missing) <= limit * items,
                f"{line} (more than reject_limit={limit:g} of {items} items)",
            )
            report(line)


def _given_tokenizer(preparation: Preparation) -> Tokenizer | None:
    if not preparation.tokenizer:
        return None
    try:
        return Tokenizer(Path(preparation.tokenizer).read_bytes(), preparation.tokenizer)
    except OSError as error:
        raise ValueError(
            f"cannot read the tokenizer {preparation.tokenizer}: {error.strerror}"
        ) from error


def _trained_tokenizer(
    preparation: Preparation, inputs: list[tuple[str, Reader]], out: Path, report: Report
) -> Tokenizer:
    """The tokenizer of an earlier start, or one trained on text of items drawn with a fixed seed."""
    if (path := out / "tokenizer.model").exists():
        return Tokenizer(path.read_bytes(), str(path))
    report("training a tokenizer")
    items = sum(len(reader) for _, reader in inputs)
    # Runs of neighbours, because archives are read faster in order.
    starts = np.random.default_rng(0).permutation(np.arange(0, items, SAMPLED_RUN))[
        : SAMPLED_ITEMS // SAMPLED_RUN
    ]
    runs = (chosen(inputs, range(at, min(at + SAMPLED_RUN, items))) for at in starts.tolist())
    texts, characters = [], 0
    for _, reader, index in itertools.chain.from_iterable(runs):
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
    from transfusion_jax.autoencoder.codec import load_codec

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
    """Encodes batches cut over all devices of this process, each of which has the autoencoder."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.local_devices()[: math.gcd(ENCODED, jax.local_device_count())]
    place = functools.partial(NamedSharding, Mesh(devices, ("images",)))
    codec = dataclasses.replace(
        codec, parameters=jax.device_put(codec.parameters, place(PartitionSpec()))
    )

    def encode(pictures: np.ndarray) -> np.ndarray:
        mean, std = codec.encode(jax.device_put(pictures, place(PartitionSpec("images"))))
        return np.stack([np.asarray(mean), np.asarray(std)], axis=1).astype(np.float16)

    return encode


def _clean(out: Path) -> None:
    """Removes what a finished data set needs no more, and what killed processes left."""
    shutil.rmtree(out / "parts", ignore_errors=True)
    for left in (out / "identity.json", *out.glob("*.partial"), *out.glob("shards/*.partial")):
        left.unlink(missing_ok=True)
