"""An exported Transfusion in PyTorch: what its tensors mean, with torch and safetensors alone.

    transfusion-jax export runs/digits --format safetensors --out out/digits
    python examples/torch_reference.py out/digits 1 480

Written to be read, not to be fast: it keeps no cache, and runs the whole document again for every
token and every denoising step. It works on token ids, BOS first (1; 480 is BOI, which begins an
image); `tokenizer.model` in the export is a sentencepiece model. Images are what the model sees:
pixels in [-1, 1], or scaled latents.

Shapes: B rows, L positions, D width, N heads, K of keys and values, V vocabulary, M images in a
row, P patches of an image, [h, w, c] an image.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

Noise = Callable[[int, int], Tensor]
"""noise(position, i): standard normal noise [h, w, c] of denoising step i of the image whose first
patch is at a position. The image starts from that of i = number of steps."""


class Model:
    """The weights in a directory, in float32; SystemExit if they are of another kind of model."""

    def __init__(self, directory: Path):
        config = json.loads((directory / "config.json").read_text())
        image, rope = config.get("image_config", {}), config["text_config"]["rope_parameters"]
        kind = [image.get("patch_encoder"), image.get("experts"), rope["rope_type"]]
        if kind != ["linear", "shared", "default"]:
            text = f"{directory}: patches, weights and RoPE are {kind}, not linear, shared, default"
            raise SystemExit(text)
        self.config, self.text, self.image = config, config["text_config"], image
        self.diffusion = config["diffusion_config"]
        self.generation = json.loads((directory / "generation_config.json").read_text())
        self.bos, self.eos, self.boi, self.eoi = (
            config[f"{name}_token_id"] for name in ("bos", "eos", "boi", "eoi")
        )
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        self.weights: dict[str, Tensor] = {}
        for file in sorted(set(index["weight_map"].values())):
            for name, tensor in load_file(directory / file).items():
                self.weights[name] = tensor.float()
        self.shape = tuple(self.image[name] for name in ("height", "width", "channels"))
        self.patches = self.shape[0] * self.shape[1] // self.image["patch_size"] ** 2

    def __call__(
        self, tokens: Tensor, segment: Tensor, position: Tensor, noisy: Tensor, t: Tensor,
        start: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits [B, L, V] of packed rows, and what is predicted of their images, [B, M, h, w, c].

        Args:
          tokens: [B, L] ids; anything at patches.
          segment, position: [B, L] number of the document, and place in it.
          noisy: [B, M, h, w, c] images, at the timesteps t [B, M].
          start: [B, M] first patch of an image; L or more where there is none.
        """
        B, L = tokens.shape
        images = (start < L).nonzero().tolist()
        x = self.weights["model.embed_tokens.weight"][tokens]
        vectors, here = self.encode(noisy, t), torch.arange(L)
        end = (here + 1).expand(B, L).clone()  # a position sees those of its document before it,
        for b, m in images:
            patches = slice(start[b, m], start[b, m] + self.patches)
            x[b, patches] = vectors[b, m]
            if self.image["attention"] == "bidirectional":  # and a patch all of its image
                end[b, patches] = patches.stop
        sees = (segment[:, :, None] == segment[:, None]) & (here < end[:, :, None])
        for layer in range(self.text["num_hidden_layers"]):
            x = self.block(f"model.layers.{layer}", x, position, sees)
        x = self.rms_norm("model.norm", x)
        predicted = torch.zeros_like(noisy)
        for b, m in images:
            predicted[b, m] = self.decode(x[b, start[b, m] : start[b, m] + self.patches])
        return self.linear("lm_head", x), predicted

    def encode(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Images [B, M, h, w, c] at timesteps t [B, M] as vectors [B, M, P, D]."""
        name, k, (h, w, c) = "model.patches", self.image["patch_size"], self.shape
        frequency = 0.1 * 10_000.0 ** (-torch.arange(128) / 128)
        angle = t[..., None] * frequency
        time = self.linear(f"{name}.time_in", torch.cat([angle.cos(), angle.sin()], -1))
        time = self.linear(f"{name}.time_out", F.silu(time))[:, :, None]
        x = noisy.reshape(*t.shape, h // k, k, w // k, k, c).transpose(3, 4)
        x = x.reshape(*t.shape, self.patches, k * k * c)
        if self.image["timestep"] == "before":
            x = x + self.linear(f"{name}.time_patch", F.silu(time))
            x = self.linear(f"{name}.in_proj", x)
        else:
            x = self.linear(f"{name}.in_proj", x) + time
        return x + self.weights.get(f"{name}.position.weight", torch.zeros(()))

    def decode(self, x: Tensor) -> Tensor:
        """The transformer's output [P, D] of an image as its prediction [h, w, c]."""
        k, (h, w, c) = self.image["patch_size"], self.shape
        x = self.linear("model.patches.out_proj", x).reshape(h // k, w // k, k, k, c)
        return x.transpose(1, 2).reshape(h, w, c)

    def block(self, name: str, x: Tensor, position: Tensor, sees: Tensor) -> Tensor:
        """Norms are before attention and feed-forward layer, or ("post") after them."""

        def add(x: Tensor, norm: str, layer: Callable[[Tensor], Tensor]) -> Tensor:
            if self.text["norm_placement"] == "pre":
                return x + layer(self.rms_norm(f"{name}.{norm}", x))
            return x + self.rms_norm(f"{name}.{norm}", layer(x))

        x = add(x, "input_layernorm", lambda x: self.attention(name, x, position, sees))
        return add(x, "post_attention_layernorm", lambda x: self.mlp(f"{name}.mlp", x))

    def attention(self, name: str, x: Tensor, position: Tensor, sees: Tensor) -> Tensor:
        name, N = f"{name}.self_attn", self.text["num_attention_heads"]
        K = self.text["num_key_value_heads"]
        q, k, v = (
            self.linear(f"{name}.{part}_proj", x).reshape(*x.shape[:2], heads, -1)
            for part, heads in (("q", N), ("k", K), ("v", K))
        )
        if self.text["qk_norm"]:
            q, k = self.head_norm(f"{name}.q_norm", q), self.head_norm(f"{name}.k_norm", k)
        q, k, v = self.rotated(q, position), self.rotated(k, position), v.transpose(1, 2)
        k, v = (part.repeat_interleave(N // K, 1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None])
        return self.linear(f"{name}.o_proj", out.transpose(1, 2).flatten(2))

    def rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """[B, L, heads, H] as [B, heads, L, H], the pairs (x_i, x_{i + H/2}) rotated."""
        (first, second), H = x.transpose(1, 2).chunk(2, -1), x.shape[-1]
        angle = position[:, None, :, None] * self.text["rope_theta"] ** (-torch.arange(0, H, 2) / H)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", F.silu(gate) * up)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        square = x.square().mean(-1, keepdim=True) + self.text["rms_norm_eps"]
        return x * square.rsqrt() * self.weights[f"{name}.weight"]

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.text["rms_norm_eps"])

    @torch.no_grad()
    def write(self, ids: list[int], noise: Noise, images: tuple = ()) -> list[list[int] | Tensor]:
        """The likeliest text, and images, in order: lists of ids, and [h, w, c].

        An image in `ids` is BOI, P times anything, EOI; if they end in BOI, one is drawn first.
        """
        ids, images, spans = list(ids), list(images), []
        limit = len(ids) - (ids[-1] == self.boi) + self.generation["max_new_tokens"]
        while True:
            if ids[-1] == self.boi:
                images.append(self.draw(ids, images, noise))
                spans.append(images[-1])
                ids += [0] * self.patches + [self.eoi]
            token = self.next(ids, images, limit - len(ids))
            if token == self.eos or len(ids) >= limit:
                return spans
            ids.append(token)
            if token != self.boi:
                if not spans or isinstance(spans[-1], Tensor):
                    spans.append([])
                spans[-1].append(token)

    def next(self, ids: list[int], images: list[Tensor], room: int) -> int:
        """The likeliest id; never BOS or EOI, nor an image that has no room."""
        logits, _ = self.run(ids, images, self.generation["image_sampler"]["context_timestep"])
        logits[[self.bos, self.eoi] + [self.boi] * (room < self.patches + 2)] = -torch.inf
        return int(logits[: self.config["tokenizer_size"]].argmax())

    def draw(self, ids: list[int], images: list[Tensor], noise: Noise) -> Tensor:
        """An image after `ids`, along evenly spaced timesteps from T - 1 to -1, which is clean;
        DDIM or DDPM (Song et al. 2021, equation 12, with eta 0 or 1)."""
        sampler, start, patches = self.generation["image_sampler"], len(ids), [0] * self.patches
        T, kind = self.diffusion["num_train_timesteps"], self.diffusion["prediction_type"]
        path = torch.linspace(T - 1, -1, sampler["steps"] + 1, dtype=torch.float64).round().long()
        alpha, sigma = (table[path + 1] for table in schedule(self.diffusion))
        x = noise(start, sampler["steps"])
        for i in range(sampler["steps"]):
            _, predicted = self.run(ids + patches, [*images, x], path[i])
            if sampler["guidance"] != 1:
                _, empty = self.run([self.bos, self.boi, *patches], [x], path[i])
                predicted = empty + sampler["guidance"] * (predicted - empty)
            clean, epsilon = split(kind, x, predicted, alpha[i], sigma[i])
            if sampler["clip"]:
                clean = clean.clamp(-sampler["clip"], sampler["clip"])
                epsilon = (x - alpha[i] * clean) / sigma[i]
            ratio = alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])
            c = (sampler["kind"] == "ddpm") * sigma[i + 1] * (1 - ratio**2).clamp(min=0).sqrt()
            kept = (sigma[i + 1] ** 2 - c**2).clamp(min=0).sqrt()
            x = alpha[i + 1] * clean + kept * epsilon + c * noise(start, i)
        return x

    def run(self, ids: list[int], images: list[Tensor], t: int) -> tuple[Tensor, Tensor | None]:
        """Logits after the last id, and what is predicted of the last image, which is at timestep
        t; those before it are seen clean, at `context_timestep`."""
        seen_at = self.generation["image_sampler"]["context_timestep"]
        logits, predicted = self(
            torch.tensor([ids]),
            torch.ones(1, len(ids)),
            torch.arange(len(ids))[None],
            torch.stack([*images, torch.zeros(self.shape)])[None],  # and an empty slot
            torch.tensor([[seen_at] * (len(images) - 1) + [t] * 2])[:, : len(images) + 1],
            torch.tensor([[i + 1 for i, n in enumerate(ids) if n == self.boi] + [len(ids)]]),
        )
        return logits[0, -1], predicted[0, -2] if images else None


def schedule(config: dict) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the timesteps -1 ... T - 1, in x_t = alpha x_0 + sigma epsilon."""
    T, kind = config["num_train_timesteps"], config["schedule"]
    u = torch.arange(T + 1, dtype=torch.float64) / T
    if kind == "cosine":
        f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
        beta = 1 - f[1:] / f[:-1]
    else:
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    kept = torch.cat([torch.ones(1), torch.cumprod(1 - beta.clamp(max=0.999), 0)])
    order = 1 if kind == "flow" else 2
    alpha, sigma = (1 - u, u) if kind == "flow" else (kept.sqrt(), (1 - kept).sqrt())
    sigma = sigma / config["snr_scale"] ** 0.5
    norm = (alpha**order + sigma**order) ** (1 / order)
    return (alpha / norm).float(), (sigma / norm).float()


def split(kind: str, x: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 and epsilon: x = alpha x_0 + sigma epsilon, the prediction is y = p x_0 + q epsilon."""
    p, q = {"epsilon": (0, 1), "x": (1, 0), "v": (-sigma, alpha), "flow": (-1, 1)}[kind]
    n = alpha * q - sigma * p
    clean = (q * x - sigma * y) / n if n != 0 else torch.zeros_like(x)
    return clean, y if kind == "epsilon" else (alpha * y - p * x) / n


if __name__ == "__main__":
    directory, *asked = sys.argv[1:]
    model = Model(Path(directory))
    for span in model.write(list(map(int, asked)), lambda *_: torch.randn(model.shape)):
        print(span)
