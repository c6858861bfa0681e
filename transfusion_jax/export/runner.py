"""Runs a model exported as StableHLO: writes text and draws images with jax and flatbuffers alone.

    python run.py --prompt "a handwritten seven" --out out

The directory of this file holds all it needs: `prefill`, `decode`, `denoise` and `step` as
`jax.export` artefacts, their weights in safetensors, `tokenizer.model`, and `run.json`, which says
how they go together. Nothing of the package that trained the model is needed.

    prefill(weights, tokens, length, images, image_start, timestep, k, v) -> logits, k, v
    decode(weights, token, length, k, v)                                  -> logits, k, v
    denoise(weights, image, timestep, length, k, v)                       -> prediction, k, v
    step(image, prediction, timestep, next timestep, noise)               -> image
    picture(weights, image)                                               -> picture

`k` and `v` are the cache, [layers, rows, capacity, heads, head width], of which a row has `length`
entries. `denoise` writes an image's entries after them; each step overwrites those of the one
before. `picture` is there where an autoencoder makes pictures of images. Where images are codes,
and in a model of text alone, there is no `denoise` and no `step`, and `prefill` takes no images:
code k is the token `vocabulary` + k.
"""

import argparse
import importlib.util
import json
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from transfusion_jax.export.runner_tokenizer import Tokenizer

LEAST, MOST, MOST_TOKENS = 1e-6, 1e6, 1 << 20  # of settings that are not 0, as in training's config
DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "I32": np.int32}


def read_weights(directory: Path, prefix: str) -> dict:
    """All tensors of the safetensors files of that name, mapped, then put on the device."""
    weights = {}
    for file in sorted(directory.glob(f"{prefix}*.safetensors")):
        with file.open("rb") as opened:
            size = struct.unpack("<Q", opened.read(8))[0]
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        data = np.memmap(file, np.uint8, "r", 8 + size)
        for name, about in header.items():
            begin, end = about["data_offsets"]
            array = data[begin:end].view(DTYPES[about["dtype"]]).reshape(about["shape"])
            weights[name] = jnp.asarray(array)
    return weights


