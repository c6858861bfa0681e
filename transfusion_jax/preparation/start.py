"""The start of a preparation: what all its processes agree on, before the first shard is made."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transfusion_jax.data.sources.dataset import FORMAT
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.files import atomic_path, write_atomic
from transfusion_jax.preparation import directory
from transfusion_jax.preparation.config import Preparation
from transfusion_jax.preparation.finish import as_json
from transfusion_jax.preparation.ranges import shard_bounds
from transfusion_jax.preparation.readers.inputs import Input, find_inputs
from transfusion_jax.preparation.readers.stored import load_inputs, save_inputs
from transfusion_jax.preparation.shards import Encode, Settings
from transfusion_jax.preparation.vocabulary import trained_tokenizer
from transfusion_jax.preparation.workers import Job, Named, on_processes

if TYPE_CHECKING:
    from transfusion_jax.autoencoder.codec import Codec

Report = Callable[[str], None]


@dataclass(frozen=True)
class Begun:
    """A preparation whose directory is claimed: what all its parts agree on."""

    inputs: list[Input]
    identity: dict[str, Any]
    stamps: dict[str, str]
    job: Job


def begin(
    preparation: Preparation,
    out: Path,
    stamps: dict[str, str],
    codec: "Codec | None",
    tokenizer: Tokenizer | None,
    workers: int,
    report: Report,
) -> Begun | None:
    """Claims `out`, or joins those that prepare the same there; None if it is finished.

    The first process looks through the inputs, trains the tokenizer and divides the items among
    shards; the others load what it left.
    """
    identity = _settings_identity(preparation, codec, tokenizer)
    inputs, found = _inputs(preparation, out, stamps, identity, workers, report)
    if directory.finished(out) is not None:
        return None
    readers = [(one.name, one.open()) for one in inputs]
    items = sum(len(reader) for _, reader in readers)
    require(items > 0, f"no pair found, nor any text, in {', '.join(preparation.inputs)}")
    if found:
        _report(inputs, items, preparation.reject_limit, report)
    if tokenizer is None:
        tokenizer = _kept_tokenizer(out, readers, preparation.vocab_size, report)
    directory.claim(out, identity)
    write_atomic(out / "tokenizer.model", tokenizer.model)
    settings = Settings(
        tokenizer,
        preparation.height,
        preparation.width,
        preparation.channels,
        preparation.max_caption,
        preparation.held_out,
        _encoder(codec),
    )
    job = Job(out, _bounds(out, readers, tokenizer, codec, preparation), settings)
    if found:
        save_inputs(inputs, stamps, job.inputs)
    return Begun(inputs, identity, stamps, job)


def _inputs(
    preparation: Preparation,
    out: Path,
    stamps: dict[str, str],
    identity: dict[str, Any],
    workers: int,
    report: Report,
) -> tuple[list[Input], bool]:
    """What is in the inputs, and whether they were looked through to know; completes `identity`.

    Says so where files have other times than before, and may have changed unseen.

    Raises:
      ValueError: `out` belongs to another preparation, or its inputs have changed.
    """
    claimed = directory.claimed_by(out)
    dataset = directory.finished(out)
    if dataset is not None and dataset.get("stamps") == stamps:
        identity["inputs"] = claimed["inputs"]
        directory.check_identity(out, identity)
        return [], False
    stored = load_inputs(out / "parts" / "inputs", stamps) if claimed else None
    inputs = stored
    if inputs is None:
        inputs = [
            found
            for path in preparation.inputs
            for found in find_inputs(
                path, preparation.columns, preparation.max_item_bytes, on_processes(workers)
            )
        ]
    identity["inputs"] = {one.name: f"{one.items} items, {one.digest[:16]}" for one in inputs}
    directory.check_identity(out, identity)
    if claimed and stored is None:
        report(
            f"input files have other times than when {out} was begun; their names, sizes and texts "
            "are the same, and pictures and tables were not compared"
        )
    return inputs, stored is None


def _settings_identity(
    preparation: Preparation, codec: "Codec | None", tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """What tells this preparation from others, except for what is in the inputs."""
    fields = dataclasses.asdict(preparation)
    del fields["reject_limit"]
    identity = {
        "format": FORMAT,
        "preparation": fields,
        "tokenizer": hashlib.sha256(tokenizer.model).hexdigest() if tokenizer else None,
        "autoencoder": codec.digest if codec else None,
    }
    if codec and codec.config.kind == "vq":
        identity["images"] = "codes"  # earlier versions stored latents
    return json.loads(as_json(identity))


def _report(inputs: Sequence[Input], items: int, limit: float, report: Report) -> None:
    """Names what the inputs lack, and what in them is not read.

    Raises:
      ValueError: more pictures are missing than may be rejected.
    """
    for found in inputs:
        if found.unread:
            kinds = ", ".join(f"{n} {ending}" for ending, n in found.unread[:5])
            report(f"files of other kinds in {found.folder.root} are not read: {kinds}")
        count, names = found.missing
        if count:
            shown = ", ".join(_printable(name) for name in names)
            line = f"{count} files that the captions of {found.name} name are missing: {shown}"
            line += ", ..." if count > len(names) else ""
            require(
                count <= limit * items,
                f"{line} (more than reject_limit={limit:g} of {items} items)",
            )
            report(line)


def _printable(name: str) -> str:
    """A name from an input, without characters that do something to a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:200])


def _kept_tokenizer(
    out: Path, readers: Sequence[Named], vocab_size: int, report: Report
) -> Tokenizer:
    """The tokenizer that an earlier start trained, or a new one."""
    if (path := out / "tokenizer.model").exists():
        return Tokenizer(path.read_bytes(), str(path))
    report("training a tokenizer")
    return trained_tokenizer(readers, vocab_size)


def _bounds(
    out: Path,
    readers: Sequence[Named],
    tokenizer: Tokenizer,
    codec: "Codec | None",
    preparation: Preparation,
) -> np.ndarray:
    """The items at which shards begin, as an earlier start left them, or computed."""
    file = out / "parts" / "bounds.npy"
    if file.exists():
        return np.load(file)
    height, width = preparation.height, preparation.width
    picture_bytes = height * width * preparation.channels
    if codec is not None:
        latent = codec.latent_shape(height, width)
        # Float16 means and deviations, or one code at each place.
        picture_bytes = (
            2 * latent[0] * latent[1] if codec.config.kind == "vq" else 4 * int(np.prod(latent))
        )
    found = [reader for _, reader in readers]
    bounds = shard_bounds(found, tokenizer, picture_bytes, preparation.shard_bytes)
    with atomic_path(file) as path, path.open("wb") as opened:
        np.save(opened, bounds)
    return bounds


def _encoder(codec: "Codec | None") -> Encode | None:
    if codec is None:
        return None
    from transfusion_jax.preparation.encoder import encoder_of

    return encoder_of(codec)
