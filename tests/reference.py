"""The whole method in plain torch and float64: model, losses, optimizer, average, sampler.

Written from the paper (arXiv 2408.11039) and the project's documented choices by someone who had
not read the package, and importing nothing of it. Loops are used wherever they make a line
obviously right; nothing is cached, so every prediction runs over the whole document again.

A document is a list of items: a token's id (int) or an `Image`. A row is a list of documents.
Parameters are a nested dict of tensors; those under "blocks" have the layers on axis 0.
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
    timestep: str = "before"  # or "after": where the timestep joins a patch
    patch_position: str = "rope"  # or "learned"
    theta: float = 10_000.0
    steps: int = 1000  # of the diffusion
    image_weight: float = 5.0  # lambda
    peak_rate: float = 3e-4
    final_rate: float = 1.5e-5
    warmup: int = 4000
    train_steps: int = 250_000
    decay: float = 0.1
    clip_norm: float = 1.0
    average: float = 0.999
    sampler: str = "ddim"  # or "ddpm"
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
class Position:
    """One place of a row: a token, or one patch of one image."""

    document: int  # which document of the row
    place: int  # counted from the start of the document
    token: int | None
    image: int | None  # which image of the row
    patch: int | None  # which patch of that image


# Diffusion.


def alpha_bars(steps):
    """The cosine schedule of Nichol & Dhariwal, each beta at most 0.999: a list over timesteps."""

    def f(u):
        return math.cos((u / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    bars = []
    for t in range(steps):
        beta = min(1 - f(t + 1) / f(t), 0.999)
        product = product * (1 - beta)
        bars.append(product)
    return bars


def level(config, t):
    """How much of the image and how much of the noise is left at timestep t; -1 is clean."""
    if t == -1:
        return 1.0, 0.0
    bar = alpha_bars(config.steps)[t]
    return math.sqrt(bar), math.sqrt(1 - bar)


def noised(config, clean, t, noise):
    alpha, sigma = level(config, t)
    return Image(alpha * clean + sigma * noise, t, noise)


# The sequence.


def positions(config, row):
    """The row's positions and its images, in order."""
    side = config.patch
    patches = (config.image[0] // side) * (config.image[1] // side)
    places = []
    images = []
    for d, document in enumerate(row):
        place = 0
        for item in document:
            if isinstance(item, Image):
                for p in range(patches):
                    places.append(Position(d, place, None, len(images), p))
                    place = place + 1
                images.append(item)
            else:
                places.append(Position(d, place, int(item), None, None))
                place = place + 1
    return places, images


def sees(i, j):
    """Does position i see position j?"""
    if i.document != j.document:
        return False
    same_image = i.image is not None and i.image == j.image
    return j.place <= i.place or same_image


def patchify(config, values):
    """[rows, columns, channels] to [patch, patch values]."""
    side = config.patch
    height, width, _ = config.image
    patches = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            patches.append(values[top : top + side, left : left + side].reshape(-1))
    return torch.stack(patches)


def unpatchify(config, patches):
    """[patch, patch values] to [rows, columns, channels]."""
    side = config.patch
    height, width, channels = config.image
    values = torch.zeros(config.image, dtype=patches.dtype)
    p = 0
    for top in range(0, height, side):
        for left in range(0, width, side):
            values[top : top + side, left : left + side] = patches[p].reshape(side, side, channels)
            p = p + 1
    return values


# The model.


def silu(x):
    return x / (1 + torch.exp(-x))


def rms_norm(x, scale):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * scale


def rotate(x, places, theta):
    """RoPE on one head, [position, H]: value i and value i + H/2 turn together."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / (2 * half)) for i in range(half)]).to(x)
    angles = torch.tensor(places).to(x)[:, None] * frequencies
    a, b = x[:, :half], x[:, half:]
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attention(weights, x, seen, places, theta):
    heads, size = weights["q_DNH"].shape[1:]
    group = heads // weights["k_DKH"].shape[1]
    result = torch.zeros_like(x)
    for n in range(heads):
        query = rotate(x @ weights["q_DNH"][:, n], places, theta)
        key = rotate(x @ weights["k_DKH"][:, n // group], places, theta)
        value = x @ weights["v_DKH"][:, n // group]
        scores = (query @ key.T / math.sqrt(size)).masked_fill(~seen, -math.inf)
        result = result + torch.softmax(scores, -1) @ value @ weights["out_NHD"][n]
    return result


def mlp(weights, x):
    return (silu(x @ weights["gate_DF"]) * (x @ weights["up_DF"])) @ weights["down_FD"]


def timestep_embedding(patches, t):
    frequencies = [0.1 * 10_000 ** (-j / 128) for j in range(128)]
    waves = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
    return (
        silu(torch.tensor(waves).to(patches["time_in"]) @ patches["time_in"])
        @ patches["time_out_DD"]
    )


def patch_vectors(params, config, image):
    """What the transformer gets for an image: [patch, D]."""
    patches = params["patches"]
    values = patchify(config, image.values)
    embedding = timestep_embedding(patches, image.timestep)
    if config.timestep == "before":
        vectors = (values + silu(embedding) @ patches["time_patch_DZ"]) @ patches["in_ZD"]
    else:
        vectors = values @ patches["in_ZD"] + embedding
    if config.patch_position == "learned":
        vectors = vectors + patches["position_PD"]
    return vectors


def layer_of(weights, layer):
    """The parameters of one layer."""
    if isinstance(weights, dict):
        return {name: layer_of(value, layer) for name, value in weights.items()}
    return weights[layer]


def forward(params, config, row):
    """A row's positions, hidden states [position, D], logits [position, V] and predicted noises."""
    row_positions, images = positions(config, row)
    image_vectors = [patch_vectors(params, config, image) for image in images]
    x = torch.stack(
        [
            params["embedding_VD"][p.token] if p.image is None else image_vectors[p.image][p.patch]
            for p in row_positions
        ]
    )
    seen = torch.tensor([[sees(i, j) for j in row_positions] for i in row_positions])
    places = [p.place for p in row_positions]
    blocks = params["transformer"]["blocks"]
    for layer in range(blocks["attention_norm"]["scale"].shape[0]):
        block = layer_of(blocks, layer)
        y = rms_norm(x, block["attention_norm"]["scale"])
        x = x + attention(block["attention"], y, seen, places, config.theta)
        y = rms_norm(x, block["mlp_norm"]["scale"])
        x = x + mlp(block["mlp"], y)
    hidden = rms_norm(x, params["transformer"]["norm"]["scale"])
    logits = hidden @ params["output_DV"]
    noises = []
    for image in range(len(images)):
        own = [n for n, p in enumerate(row_positions) if p.image == image]
        noises.append(unpatchify(config, hidden[own] @ params["patches"]["out_DZ"]))
    return row_positions, hidden, logits, noises


def losses(params, config, rows):
    """Total, text and image loss of a batch: a list of rows."""
    entropies = []
    squares = []
    for row in rows:
        row_positions, _, logits, noises = forward(params, config, row)
        for n in range(len(row_positions) - 1):
            here, after = row_positions[n], row_positions[n + 1]
            if here.document == after.document and here.token not in (None, config.boi):
                entropies.append(-torch.log_softmax(logits[n], -1)[after.token])
        for image, noise in zip(positions(config, row)[1], noises, strict=True):
            squares.append(((noise - image.noise) ** 2).mean())
    text = sum(entropies, torch.zeros((), dtype=torch.float64)) / max(len(entropies), 1)
    image = sum(squares, torch.zeros((), dtype=torch.float64)) / max(len(squares), 1)
    return text + config.image_weight * image, text, image


# Training. Parameters, moments and average are flat dicts here: path to tensor.


def flat(params, path=()):
    if isinstance(params, dict):
        return {k: v for name in params for k, v in flat(params[name], (*path, name)).items()}
    return {path: params}


def nested(flat_params):
    result = {}
    for path, value in flat_params.items():
        place = result
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return result


def gradients(params, config, rows):
    """The losses (total, text, image) and the gradient of the total, flat."""
    leaves = {path: value.detach().requires_grad_() for path, value in flat(params).items()}
    values = losses(nested(leaves), config, rows)
    found = torch.autograd.grad(values[0], list(leaves.values()), allow_unused=True)
    zipped = zip(leaves.items(), found, strict=True)
    grads = {path: torch.zeros_like(leaf) if g is None else g for (path, leaf), g in zipped}
    return [value.item() for value in values], grads


def rate(config, n):
    """The learning rate of the step that follows n earlier ones."""
    if n < config.warmup:
        return config.peak_rate * n / config.warmup
    progress = min((n - config.warmup) / (config.train_steps - config.warmup), 1)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return config.final_rate + (config.peak_rate - config.final_rate) * fall


def start(params):
    """The state before the first step: parameters, both moments, average, steps done."""
    values = flat(params)
    first = {path: torch.zeros_like(value) for path, value in values.items()}
    second = {path: torch.zeros_like(value) for path, value in values.items()}
    return values, first, second, dict(values), 0


def train_step(state, config, rows):
    """One step of AdamW on the batch. The new state, the losses and the gradient's norm."""
    params, first, second, average, n = state
    values, grads = gradients(nested(params), config, rows)
    norm = math.sqrt(sum((g * g).sum().item() for g in grads.values()))
    shrink = min(1.0, config.clip_norm / norm)
    keep = min(config.average, (1 + n) / (10 + n))
    new = ({}, {}, {}, {}, n + 1)
    for path, param in params.items():
        grad = grads[path] * shrink
        m = 0.9 * first[path] + 0.1 * grad
        v = 0.95 * second[path] + 0.05 * grad**2
        update = (m / (1 - 0.9 ** (n + 1))) / (torch.sqrt(v / (1 - 0.95 ** (n + 1))) + 1e-8)
        if path[-1] != "scale":  # everything but the norms' scales is a matrix
            update = update + config.decay * param
        param = param - rate(config, n) * update
        new[0][path] = param
        new[1][path] = m
        new[2][path] = v
        new[3][path] = keep * average[path] + (1 - keep) * param
    return new, values, norm


# Generation.


def draw(params, config, prompt, noises):
    """Draws the image that follows `prompt` (it ends with BOI). `noises`: the one that it starts
    from, then one per step. An image without any condition follows `<s> BOI` alone."""
    count = config.sampler_steps
    times = [
        round(config.steps - 1 - n * config.steps / count) for n in range(count + 1)
    ]  # the last is -1
    eta = {"ddim": 0.0, "ddpm": 1.0}[config.sampler]
    x = noises[0]
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        alpha_t, sigma_t = level(config, t)
        alpha_s, sigma_s = level(config, s)
        with_prompt = forward(params, config, [[*prompt, Image(x, t)]])[-1][-1]
        without = forward(params, config, [[prompt[0], config.boi, Image(x, t)]])[-1][-1]
        noise = without + config.guidance * (with_prompt - without)
        clean = (x - sigma_t * noise) / alpha_t
        if config.clip > 0:
            clean = clean.clamp(-config.clip, config.clip)
            noise = (x - alpha_t * clean) / sigma_t
        fresh = eta * sigma_s * math.sqrt(1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
        x = alpha_s * clean + math.sqrt(sigma_s**2 - fresh**2) * noise + fresh * noises[n + 1]
    return x


def generate(params, config, prompt, max_tokens, noises, barred=()):
    """Greedy continuation of `prompt`, a document: the items that follow it.

    `noises` holds, for each image drawn, what `draw` needs. `barred` tokens are never written.
    A drawn image is followed by EOI and seen clean from then on. Ends after EOS, or where
    `max_tokens` positions have been added.
    """
    patches = (config.image[0] // config.patch) * (config.image[1] // config.patch)
    document = list(prompt)
    noises = list(noises)
    used = 0
    while used < max_tokens:
        if document[-1] == config.boi:
            image = draw(params, config, document, noises.pop(0))
            document = [*document, Image(image, config.context_timestep), config.eoi]
            used = used + patches + 1
            continue
        logits = forward(params, config, [document])[2][-1].clone()
        logits[list(barred)] = -math.inf
        document.append(int(logits.argmax()))
        used = used + 1
        if document[-1] == config.eos:
            break
    return document[len(prompt) :]
