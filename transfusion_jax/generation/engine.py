"""Generation of text and images in any mix, on one cache (section 3.4).

A request is a document that is not finished. Its row is in one of three states: TEXT, it samples tokens until
EOS or BOI; IMAGE, after BOI, it appends P patches of pure noise and denoises them in place, each step
overwriting the cache entries of the one before, then adds EOI and is back in TEXT; DONE. Rows of a batch go
through these at their own pace: a phase runs on all rows, but only those it concerns move on. What the others
write lies past their own length, where no interval reaches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder.codec import Codec, load_codec
from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.diffusion.process import process
from transfusion_jax.diffusion.sampler import sampler
from transfusion_jax.images import read_image
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.model.attention.platforms import for_platform
from transfusion_jax.model.transformer import KVCache
from transfusion_jax.model.transfusion import Transfusion, abstract_model
from transfusion_jax.pretraining.run import stored
from transfusion_jax.training.checkpoint import Report, load_average

TEXT, IMAGE, DONE = 0, 1, 2
BUCKET = 32  # prompts are padded to a multiple, so that few lengths are compiled


class Rows(NamedTuple):
    """Where every row of a batch stands."""

    cache: KVCache
    length_B: Array  # entries of the cache that count
    logits_BV: Array  # of the next position
    status_B: Array
    key_B: Array


@dataclass(frozen=True)
class Engine:
    """A model ready to generate. Everything is a function of (parameters, requests, seed)."""

    experiment: Experiment
    tokenizer: Tokenizer
    graph: nnx.GraphDef
    parameters: dict
    codec: Codec | None = None
    """The autoencoder of a run on latents; None: images are pixels."""

    def __post_init__(self):
        for name, static in (("_prefill", "capacity"), ("_decode", "budget"), ("_draw", None)):
            object.__setattr__(self, name, jax.jit(getattr(self, name), static_argnames=static))

    def generate(
        self, requests: Sequence[tuple[str | np.ndarray, ...]], seed: int = 0
    ) -> list[list]:
        """Continues every request, a sequence of texts and pictures [H, W, C] in [-1, 1], as one batch.

        Returns, for each, the new spans: texts and pictures. A request that reaches `max_tokens` ends there.
        """
        batch, length_B = self._prompts(requests)
        span = self.experiment.image.span
        prompt, budget = batch.tokens_BL.shape[1], self.experiment.sampler.max_tokens
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
            jnp.arange(len(requests))
        )
        rows = self._prefill(
            self.parameters, batch, length_B, keys, capacity=prompt + budget + span
        )
        limit_B = length_B + budget
        spans: list[list] = [[] for _ in requests]
        while (status_B := np.asarray(rows.status_B)).min() < DONE:
            if TEXT in status_B:
                rows, tokens_BT = self._decode(self.parameters, rows, limit_B, budget=budget)
                for row, tokens in enumerate(np.asarray(tokens_BT)):
                    if text := self.tokenizer.decode(tokens[tokens >= 0]):
                        spans[row].append(text)
            if IMAGE in (status_B := np.asarray(rows.status_B)):
                rows, image_Bhwc = self._draw(self.parameters, rows)
                for row in np.flatnonzero(status_B == IMAGE):
                    spans[row].append(self.picture(np.asarray(image_Bhwc[row])))
        return spans

    def picture(self, image_hwc: np.ndarray) -> np.ndarray:
        """An image of the model's as a picture [H, W, C] in [-1, 1]."""
        return image_hwc if self.codec is None else self.codec.picture(image_hwc)

    def image(self, picture_HWC: np.ndarray) -> np.ndarray:
        """A picture as an image of the model's [h, w, c]: itself, or the mean of its latent."""
        return picture_HWC if self.codec is None else self.codec.image(picture_HWC)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures it takes and gives."""
        image = self.experiment.image
        if self.codec is None:
            return image.shape
        factor = self.codec.config.downsampling
        return image.height * factor, image.width * factor, self.codec.config.channels

    def read(self, path: Path) -> np.ndarray:
        """A picture file, cropped and resized to `picture_shape`; raises ValueError if it cannot be read."""
        return read_image(path, *self.picture_shape)

    def check(self, requests: Sequence[tuple[str | np.ndarray, ...]]) -> None:
        """Raises ValueError for a request that is longer than a row."""
        self._prompts(requests)

    def _prompts(self, requests: Sequence[tuple[str | np.ndarray, ...]]) -> tuple[Batch, Array]:
        """`<s>` and the spans of every request as one padded batch, and the lengths."""
        documents = []
        for request in requests:
            spans = [Text([self.tokenizer.bos])]
            spans += [
                Text(self.tokenizer.encode(s)) if isinstance(s, str) else Image(self.image(s), 1)
                for s in request
            ]
            documents.append(
                sequence(Document(tuple(spans)), self.tokenizer, self.experiment.image.patches)
            )
        lengths = [len(document.tokens) for document in documents]
        if max(lengths) > self.experiment.data.row_length:
            raise ValueError(
                f"a prompt takes {max(lengths)} positions, more than data.row_length={self.experiment.data.row_length}"
            )
        padded = -(-max(lengths) // BUCKET) * BUCKET
        rows = [
            pack([(d, 0, n)], padded, self.experiment.image)
            for d, n in zip(documents, lengths, strict=True)
        ]
        return jax.tree.map(jnp.asarray, stack(rows)), jnp.asarray(lengths, jnp.int32)

    def _prefill(
        self, parameters: dict, batch: Batch, length_B: Array, key_B: Array, *, capacity: int
    ) -> Rows:
        """Runs the prompts, their images clean."""
        model = self._model(parameters)
        cache = KVCache.zeros(self.experiment.model, len(length_B), capacity)
        x_BLD = model.embed_batch(
            batch,
            batch.latents_BMhwc,
            jnp.full_like(batch.image_start_BM, self.experiment.sampler.context_timestep),
        )
        intervals = row_intervals(batch, self.experiment.image.patches)
        hidden, cache = model.transformer.extend(
            x_BLD, batch.position_BL, intervals, cache, jnp.zeros_like(length_B)
        )
        last = jnp.take_along_axis(hidden, (length_B - 1)[:, None, None], axis=1)
        return Rows(cache, length_B, model.logits(last)[:, 0], jnp.full_like(length_B, TEXT), key_B)

    def _decode(
        self, parameters: dict, rows: Rows, limit_B: Array, *, budget: int
    ) -> tuple[Rows, Array]:
        """Rows in TEXT sample until EOS, BOI or their limit. Also returns their text tokens, -1 elsewhere."""
        model, tokenizer = self._model(parameters), self.tokenizer
        never = np.zeros(self.experiment.model.vocab_size, bool)
        never[[tokenizer.bos, tokenizer.eoi]] = True  # given, never predicted
        never[tokenizer.size :] = True
        boi = np.arange(self.experiment.model.vocab_size) == tokenizer.boi

        def step(carry):
            i, rows, tokens_BT = carry
            active_B = rows.status_B == TEXT
            room_B = limit_B - rows.length_B
            barred_BV = never[None, :] | (
                boi[None, :] & (room_B < self.experiment.image.span)[:, None]
            )
            token_B = self._choose(jnp.where(barred_BV, -jnp.inf, rows.logits_BV), rows)
            ended_B = (token_B == tokenizer.eos) | (room_B <= 0)
            is_text_B = active_B & ~ended_B & (token_B != tokenizer.boi)
            tokens_BT = tokens_BT.at[:, i].set(jnp.where(is_text_B, token_B, -1))
            status_B = jnp.where(ended_B, DONE, jnp.where(token_B == tokenizer.boi, IMAGE, TEXT))
            rows = self._feed(model, rows, token_B, advance_B=active_B & ~ended_B)
            return (
                i + 1,
                rows._replace(status_B=jnp.where(active_B, status_B, rows.status_B)),
                tokens_BT,
            )

        tokens_BT = jnp.full((len(limit_B), budget + 1), -1, jnp.int32)
        _, rows, tokens_BT = jax.lax.while_loop(
            lambda carry: (carry[1].status_B == TEXT).any(), step, (jnp.int32(0), rows, tokens_BT)
        )
        return rows, tokens_BT

    def _choose(self, logits_BV: Array, rows: Rows) -> Array:
        """The next token: greedy at temperature 0, else a draw that depends on the row's key and length alone."""
        if self.experiment.sampler.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        draw = lambda key, length, logits: jax.random.categorical(
            jax.random.fold_in(key, length), logits
        )  # noqa: E731
        return jax.vmap(draw)(
            rows.key_B, rows.length_B, logits_BV / self.experiment.sampler.temperature
        ).astype(jnp.int32)

    def _draw(self, parameters: dict, rows: Rows) -> tuple[Rows, Array]:
        """Rows in IMAGE draw one, and are back in TEXT after EOI. Also returns the images [B, h, w, c]."""
        model, image = self._model(parameters), self.experiment.image
        B = len(rows.length_B)
        drawing_B = rows.status_B == IMAGE
        # Guidance contrasts the row with an image that nothing comes before: `<s> BOI`.
        empty = Rows(
            KVCache.zeros(self.experiment.model, B, 2 + image.patches), jnp.zeros_like(rows.length_B),
            rows.logits_BV, rows.status_B, rows.key_B,
        )  # fmt: skip
        for token in (self.tokenizer.bos, self.tokenizer.boi):
            empty = self._feed(
                model, empty, jnp.full((B,), token, jnp.int32), advance_B=jnp.ones((B,), bool)
            )

        def predict(x_Bhwc, t):
            conditional, _ = self._patches(model, rows, x_Bhwc, t)
            if self.experiment.sampler.guidance == 1:
                return conditional
            unconditional, _ = self._patches(model, empty, x_Bhwc, t)
            return unconditional + self.experiment.sampler.guidance * (conditional - unconditional)

        def noise(i):
            # A row's draws depend on its own key and position, not on the batch around it.
            def one(key, length):
                return jax.random.normal(
                    jax.random.fold_in(jax.random.fold_in(key, length), i), image.shape
                )

            return jax.vmap(one)(rows.key_B, rows.length_B)

        steps = sampler(self.experiment.sampler, process(self.experiment.diffusion))
        image_Bhwc = steps.sample(noise(steps.steps), predict, noise)
        # What follows sees the clean image.
        _, cache = self._patches(
            model, rows, image_Bhwc, jnp.int32(self.experiment.sampler.context_timestep)
        )
        rows = rows._replace(
            cache=cache, length_B=rows.length_B + jnp.where(drawing_B, image.patches, 0)
        )
        rows = self._feed(
            model, rows, jnp.full((B,), self.tokenizer.eoi, jnp.int32), advance_B=drawing_B
        )
        return rows._replace(status_B=jnp.where(drawing_B, TEXT, rows.status_B)), image_Bhwc

    def _patches(
        self, model: Transfusion, rows: Rows, x_Bhwc: Array, t: Array
    ) -> tuple[Array, KVCache]:
        """Runs one image of every row at [length, length + P): its prediction, and the cache with it in."""
        P, start_B = self.experiment.image.patches, rows.length_B
        t_B1 = jnp.broadcast_to(t, (len(start_B), 1))
        x_BPD = model.patches.encode(x_Bhwc[:, None], t_B1)[:, 0]
        position_BP = start_B[:, None] + jnp.arange(P, dtype=jnp.int32)[None, :]
        end_BP = jnp.broadcast_to((start_B + P)[:, None], position_BP.shape)
        intervals = Intervals(jnp.zeros_like(end_BP), end_BP)
        hidden_BPD, cache = model.transformer.extend(
            x_BPD, position_BP, intervals, rows.cache, start_B
        )
        return model.patches.decode(hidden_BPD[:, None])[:, 0], cache

    def _feed(self, model: Transfusion, rows: Rows, token_B: Array, *, advance_B: Array) -> Rows:
        """Runs one token of every row; only rows in `advance` keep it."""
        at_B1 = rows.length_B[:, None]
        hidden_B1D, cache = model.transformer.extend(
            model.embed(token_B[:, None]),
            at_B1,
            Intervals(jnp.zeros_like(at_B1), at_B1 + 1),
            rows.cache,
            rows.length_B,
        )
        logits_BV = jnp.where(advance_B[:, None], model.logits(hidden_B1D)[:, 0], rows.logits_BV)
        return rows._replace(
            cache=cache, length_B=rows.length_B + advance_B.astype(jnp.int32), logits_BV=logits_BV
        )

    def _model(self, parameters: dict) -> Transfusion:
        return nnx.merge(self.graph, parameters)

    def using(self, **changes: object) -> "Engine":
        """The same model with other sampler settings; raises ValueError for those that cannot work."""
        sampler_config = replace(self.experiment.sampler, **changes)
        return replace(self, experiment=replace(self.experiment, sampler=sampler_config))


def load_engine(directory: Path, report: Report) -> tuple[Engine, int]:
    """The averaged model of a run's newest readable checkpoint, on one device, and its step.

    Raises:
      ValueError: `directory` is no run directory, or has no checkpoint yet.
      CheckpointError: none of its checkpoints can be read.
    """
    experiment, tokenizer = stored(directory)
    device = jax.local_devices()[0]
    # Layers are not rematerialised here, and a model may be used on another platform than it was trained on.
    model = replace(experiment.model, remat="none")
    try:
        model = for_platform(model, device.platform)
    except ValueError as error:
        report(f"{error}; using auto")
        model = for_platform(replace(model, attention="auto"), device.platform)
    experiment = replace(experiment, model=model)
    graph, parameters = abstract_model(experiment)
    one = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), nnx.to_pure_dict(parameters)
    )
    step, average = load_average(directory / "checkpoints", abstract, report)
    codec = load_codec(directory / "autoencoder") if (directory / "autoencoder").is_dir() else None
    return Engine(experiment, tokenizer, graph, average, codec), step
