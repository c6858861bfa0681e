"""The data order: row i is a function of (seed, i), whatever the hosts, devices and restarts.

    sources --plan--> rows --shuffle, repeat--> --mix by weight--> row i --pack-->
    batches --select--> the rows that a process's devices hold

Each source's rows are shuffled anew every epoch, and mixed by `Mixture`. What is random inside row
i (caption, order, dropout, latents) is drawn from a generator seeded with (seed, i). Nothing has
state: training resumes at step s by reading from batch s.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Sequenced, sequence
from transfusion_jax.data.mixture import Mixture
from transfusion_jax.data.packing import Plan, pack
from transfusion_jax.data.plans import plan_of
from transfusion_jax.data.sources.registry import load_sources
from transfusion_jax.data.sources.source import Source
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.host import cores


@dataclass(frozen=True)
class PlannedSource:
    """A source and its packing plan; item r is (this, r), which `Data.row` turns into a row."""

    name: str
    source: Source
    plan: Plan
    fingerprint: str
    """Changes when the documents or their places in rows do."""

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, r: int) -> tuple["PlannedSource", int]:
        return self, int(r)


class Data:
    """The packed rows of one split of an experiment's sources.

    Raises:
      ValueError: the tokenizer does not fit the model, or a source has no document that fits a row.
    """

    def __init__(self, experiment: Experiment, tokenizer: Tokenizer, split: str = "train"):
        self.experiment, self.tokenizer = experiment, tokenizer
        self.mixture = Mixture(experiment.data, experiment.train.steps)
        self.sources = []
        row_length = experiment.data.row_length
        for name, source in fitting_sources(experiment, tokenizer, split):
            packed, fingerprint = plan_of(source, tokenizer, row_length)
            if len(packed) == 0 and split == "train":
                raise ValueError(
                    f"source {name!r} has no document that fits {split} rows: {packed.ledger()}"
                )
            self.sources.append(PlannedSource(name, source, packed, fingerprint))

    def rows(self) -> grain.MapDataset:
        """The endless stream of training rows; item i is row i."""
        seed = self.experiment.train.seed
        streams = []
        for number, source in enumerate(self.sources):
            stream_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
            streams.append(grain.MapDataset.source(source).seed(stream_seed).shuffle().repeat())
        mixed = grain.MapDataset.select_from_datasets(streams, self.mixture)
        return mixed.map_with_index(
            lambda i, item: self.row(*item, np.random.default_rng((seed, i)))
        )

    def batches(self, rows: Sequence[int] | None = None) -> grain.MapDataset:
        """Item s holds these rows of global batch s, by default all of them."""
        size = self.experiment.data.batch_rows
        return batched(self.rows(), size, range(size) if rows is None else rows, stack)

    def once(self, batch_rows: int, most: int | None = None) -> Iterator[Batch]:
        """Every row of every source once, in order; empty rows fill up the last batch.

        With `most`, at most so many rows, evenly spaced over all of them. What is random in a row
        is the same whatever the run's seed and the size of a batch.
        """
        return (batch for batch, _ in self.numbered(batch_rows, range(len(self.sources)), most))

    def numbered(
        self, batch_rows: int, sources: Sequence[int], most: int | None = None
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """As `once`, of these sources alone: batches, and of every row the number of its source
        and its own there, [B, 2]."""
        ends = np.cumsum([len(self.sources[n]) for n in sources])
        total = int(ends[-1])
        count = total if most is None else min(most, total)
        places = (total * (2 * i + 1) // (2 * count) for i in range(count))
        found = ((place, int(np.searchsorted(ends, place, side="right"))) for place in places)
        named = ((sources[at], place - int(ends[at])) for place, at in found)
        numbers = ((n, r + len(self.sources[n])) for n, r in named)
        empty = self._pack([])
        while here := list(itertools.islice(numbers, batch_rows)):
            rows = [self.row(self.sources[n], r, np.random.default_rng((n, r))) for n, r in here]
            fill = batch_rows - len(here)
            yield stack(rows + [empty] * fill), np.asarray(here + [(0, 0)] * fill, np.int32)

    def row(self, source: PlannedSource, r: int, rng: np.random.Generator) -> Batch:
        """Row r of a source."""
        planned = source.plan.row(r)
        numbers = [number for number, _, _ in planned]
        documents = source.source.documents(numbers, self.tokenizer, rng)
        pieces = [
            (sequence(document, self.tokenizer, self.experiment.image.patches), begin, end)
            for document, (_, begin, end) in zip(documents, planned, strict=True)
        ]
        return self._pack(pieces)

    def _pack(self, pieces: Sequence[tuple[Sequenced, int, int]]) -> Batch:
        experiment = self.experiment
        return pack(pieces, experiment.data.row_length, experiment.image, experiment.image_slots)

    def ledger(self) -> dict[str, dict]:
        """For every source: documents = in rows + rejected, by reason; rows; how full they are."""
        length = self.experiment.data.row_length
        return {
            s.name: {**s.plan.ledger(), "filled": round(s.plan.filled(length), 4)}
            for s in self.sources
        }

    def epochs(self, step: int) -> dict[str, float]:
        """How often the steps up to this one have read each source."""
        rows = self.mixture.counts(step * self.experiment.data.batch_rows)
        return {s.name: float(n / len(s)) for s, n in zip(self.sources, rows, strict=True)}

    def fingerprints(self) -> list[str]:
        """A digest of each source's documents and plan: another means that the data changed under a
        run."""
        return [source.fingerprint for source in self.sources]


def fitting_sources(
    experiment: Experiment, tokenizer: Tokenizer | None, split: str
) -> list[tuple[str, Source]]:
    """The sources of a split by name, checked against the model, and against the run's tokenizer if
    there is one yet.

    Raises:
      ValueError: the tokenizer does not fit the model, or a source fits one of the two no better.
    """
    if tokenizer and tokenizer.size > experiment.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} ids with BOI and EOI, more than "
            f"model.vocab_size={experiment.model.vocab_size}"
        )
    names = [source.name for source in experiment.data.sources]
    named = list(zip(names, load_sources(experiment, split), strict=True))
    for name, source in named:
        brought = source.assets.tokenizer
        if tokenizer and brought is not None and brought.model != tokenizer.model:
            raise ValueError(f"the run's tokenizer is not the one that {name} was prepared with")
        _check_images(name, source, experiment)
    return named


def _check_images(name: str, source: Source, experiment: Experiment) -> None:
    """Raises ValueError for a source whose images are not what the model takes for images."""
    if np.all(source.splittable):  # text alone
        return
    family, codes = experiment.model.family, experiment.image.codes
    if experiment.model.images == "none":
        raise ValueError(f"source {name!r} has images, and a {family} is trained on text alone")
    if source.assets.codes != codes:
        raise ValueError(
            f"source {name!r} has pixels or latents, and a {family} needs the codes of a VQ "
            f"autoencoder, image.codes={codes} of them"
        )


def batched(
    stream: grain.MapDataset, size: int, rows: Sequence[int], stack: Callable[[list], Any]
) -> grain.MapDataset:
    """Item s holds these rows of global batch s, which is items s * size ... (s + 1) * size - 1."""

    def batch(s: int) -> Any:
        return stack([stream[s * size + row] for row in rows])

    return grain.MapDataset.range(sys.maxsize // size).map(batch)


def stack(rows: list[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def read(batches: grain.MapDataset, start: int, prefetch: int) -> Iterator[Batch]:
    """Batches from `start` on, read ahead by threads, no more of them than cores."""
    threads = min(prefetch, 4, cores())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(batches[start:].to_iter_dataset(options))