class Model:
    """What the directory holds, ready to be called."""

    def __init__(self, directory: Path):
        self.about = json.loads((directory / "run.json").read_text())
        self.tokenizer = Tokenizer(directory / "tokenizer.model")
        self.weights = read_weights(directory, "model")
        self.autoencoder = read_weights(directory, "autoencoder")
        for name in self.about["programs"]:
            exported = export.deserialize((directory / f"{name}.jax_export").read_bytes())
            taken_over = (3, 4) if name == "decode" else ()  # the cache, of which it gives the next
            setattr(self, name, jax.jit(exported.call, donate_argnums=taken_over))

    def cache(self, length: int) -> tuple:
        """An empty cache for a row of so many positions."""
        length = max(length, self.about["least_capacity"])
        shape = (self.about["layers"], 1, length, *self.about["cache"])
        return tuple(jnp.zeros(shape, self.about["dtype"]) for _ in "kv")

    def read(self, tokens: list[int], images: list[np.ndarray], cache: tuple) -> tuple:
        """A document, at each BOI of which one of the images [h, w, c] follows: the logits at its
        end, its length, and the cache that holds it."""
        about, ids, starts = self.about, [], []
        for token in tokens:
            ids.append(token)
            if token == about["boi"] and len(starts) < len(images):
                ids += [*self.tokens_of(images[len(starts)]), about["eoi"]]
                starts.append(len(ids) - about["patches"] - 1)
        length = len(ids)
        ids += [0] * (-length % about["block"])
        rows = [np.asarray([ids], np.int32), np.asarray([length], np.int32)]
        if "denoise" in about["programs"]:
            shown = np.zeros((1, max(len(images), 1), *about["image"]), np.float32)
            shown[0, : len(images)] = images if images else 0
            starts += [len(ids)] * (not images)
            rows += [shown, np.asarray([starts], np.int32), np.int32(about["context_timestep"])]
        logits, *cache = self.prefill(self.weights, *rows, *cache)
        return logits, length, cache

    def tokens_of(self, image_hwc: np.ndarray) -> list[int]:
        """Where images are codes, an image's tokens; else what holds its place."""
        if not self.about["codes"]:
            return [0] * self.about["patches"]
        return (self.about["vocabulary"] + image_hwc.reshape(-1).astype(int)).tolist()

    def generate(
        self,
        prompt: list[int],
        images: Sequence[np.ndarray] = (),
        seed: int = 0,
        row: int = 0,
        draw: bool = False,
        **asked: float | None,
    ) -> Iterator[str | np.ndarray]:
        """Continues a document of text ids and images; yields texts and images [h, w, c].

        Args:
          prompt: ids, with BOI where an image of `images` is.
          row: of several answers to one prompt, which.
          asked: settings instead of those of run.json.
        """
        about = {**self.about, **asked}
        paint = self.write_codes if about["codes"] else self.denoised
        boi, eos, span = about["boi"], about["eos"], about["patches"] + 2
        tokens = [about["bos"], *prompt]
        key = jax.random.fold_in(jax.random.key(np.uint32(seed)), row)
        length = len(tokens) + len(images) * (span - 1)
        cache = self.cache(length + -length % about["block"] + about["max_tokens"] + span)
        logits, length, cache = self.read(tokens, list(images), cache)
        limit, written = length + about["max_tokens"], []
        continued = bool(self.tokenizer.decode(prompt[-1:], True))  # a text, not an image
        barred_1V = np.isin(np.arange(about["vocabulary"]), about["never"])[None]
        while True:
            room = limit - length
            barred_1V[0, boi] = room < span or boi in about["never"]
            allowed = jnp.where(barred_1V, -jnp.inf, logits[:, : about["vocabulary"]])
            token = boi if draw else int(_choose(allowed, key, length, about["temperature"]))
            draw = False
            if token in (boi, eos) or room <= 0:
                if text := self.tokenizer.decode(written, continued):
                    yield text
                written, continued = [], False
                if token != boi or room <= 0:
                    return
            else:
                written.append(token)
            logits, length, cache = self._add(token, length, cache)
            if token == boi:
                place = jax.random.fold_in(key, length)
                image, cache = paint((logits, length, cache), place, about)
                yield image
                length += about["patches"]
                logits, length, cache = self._add(about["eoi"], length, cache)

    def denoised(self, context: tuple, key: jax.Array, about: dict) -> tuple:
        """An image [h, w, c] after a context (logits, length and cache) that ends in BOI; and the
        cache that holds it, as what follows is to see it."""

        def noise(i):
            return jax.random.normal(jax.random.fold_in(key, i), tuple(about["image"]))[None]

        def predict(x, t, _, length, cache):
            return self.denoise(self.weights, x, jnp.int32(t), jnp.full(1, length, "int32"), *cache)

        contexts = self._contrasted(context, about)
        steps = about["steps"]
        path = np.round(np.linspace(about["timesteps"] - 1, -1, steps + 1)).astype(np.int32)
        x = noise(steps)
        for i in range(steps):
            predicted = _guided([predict(x, path[i], *each)[0] for each in contexts], about)
            x = self.step(x, predicted, path[i], path[i + 1], noise(i))
        _, *cache = predict(x, about["context_timestep"], *context)
        return np.asarray(x[0]), cache

    def write_codes(self, context: tuple, key: jax.Array, about: dict) -> tuple:
        """As `denoised`, where an image is codes, written one after another."""
        contexts, codes = self._contrasted(context, about), []
        for i in range(about["patches"]):
            logits = _guided([each[0][:, about["vocabulary"] :] for each in contexts], about)
            codes.append(int(_choose(logits, key, i, about["image_temperature"])))
            token = about["vocabulary"] + codes[-1]
            contexts = [self._add(token, *each[1:]) for each in contexts]
        return np.float32(codes).reshape(about["image"]), contexts[0][2]

    def _contrasted(self, context, about: dict) -> list:
        """The context, and with guidance that of an image that nothing comes before."""
        if about["guidance"] == 1:
            return [context]
        return [context, self.read([about["bos"], about["boi"]], [], self.cache(about["block"]))]

    def picture_of(self, image_hwc: np.ndarray) -> np.ndarray:
        """The picture [H, W, C] in [-1, 1] of an image of the model's."""
        made = "picture" in self.about["programs"]
        return np.asarray(self.picture(self.autoencoder, image_hwc[None]))[0] if made else image_hwc

    def _add(self, token: int, length: int, cache):
        """As `read`, one token after what is in a cache."""
        row = np.int32([token]), np.int32([length])
        logits, *cache = self.decode(self.weights, *row, *cache)
        return logits, length + 1, cache


def _choose(logits, key, length: int, temperature: float):
    """The likeliest token at temperature 0, else one drawn with a key of its place."""
    if temperature == 0:
        return jnp.argmax(logits[0])
    return jax.random.categorical(jax.random.fold_in(key, length), logits[0] / temperature)


