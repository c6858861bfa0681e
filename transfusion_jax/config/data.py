"""What is trained on: sources, their weights, and the rows that their documents are packed into."""

import os
from dataclasses import dataclass

from transfusion_jax.errors import require


@dataclass(frozen=True)
class SourceConfig:
    """A source of documents and its share of the rows. Rows are equally long, so also of the
    tokens."""

    name: str = "synthetic"
    """One that is built in (`data/sources/registry.py`), or a directory of prepared data."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources."""

    def __post_init__(self):
        require(
            self.weight >= 0, f"weight={self.weight} of source {self.name!r} must not be negative"
        )


@dataclass(frozen=True)
class PhaseConfig:
    """New weights for the sources from a given point of the run, as in the last 1 % of section
    4.4."""

    start: float
    """Fraction of the run's steps."""
    weights: tuple[float, ...]
    """One for each source."""

    def __post_init__(self):
        require(0 < self.start < 1, f"start={self.start} of a phase must be between 0 and 1")
        require(
            min(self.weights, default=-1) >= 0,
            f"weights={self.weights} of a phase must not be negative",
        )


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    phases: tuple[PhaseConfig, ...] = ()
    """Changes of the weights, in the order of their starts."""
    max_epochs: float = 4.0
    """Training warns at its start about a source that it will read more often than this. (Data
    read up to four times is about as good as new: Muennighoff et al. 2023, arXiv 2305.16264.)"""
    row_length: int = 4096
    """L: positions of a row."""
    batch_rows: int = 512
    """Rows of the global batch: 512 rows of 4,096 are the paper's 2 M tokens."""
    image_first: float = 0.2
    """Share of text-image pairs that come image first; the others come caption first."""
    caption_dropout: float = 0.1
    """Share of documents whose text before an image is left out, for guidance: of caption-first
    pairs, and of interleaved documents before one of their images (our choice; the paper is
    silent)."""
    image_dropout: float = 0.5
    """Share of these interleaved documents that lose the images before that image as well, so that
    it is unconditional, as the image that guidance contrasts with. Brooks et al. (2023, arXiv
    2211.09800) drop the text of 5 % of edits, both of 5 %, and the image alone of 5 %, which their
    guidance never uses and we leave out."""
    prefetch: int = 8
    """Batches read ahead of the step."""

    def __post_init__(self):
        require(len(self.sources) > 0, "data.sources must name at least one source")
        names = [os.path.normpath(source.name) for source in self.sources]
        for name in names:
            require(
                names.count(name) == 1, f"data.sources names {name!r} twice: give it one weight"
            )
        self._check_weights()
        require(self.max_epochs > 0, f"data.max_epochs={self.max_epochs} must be positive")
        require(
            1 < self.row_length < 2**31,
            f"data.row_length={self.row_length} must be at least 2 and less than 2^31",
        )
        require(self.batch_rows > 0, f"data.batch_rows={self.batch_rows} must be positive")
        require(0 < self.prefetch <= 1000, f"data.prefetch={self.prefetch} must be in 1..1000")
        for name in ("image_first", "caption_dropout", "image_dropout"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}={value} must be in 0..1")

    def _check_weights(self):
        starts = [phase.start for phase in self.phases]
        require(
            starts == sorted(set(starts)),
            f"data.phases must start one after another, not at {starts}",
        )
        weights = [
            [source.weight for source in self.sources],
            *(phase.weights for phase in self.phases),
        ]
        for w in weights:
            require(
                len(w) == len(self.sources),
                f"data.phases: {w} are not the weights of {len(self.sources)} sources",
            )
            require(sum(w) > 0, f"data: the weights {w} leave no source")
        for number, source in enumerate(self.sources):
            require(
                any(w[number] > 0 for w in weights),
                f"data: source {source.name!r} has no weight at any time",
            )


@dataclass(frozen=True)
class TokenizerConfig:
    path: str = ""
    """A sentencepiece `.model`. Empty: training makes one from the sources' own text and keeps it
    in the run directory."""
    vocab_size: int = 32_000
    """At most so many entries, of a tokenizer that training makes."""
