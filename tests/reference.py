"""The whole method in plain torch and float64: model, losses, optimizer, average, sampler.

Written from the paper (arXiv 2408.11039) and the project's documented choices by someone who had
not read the package, and importing nothing of it. Loops wherever they make a line obviously right;
nothing is cached: every prediction runs over the whole document again.

Parameters are a dict from dotted name to tensor; those of the blocks have the layers on axis 0.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """What the parameters' shapes do not tell."""

    boi: int
    eoi: int
    eos: int
    image: tuple[int, int, int]  # rows, columns, channels
    patch: int  # pixels along one side of a patch
    timestep: str  # "before" or "after": where the timestep joins a patch
    patch_position: str  # "rope" or "learned"
    theta: float
    T: int  # timesteps of the diffusion
    image_weight: float = 5.0  # lambda
    peak_rate: float = 3e-4
    final_rate: float = 1.5e-5
    warmup: int = 4000
    train_steps: int = 250_000
    decay: float = 0.1
    clip_norm: float = 1.0
    average: float = 0.9999
    sampler: str = "ddpm"  # or "ddim"
    sampler_steps: int = 250
    guidance: float = 3.0
    clip: float = 0.0  # bound on the predicted clean image; 0 means none
    context_timestep: int = 0  # at which a finished image is shown


@dataclass(frozen=True)
class Image:
    """An image as the model sees it, [rows, columns, channels], and the noise that is in it."""

    values: torch.Tensor
    timestep: int
    noise: torch.Tensor | None = None


@dataclass(frozen=True)
class Document:
    """Token ids and images, in order; the first `silent` of them are not learned from."""

    items: list
    silent: int = 0


@dataclass(frozen=True)
class Position:
    """One place of a row: a token, or one patch of one image."""

    document: int  # which document of the row
    place: int  # counted from the start of the document
    token: int | None = None
    image: int | None = None  # which image of the row
    patch: int | None = None  # which patch of that image
    weight: float = 1.0  # of the prediction of the next token