def _guided(found: list, about: dict):
    """Classifier-free guidance: what was found, away from what was found without context."""
    return found[0] if len(found) == 1 else found[1] + about["guidance"] * (found[0] - found[1])


def write_png(file: Path, picture_HWC: np.ndarray) -> None:
    """A picture in [-1, 1] with one or three channels as a PNG."""
    pixels = np.round((np.clip(picture_HWC, -1, 1) + 1) * 127.5).astype(np.uint8)
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels))
    content = b"\x89PNG\r\n\x1a\n"
    for data in (b"IHDR" + head, b"IDAT" + lines, b"IEND"):
        content += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    file.write_bytes(content)


def _conditions(about: dict, asked: dict, prompt: list, images: list, out: Path) -> list:
    """(what must hold, what is said where it does not) of a command."""
    set_to, codes = {**about, **asked}, about["codes"]
    draws = codes or "denoise" in about["programs"]
    span = about["patches"] + 2 if draws else 1
    length = 1 + len(prompt) + len(images) * (about["patches"] + 1)
    pixels = not codes and "picture" not in about["programs"]
    most = 1 if pixels else np.finfo(np.float32).max

    def in_range(name: str) -> tuple:
        value = set_to[name]
        return value == 0 or LEAST <= value <= MOST, f"--{name} must be 0 or in {LEAST}..{MOST:g}"

    return [
        (about["pictures"], "the model's images are no pixels, and no autoencoder came with it"),
        (draws or not (images or asked["draw"]), "the model reads and writes text alone"),
        (all(list(x.shape) == about["image"] for x in images),
         f"--image: its shape must be {about['image']}"),
        (all(np.isin(x, np.arange(codes)).all() for x in images) or not codes,
         f"--image: codes are from 0 to {codes - 1}"),
        (all((np.abs(x) <= most).all() for x in images),
         f"--image: values are from {-most:g} to {most:g}"),
        (set(prompt) <= set(range(about["eoi"] + 1)), f"--ids are from 0 to {about['eoi']}"),
        (length <= about["row_length"], f"{length} positions are more than {about['row_length']}"),
        (asked["num"] > 0, "--num must be at least 1"),
        (0 <= asked["seed"] < 2**32, "--seed must be in 0..2^32 - 1"),
        (0 < set_to["steps"] <= about["timesteps"], f"--steps are 1 to {about['timesteps']}"),
        in_range("guidance"),
        in_range("temperature"),
        (not out.exists() or out.is_dir(), f"--out {out} is a file"),
        (span <= set_to["max_tokens"] <= MOST_TOKENS,
         f"--max-tokens must be in {span}..{MOST_TOKENS}"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes text and draws images.")
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--ids", type=int, nargs="*", help="its token ids, instead of the text")
    parser.add_argument("--image", help="a .npy file, [h, w, c], of an image before the prompt")
    parser.add_argument("--draw", action="store_true", help="begin with an image")
    parser.add_argument("--num", type=int, default=1, help="how many continuations")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("guidance", "temperature", "steps", "max-tokens"):
        kind = float if name in ("guidance", "temperature") else int
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write to")
    asked = vars(parser.parse_args())
    text, ids, image, out = (asked.pop(name) for name in ("prompt", "ids", "image", "out"))
    if importlib.util.find_spec("flatbuffers") is None:
        parser.error("jax.export reads with flatbuffers: pip install flatbuffers")
    here, number = Path(__file__).parent, 0
    about = json.loads((here / "run.json").read_text())
    try:
        images = [np.asarray(np.load(image), np.float32)] if image else []
    except (EOFError, OSError, TypeError, ValueError) as error:
        parser.error(f"--image {image}: {error}")
    try:
        tokens = Tokenizer(here / "tokenizer.model").encode(text) if ids is None else ids
    except ValueError as error:
        parser.error(f"--prompt: {error}")
    prompt = [about["boi"]] * len(images) + tokens
    for holds, line in _conditions(about, asked, prompt, images, out):
        if not holds:
            parser.error(line)
    model = Model(here)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "outputs.jsonl").open("w") as file:
        for row in range(asked.pop("num")):
            spans = []
            for span in model.generate(prompt, images, row=row, **asked):
                drawn = not isinstance(span, str)
                spans.append({"image": f"{number}.png"} if drawn else {"text": span})
                if drawn:
                    write_png(out / f"{number}.png", model.picture_of(span))
                    number += 1
            for place in (file, sys.stdout):
                print(json.dumps({"prompt": text, "spans": spans}, ensure_ascii=False), file=place)


if __name__ == "__main__":
    main()
