"""Preparation: raw pictures, captions and text become a data set that training reads at random.

DIR/dataset.json       what it is and what made it; written last, so a directory with it is complete
DIR/tokenizer.model    DIR/autoencoder/ (of latents)    DIR/shards/*.arrayrecord
DIR/index.npy          DIR/splits/*.npy                 what packing is planned from
DIR/ledger.json        items read = written + rejected, by input and reason
DIR/rejected.jsonl     every rejected item, with its reason; DIR/rejected/ keeps a few of each
DIR/contact_sheet.png  DIR/sample.txt                   for a look
DIR/parts/             what processes share while shards are made

Items are numbered over all inputs, and shard k holds a fixed range of them. So any process can make
any shard; parts share the shards out, and what a killed process did not finish is made again, to
the byte.
"""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from transfusion_jax.data.sources.dataset import open_dataset
from transfusion_jax.errors import require
from transfusion_jax.host import bar_intervals
from transfusion_jax.preparation import directory
from transfusion_jax.preparation.config import Preparation
from transfusion_jax.preparation.finish import PreparationFailed, finish_dataset
from transfusion_jax.preparation.readers.inputs import stamp_of
from transfusion_jax.preparation.shards import ENCODED, finish_shard, in_order, write_shard
from transfusion_jax.preparation.start import Begun, Report, begin
from transfusion_jax.preparation.vocabulary import given_tokenizer
from transfusion_jax.preparation.workers import chosen, make_shards

if TYPE_CHECKING:
    from transfusion_jax.autoencoder.codec import Codec


def prepare(
    preparation: Preparation,
    out: Path,
    part: tuple[int, int] | None,
    finish_only: bool,
    workers: int,
    report: Report,
) -> dict[str, Any] | None:
    """Makes the shards of a part (i of n; None: all), and the data set once no shard is missing.

    A data set that is finished stays as it is; `finish_only` then compares its index with the
    checksums in dataset.json.

    Returns the content of dataset.json, or None while other parts have work left.

    Raises:
      ValueError: an input cannot be used, or `out` holds something else.
      PreparationFailed: more items were rejected than may be, or `finish_only` and shards are
        missing.
    """
    _check_inputs(preparation.inputs)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a picture is counted
    directory.check_out(out, preparation.inputs)
    stamps = {path: stamp_of(path) for path in preparation.inputs}
    codec = _codec(preparation)
    tokenizer = given_tokenizer(preparation.tokenizer)
    with directory.alone(out):
        begun = begin(preparation, out, stamps, codec, tokenizer, workers, report)
        if begun is None:
            report(f"{out} is prepared already")
            if finish_only:
                open_dataset(out).verify()
            return directory.finished(out)
        job = begun.job
        i, n = part or (0, 1)
        done = directory.done_shards(out)
    if not finish_only:
        mine = [k for k in range(job.shards) if k not in done and k % n == i % n]
        _write_shards(begun, mine, workers)
    with directory.alone(out):
        if (dataset := directory.finished(out)) is not None:  # by another part, just now
            return dataset
        missing = sorted(set(range(job.shards)) - directory.done_shards(out))
        if not missing:
            dataset = finish_dataset(
                job, begun.inputs, preparation.reject_limit, begun.identity, stamps, codec
            )
            directory.clean(out)
            return dataset
    some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    line = f"{len(missing)} of {job.shards} shards are missing: {some}"
    if part is None or finish_only:
        raise PreparationFailed(line)
    report(f"part {i}/{n} is done; {line}: the last part, or --finish, makes the data set")
    return None


def _check_inputs(inputs: Sequence[str]) -> None:
    """Raises ValueError if there are none, or one is named twice or lies in another."""
    require(
        bool(inputs),
        "name at least one input: a folder, .jsonl, .tar, .parquet, .txt or tfds:NAME",
    )
    places = [path if path.startswith("tfds:") else os.path.realpath(path) for path in inputs]
    count = Counter(places)
    for path, place in zip(inputs, places, strict=True):
        require(count[place] == 1, f"{path} is named twice: all in it would be there twice")
        outer = next((str(x) for x in Path(place).parents if str(x) in count), None)
        if outer:
            other = inputs[places.index(outer)]
            raise ValueError(f"{path} lies in {other}: all in it would be there twice")


def _write_shards(begun: Begun, mine: list[int], workers: int) -> None:
    """Makes shards: on processes, or on threads of this one, which has the devices that encode."""
    job = begun.job
    if not mine:
        return
    directory.remove_partials(job.out, set(mine))
    total = sum(len(job.items(k)) for k in mine)
    with tqdm(total=total, unit="item", desc="preparing", **bar_intervals()) as bar:
        if job.settings.encode is None and min(workers, len(mine)) > 1:
            for items in make_shards(job, mine, workers):
                bar.update(items)
            return
        readers = [(found.name, found.open()) for found in begun.inputs]
        with ThreadPoolExecutor(workers) as executor:
            items = itertools.chain.from_iterable(chosen(readers, job.items(k)) for k in mine)
            loaded = in_order(items, job.settings, executor, ENCODED + 4 * workers)
            for k in mine:
                ledger = write_shard(
                    itertools.islice(loaded, len(job.items(k))),
                    job.shard(k),
                    job.settings,
                    bar.update,
                )
                finish_shard(ledger, job.shard(k), job.ledger(k))


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


def _codec(preparation: Preparation) -> "Codec | None":
    if not preparation.autoencoder:
        return None
    from transfusion_jax.preparation.encoder import codec_of

    return codec_of(preparation)
