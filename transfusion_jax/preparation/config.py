"""What a preparation is asked for."""

from dataclasses import dataclass

import tyro

from transfusion_jax.errors import require
from transfusion_jax.images import MODES
from transfusion_jax.preparation.readers.raw import Columns


@dataclass(frozen=True)
class Preparation:
    """What becomes of which inputs."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders, .jsonl, .tar, .parquet and .txt files, and tfds:NAME[:SPLIT]."""
    height: int = 256
    """Of the pictures, in pixels, after a centre crop and an antialiased resize."""
    width: int = 256
    """Of the pictures, in pixels."""
    channels: int = 3
    """Of the pictures; 3 is RGB, 1 is grey."""
    autoencoder: str = ""
    """Run directory of `transfusion-jax autoencoder`, or directory of a published AutoencoderKL, to
    store latents; empty: pixels are stored."""
    tokenizer: str = ""
    """A sentencepiece `.model`; empty: one is trained on a sample of the text."""
    vocab_size: int = 32_000
    """Entries of a tokenizer that is trained here, at most."""
    columns: Columns = Columns()
    held_out: float = 0.01
    """Share of the pictures, and of the documents without pictures, that is kept from training,
    chosen by a hash of their content. A document with some of its pictures held out and others not
    is used by neither training nor evaluation, and counted."""
    max_caption: int = 10_000
    """Characters of a caption; a longer one is left out."""
    max_item_bytes: int = 256 << 20
    """Bytes of one picture, caption file, line or cell as the input stores it; a larger one is
    rejected without being read."""
    reject_limit: float = 0.01
    """Share of the items that may be rejected; with more, no data set is made."""
    shard_bytes: int = 1 << 30
    """About how large a shard becomes, in bytes, estimated from a sample of the items. A process
    that is killed has to make its last shard again. Small inputs are cut into smaller shards, so
    that there is work for many processes."""

    def __post_init__(self):
        for name in (
            "height",
            "width",
            "vocab_size",
            "max_caption",
            "max_item_bytes",
            "shard_bytes",
        ):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.channels in MODES, f"channels={self.channels} must be 1 or 3")
        for name in ("held_out", "reject_limit"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be in 0..1")