def level(config, t):
    """How much of the image and of the noise is left at timestep t; -1 is the clean image.

    The cosine schedule of Nichol & Dhariwal (2021), each beta at most 0.999.
    """

    def f(u):
        return math.cos((u / config.T + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = 1.0
    for step in range(t + 1):
        beta = min(1 - f(step + 1) / f(step), 0.999)
        alpha_bar = alpha_bar * (1 - beta)
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def noised(config, clean, t, noise):
    alpha, sigma = level(config, t)
    return Image(alpha * clean + sigma * noise, t, noise)


def corners(config):
    """Top left corners of an image's patches, left to right, then top to bottom."""
    height, width, _ = config.image
    return [(y, x) for y in range(0, height, config.patch) for x in range(0, width, config.patch)]


def positions(config, row):
    """The positions of a row, a list of documents, and its images."""
    found, images = [], []
    for d, document in enumerate(row):
        place = 0
        for number, item in enumerate(document.items):
            if isinstance(item, Image):
                for p in range(len(corners(config))):
                    found.append(Position(d, place, image=len(images), patch=p, weight=0.0))
                    place += 1
                images.append(item)
            else:
                weight = 0.0 if number < document.silent or item == config.boi else 1.0
                found.append(Position(d, place, token=item, weight=weight))
                place += 1
    return found, images


def sees(i, j):
    """Whether position i sees position j."""
    same_image = i.image is not None and i.image == j.image
    return i.document == j.document and (j.place <= i.place or same_image)


def silu(x):
    return x / (1 + torch.exp(-x))


def rms_norm(x, scale):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * scale


def rotate(x, places, theta):
    """RoPE on one head, [position, H]: value i and value i + H/2 turn together."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / (2 * half)) for i in range(half)]).to(x)
    angles = torch.tensor(places).to(x)[:, None] * frequencies
    a, b, cos, sin = x[:, :half], x[:, half:], torch.cos(angles), torch.sin(angles)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attention(each, shapes, x, seen, places, theta):
    heads, size = shapes["attention.q_DNH"].shape[1:]
    group = heads // shapes["attention.k_DKH"].shape[1]
    result = torch.zeros_like(x)
    for n in range(heads):
        query = rotate(each(lambda w, n=n: x @ w["attention.q_DNH"][:, n]), places, theta)
        k = n // group
        key = rotate(each(lambda w, k=k: x @ w["attention.k_DKH"][:, k]), places, theta)
        value = each(lambda w, k=k: x @ w["attention.v_DKH"][:, k])
        scores = (query @ key.T / math.sqrt(size)).masked_fill(~seen, -math.inf)
        found = torch.softmax(scores, -1) @ value
        result = result + each(lambda w, n=n, found=found: found @ w["attention.out_NHD"][n])
    return result


def transformer(params, x, patch, seen, places, theta):
    """`patch` says which positions are patches: in a mixture of transformers (Liang et al. 2024)
    these have weights of their own, else those of all."""

    def weights(prefix, layer):
        return {
            name.removeprefix(prefix): value[layer]
            for name, value in params.items()
            if name.startswith(prefix)
        }

    def norm(x, name):
        return each(lambda w: rms_norm(x, w[name]))

    def each(f):
        return torch.where(patch[:, None], f(image), f(text))

    own = "image_" if "transformer.image_norm.scale" in params else ""
    for layer in range(len(params["transformer.blocks.mlp_norm.scale"])):
        text = weights("transformer.blocks.", layer)
        image = weights(f"transformer.{own}blocks.", layer)
        y = norm(x, "attention_norm.scale")
        x = x + attention(each, text, y, seen, places, theta)
        y = norm(x, "mlp_norm.scale")
        gated = silu(each(lambda w, y=y: y @ w["mlp.gate_DF"]))
        gated = gated * each(lambda w, y=y: y @ w["mlp.up_DF"])
        x = x + each(lambda w, gated=gated: gated @ w["mlp.down_FD"])
    text = {"scale": params["transformer.norm.scale"]}
    image = {"scale": params[f"transformer.{own}norm.scale"]}
    return norm(x, "scale")


def patch_vectors(params, config, image):
    """What the transformer gets for an image: [patch, D]."""
    k = config.patch
    values = torch.stack([image.values[y : y + k, x : x + k].flatten() for y, x in corners(config)])
    angles = [image.timestep * 0.1 * 10_000 ** (-j / 128) for j in range(128)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).to(values)
    embedding = silu(waves @ params["patches.time_in"]) @ params["patches.time_out_DD"]
    if config.timestep == "before":
        values = values + silu(embedding) @ params["patches.time_patch_DZ"]
    vectors = values @ params["patches.in_ZD"]
    if config.timestep == "after":
        vectors = vectors + embedding
    if config.patch_position == "learned":
        vectors = vectors + params["patches.position_PD"]
    return vectors


def predicted_noise(params, config, hidden):
    """The noise in an image, from the hidden states [patch, D] of its patches."""
    k = config.patch
    noise = torch.zeros(config.image, dtype=hidden.dtype)
    for (y, x), vector in zip(corners(config), hidden @ params["patches.out_DZ"], strict=True):
        noise[y : y + k, x : x + k] = vector.reshape(k, k, config.image[2])
    return noise


def forward(params, config, row):
    """Hidden states [position, D], logits [position, V] and one predicted noise per image."""
    found, images = positions(config, row)
    image_vectors = [patch_vectors(params, config, image) for image in images]
    x = torch.stack(
        [
            params["embedding_VD"][p.token] if p.image is None else image_vectors[p.image][p.patch]
            for p in found
        ]
    )
    seen = torch.tensor([[sees(i, j) for j in found] for i in found])
    patch = torch.tensor([p.image is not None for p in found])
    hidden = transformer(params, x, patch, seen, [p.place for p in found], config.theta)
    noises = []
    for number in range(len(images)):
        own = [n for n, p in enumerate(found) if p.image == number]
        noises.append(predicted_noise(params, config, hidden[own]))
    return hidden, hidden @ params["output_DV"], noises


def losses(params, config, rows):
    """Total, text and image loss of a batch, a list of rows."""
    text, weights, image, images = 0.0, 0.0, 0.0, 0
    for row in rows:
        found, row_images = positions(config, row)
        _, logits, noises = forward(params, config, row)
        for n, (here, after) in enumerate(zip(found[:-1], found[1:], strict=True)):
            if here.document == after.document and here.weight > 0:
                text = text - here.weight * torch.log_softmax(logits[n], -1)[after.token]
                weights += here.weight
        for given, noise in zip(row_images, noises, strict=True):
            image = image + ((noise - given.noise) ** 2).mean()
            images += 1
    text, image = text / max(weights, 1), image / max(images, 1)
    return text + config.image_weight * image, text, image


def learning_rate(config, n):
    """Of the step that follows n earlier ones."""
    if n < config.warmup:
        return config.peak_rate * n / config.warmup
    progress = min((n - config.warmup) / (config.train_steps - config.warmup), 1)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return config.final_rate + (config.peak_rate - config.final_rate) * fall


def train_step(config, rows, n, params, first, second, average):
    """The step that follows n earlier ones: clipping, AdamW (both moments given), average.

    Returns the losses, the gradients, and then `params`, `first`, `second` and `average` anew.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    batch_losses = losses(leaves, config, rows)
    gradients = torch.autograd.grad(batch_losses[0], list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(value) if g is None else g
        for (name, value), g in zip(params.items(), gradients, strict=True)
    }
    norm = math.sqrt(sum((g**2).sum().item() for g in gradients.values()))
    keep = min(config.average, (1 + n) / (10 + n))
    new_params, new_first, new_second, new_average = {}, {}, {}, {}
    for name, param in params.items():
        g = gradients[name] * min(1, config.clip_norm / norm)
        new_first[name] = m = 0.9 * first[name] + 0.1 * g
        new_second[name] = v = 0.95 * second[name] + 0.05 * g**2
        update = (m / (1 - 0.9 ** (n + 1))) / (torch.sqrt(v / (1 - 0.95 ** (n + 1))) + 1e-8)
        if not name.endswith("scale"):  # all but the norms' scales are matrices
            update = update + config.decay * param
        new_params[name] = param - learning_rate(config, n) * update
        new_average[name] = keep * average[name] + (1 - keep) * new_params[name]
    new = new_params, new_first, new_second, new_average
    return [x.item() for x in batch_losses], gradients, *new


def draw(params, config, prompt, noises):
    """The image after `prompt`, items that end with BOI, guided away from one after `<s> BOI`.

    `noises`: the one that it starts from, then one for each step.
    """

    def predict(before, x, t):
        return forward(params, config, [Document([*before, Image(x, t)])])[2][-1]

    last, count = config.T - 1, config.sampler_steps
    times = [round(last - n * config.T / count) for n in range(count + 1)]
    eta = {"ddim": 0.0, "ddpm": 1.0}[config.sampler]
    x = noises[0]
    for t, s, z in zip(times[:-1], times[1:], noises[1:], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = level(config, t), level(config, s)
        without = predict([prompt[0], config.boi], x, t)
        noise = without + config.guidance * (predict(prompt, x, t) - without)
        clean = (x - sigma_t * noise) / alpha_t
        if config.clip > 0:
            clean = clean.clamp(-config.clip, config.clip)
            noise = (x - alpha_t * clean) / sigma_t
        c = eta * sigma_s * math.sqrt(1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
        x = alpha_s * clean + math.sqrt(sigma_s**2 - c**2) * noise + c * z
    return x


def generate(params, config, prompt, max_tokens, noises, barred):
    """Greedy continuation of `prompt`, a list of items: the items that follow it.

    `noises` holds, for each image in turn, what `draw` needs; `barred` tokens are never predicted.
    EOI is put after an image, which is seen clean from then on. Ends before EOS, or where
    `max_tokens` positions have been added; an image without room for all of it is not begun.
    """
    items, added, noises = list(prompt), 0, list(noises)
    span = len(corners(config)) + 2
    while added < max_tokens:
        logits = forward(params, config, [Document(items)])[1][-1]
        no_room = [config.boi] if max_tokens - added < span else []
        logits[[*barred, *no_room]] = -math.inf
        token = int(logits.argmax())
        if token == config.eos:
            break
        items.append(token)
        added += 1
        if token == config.boi:
            image = draw(params, config, items, noises.pop(0))
            items += [Image(image, config.context_timestep), config.eoi]
            added += span - 1
    return items[len(prompt) :]
