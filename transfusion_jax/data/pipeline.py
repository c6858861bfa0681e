"""The data order: row i of a run is a function of (seed, i), whatever the hosts, devices and restarts.

    sources --plan--> rows --shuffle, repeat--> --mix by weight--> row i --pack--> batches --slice--> a host's part

Each source's rows are shuffled anew every epoch, and mixed by `Mixture`. What is random inside row i (caption, order,
dropout, latents) is drawn from a generator seeded with (seed, i). Nothing has a state: training resumes at step s by
starting to read at batch s.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import grain
import jax
import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import sequence
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
        if tokenizer.size > experiment.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.size} ids with BOI and EOI, more than "
                f"model.vocab_size={experiment.model.vocab_size}"
            )
        self.experiment, self.tokenizer = experiment, tokenizer
        self.mixture = Mixture(experiment.data, experiment.train.steps)
        self.sources, row_length = [], experiment.data.row_length
        for config, source in zip(
            experiment.data.sources, load_sources(experiment, split), strict=True
        ):
            brought = source.assets.tokenizer
            if brought is not None and brought.model != tokenizer.model:
                raise ValueError(
                    f"the run's tokenizer is not the one that {config.name} was prepared with"
                )
            packed, fingerprint = plan_of(source, tokenizer, row_length)
            if len(packed) == 0 and split == "train":
                raise ValueError(
                    f"source {config.name!r} has no document that fits {split} rows: "
                    f"{packed.ledger()}"
                )
            self.sources.append(PlannedSource(config.name, source, packed, fingerprint))

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

    def batches(self, block: int = 0, blocks: int = 1) -> grain.MapDataset:
        """Item s is block `block` of the `blocks` equal parts of global batch s."""
        rows = self.experiment.data.batch_rows // blocks
        return self.rows().batch(rows, drop_remainder=True, batch_fn=stack)[block::blocks]

    def once(self, batch_rows: int) -> Iterator[Batch]:
        """Every row of every source once, in order, in batches; the last is filled up with empty rows."""
        rng = np.random.default_rng(self.experiment.train.seed)
        rows = (self.row(source, r, rng) for source in self.sources for r in range(len(source)))
        empty = pack([], self.experiment.data.row_length, self.experiment.image)
        while batch := list(itertools.islice(rows, batch_rows)):
            yield stack(batch + [empty] * (batch_rows - len(batch)))

    def row(self, source: PlannedSource, r: int, rng: np.random.Generator) -> Batch:
        """Row r of a source."""
        planned = source.plan.row(r)
        numbers = [number for number, _, _ in planned]
        documents = source.source.documents(numbers, self.tokenizer, rng)
        pieces = [
            (sequence(document, self.tokenizer, self.experiment.image.patches), begin, end)
            for document, (_, begin, end) in zip(documents, planned, strict=True)
        ]
        return pack(pieces, self.experiment.data.row_length, self.experiment.image)

    def ledger(self) -> dict[str, dict]:
        """For every source: documents = in rows + rejected, by reason; rows; share of positions filled."""
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
        """A digest of each source's documents and plan: another means that the data changed under a run."""
        return [source.fingerprint for source in self.sources]


def stack(rows: list[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def read(batches: grain.MapDataset, start: int, prefetch: int) -> Iterator[Batch]:
    """Batches from `start` on, read ahead by threads; more of them than cores would only wait for each other."""
    threads = min(prefetch, 4, cores())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(batches[start:].to_iter_dataset(options))
