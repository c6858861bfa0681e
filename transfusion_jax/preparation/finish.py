"""Assembly: the accounts of all shards become one data set."""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from transfusion_jax.errors import WorkFailed
from transfusion_jax.files import write_atomic
from transfusion_jax.preparation.ledger import gather, keep_rejected
from transfusion_jax.preparation.shards import Settings
from transfusion_jax.preparation.workers import Job

if TYPE_CHECKING:
    from transfusion_jax.autoencoder.codec import Codec

FORMAT = 1


class PreparationFailed(WorkFailed):
    """The work ran, and its outcome is no data set."""


def assemble(
    job: Job, shards: int, reject_limit: float, identity: dict, codec: Codec | None
) -> dict[str, Any]:
    """Writes all that a data set is besides its shards, dataset.json last, and returns its content.

    Raises:
      PreparationFailed: more items were rejected than may be, or none is left.
    """
    out, settings, accounts = job.out, job.settings, gather(job.account(k) for k in range(shards))
    write_atomic(out / "ledger.json", as_json(accounts.ledger))
    keep_rejected(accounts.rejections, out)
    total = accounts.ledger["total"]
    if total["rejected"] > reject_limit * total["items"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in total["reasons"].items())
        raise PreparationFailed(
            f"{total['rejected']} of {total['items']} items were rejected ({reasons}), more than "
            f"reject_limit={reject_limit:g}; they are listed in {out / 'rejected.jsonl'}"
        )
    text, images, held_out = accounts.index.astype(np.int64)
    if len(text) == 0:
        raise PreparationFailed("no document is left")
    index = io.BytesIO()
    np.save(index, np.ascontiguousarray(accounts.index))
    write_atomic(out / "index.npy", index.getvalue())
    dataset = {
        "format": FORMAT,
        "documents": len(text),
        "held_out": int(held_out.sum()),
        "text_tokens": int(text.sum()),
        "images": int(images.sum()),
        "image": _image(settings, codec, accounts.moments),
        "tokenizer": {
            "entries": settings.tokenizer.size,
            "sha256": hashlib.sha256(settings.tokenizer.model).hexdigest(),
        },
        "shards": [{"name": job.shard(k).name, **shard} for k, shard in enumerate(accounts.shards)],
        "index_sha256": hashlib.sha256(index.getvalue()).hexdigest(),
        "ledger": total,
        "identity": identity,
    }
    if codec:
        from transfusion_jax.autoencoder.codec import save_codec

        latents = dataset["image"]
        save_codec(
            out / "autoencoder", codec.config, codec.parameters, latents["scale"], latents["shift"]
        )
    write_atomic(out / "dataset.json", as_json(dataset))
    return json.loads(as_json(dataset))


def _image(settings: Settings, codec: Codec | None, moments: np.ndarray) -> dict[str, Any]:
    """How images are stored, and for latents what a model is fed: (latent - shift) * scale."""
    pixels = [settings.height, settings.width, settings.channels]
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
        "shape": list(codec.latent_shape(settings.height, settings.width)),
        "autoencoder": codec.digest,
        "measured_mean": mean,
        "measured_std": std,
        "shift": codec.shift if own else mean,
        "scale": codec.scale if own else 1 / std,
    }


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
        errors="backslashreplace"
    )
