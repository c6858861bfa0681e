"""The same training step in plain PyTorch, a peer of `train_step.py`: same rows, same shapes.

    python benchmarks/torch_peer.py --size 0.16B --length 4096 --batch 8 --dtype bfloat16

A Llama with linear patches, written as one writes PyTorch for speed: float32 parameters under
autocast, fused projections, every block compiled, FlexAttention over the rows' intervals on a GPU
(a dense mask elsewhere), fused AdamW. It does the work of our step: draws timesteps and noise,
clips gradients, averages weights. Its losses and gradients equal ours on the same weights
(tests/test_torch_peer.py). Time is taken as in `train_step.py`.
"""

import argparse
import math
import os
import resource
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # of the package, only the rows are used

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from train_step import experiment_of, keep, parser, rows_of  # noqa: E402

from transfusion_jax.batch import Batch  # noqa: E402
from transfusion_jax.config import Experiment, ImageConfig, ModelConfig  # noqa: E402
from transfusion_jax.diffusion.schedule import SCHEDULES  # noqa: E402
from transfusion_jax.host import keep_freed_memory  # noqa: E402

WAVES = 256


class Intervals:
    """Query i of a row sees the keys [start_i, end_i); padding sees what it may, nobody asks.

    The arrays keep their places, so that what was compiled for one batch serves all.
    """

    def __init__(self, rows: int, length: int, device: str, flex: bool):
        self.start, self.end = torch.zeros(2, rows, length, dtype=torch.int32, device=device)
        self.index = torch.arange(length, dtype=torch.int32, device=device)
        self.flex = flex
        self.block_mask = (
            torch.compile(create_block_mask) if device == "cuda" else create_block_mask
        )

        start, end = self.start, self.end

        def sees(b, h, q, k):
            return (k >= start[b, q]) & (k < end[b, q])

        self.sees = sees

    def mask(self, segment_BL: Tensor, at_BQ: Tensor, patches: int):
        """The mask of a batch whose patches are at these positions: blocks, or [B, 1, L, L]."""
        B, L = segment_BL.shape
        begins = F.pad(segment_BL[:, 1:] != segment_BL[:, :-1], (1, 0))
        self.start.copy_(torch.where(begins, self.index, 0).cummax(1).values)
        end = F.pad((self.index + 1).expand(B, L), (0, patches))
        ends = at_BQ.view(B, -1, patches)[:, :, :1] + patches
        end = end.scatter(1, at_BQ, ends.expand(-1, -1, patches).flatten(1).to(end.dtype))
        self.end.copy_(end[:, :L])
        if self.flex:
            return self.block_mask(self.sees, B, None, L, L, device=segment_BL.device)
        seen = (self.index >= self.start[:, :, None]) & (self.index < self.end[:, :, None])
        return seen[:, None]


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return (y * self.weight).to(x.dtype)


def rotate(x_BLNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BLNH.float().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x_BLNH.dtype)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads, config.num_kv_heads, config.num_kv_heads
        D, F, H = config.width, config.ffn_width, config.head_dim
        self.attention_norm = RMSNorm(D, config.norm_epsilon)
        self.qkv = nn.Linear(D, sum(self.heads) * H, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp_norm = RMSNorm(D, config.norm_epsilon)
        self.gate_up = nn.Linear(D, 2 * F, bias=False)
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask) -> Tensor:
        B, L, D = x_BLD.shape
        qkv = self.qkv(self.attention_norm(x_BLD)).view(B, L, sum(self.heads), -1)
        q, k, v = qkv.split(self.heads, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = self.heads[0] != self.heads[1]
        if isinstance(mask, Tensor):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        else:
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
        x_BLD = x_BLD + self.out(out.transpose(1, 2).reshape(B, L, D))
        gate, up = self.gate_up(self.mlp_norm(x_BLD)).chunk(2, -1)
        return x_BLD + self.down(F.silu(gate) * up)


class Transfusion(nn.Module):
    """Of the paper's setting: linear patches, the timestep before them, noise predicted."""

    def __init__(self, experiment: Experiment, remat: bool = False):
        super().__init__()
        config, image = experiment.model, experiment.image
        D, Z, H = config.width, image.patch_values, config.head_dim
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.time_in = nn.Linear(WAVES, D, bias=False)
        self.time_out = nn.Linear(D, D, bias=False)
        self.time_patch = nn.Linear(D, Z, bias=False)
        self.patch_in = nn.Linear(Z, D, bias=False)
        self.patch_out = nn.Linear(D, Z, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(D, config.norm_epsilon)
        self.output = nn.Linear(D, config.vocab_size, bias=False)
        schedule = SCHEDULES[experiment.diffusion.schedule](experiment.diffusion.steps)
        alpha, sigma = (torch.tensor(x[1:], dtype=torch.float32) for x in schedule.table())
        frequency = config.rope_theta ** (-torch.arange(0, H, 2) / H)
        waves = 0.1 * torch.exp(-math.log(1e4) * torch.arange(WAVES // 2) / (WAVES // 2))
        for name, table in dict(alpha=alpha, sigma=sigma, rope=frequency, waves=waves).items():
            self.register_buffer(name, table)
        self.image, self.remat = image, remat
        self.dtype = getattr(torch, config.compute_dtype)
        self.image_weight = experiment.train.image_loss_weight
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.patch_out.weight)

    def compiled(self) -> "Transfusion":
        """Compiles once what is run once, and once what every block runs."""
        for block in self.blocks:
            block.compile()
        self.embed, self.losses = torch.compile(self.embed), torch.compile(self.losses)
        return self

    def forward(self, batch: dict[str, Tensor], noise: Tensor, t: Tensor, intervals: Intervals):
        """The total, text and image loss of a batch."""
        at_BQ = batch["image_start_BM"].long()[:, :, None]
        at_BQ = (at_BQ + torch.arange(self.image.patches, device=at_BQ.device)).flatten(1)
        mask = intervals.mask(batch["segment_BL"], at_BQ, self.image.patches)
        x_BLD, cos, sin = self.embed(batch, noise, t, at_BQ)
        for block in self.blocks:
            if self.remat:
                x_BLD = checkpoint(block, x_BLD, cos, sin, mask, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, cos, sin, mask)
        return self.losses(x_BLD, batch, noise, at_BQ)

    def embed(self, batch, noise, t, at_BQ):
        shape = (*t.shape, 1, 1, 1)
        latents = batch["latents_BMhwc"]
        noisy = self.alpha[t].view(shape) * latents + self.sigma[t].view(shape) * noise
        angle = t[..., None].float() * self.waves
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        time_BMD = F.silu(self.time_out(F.silu(self.time_in(waves))))
        patches_BMPZ = patchify(noisy, self.image) + self.time_patch(time_BMD)[:, :, None]
        vectors_BQD = self.patch_in(patches_BMPZ).flatten(1, 2).to(self.dtype)
        x_BLD = self.embedding(batch["tokens_BL"]).to(self.dtype)
        # Patches of empty slots go behind the row.
        x = F.pad(x_BLD, (0, 0, 0, self.image.patches))
        x = x.scatter(1, at_BQ[:, :, None].expand_as(vectors_BQD), vectors_BQD)
        angle = batch["position_BL"][:, :, None, None].float() * self.rope
        return x[:, : x_BLD.shape[1]].contiguous(), angle.cos(), angle.sin()

    def losses(self, x_BLD, batch, noise, at_BQ):
        hidden_BLD = self.norm(x_BLD)
        logits_BLV = self.output(hidden_BLD).float()
        target_BL, weight_BL = batch["text_target_BL"].long(), batch["text_weight_BL"]
        text_BL = F.cross_entropy(
            logits_BLV.flatten(0, 1), target_BL.flatten(), reduction="none"
        ).view_as(weight_BL)
        text = (text_BL * weight_BL).sum() / weight_BL.sum().clamp(min=1)
        hidden = F.pad(hidden_BLD, (0, 0, 0, self.image.patches))
        hidden_BQD = hidden.gather(1, at_BQ[:, :, None].expand(-1, -1, hidden.shape[-1]))
        predicted = self.patch_out(hidden_BQD).float().unflatten(1, (-1, self.image.patches))
        error_BM = (predicted - patchify(noise, self.image)).square().mean((2, 3))
        weight_BM = (batch["image_start_BM"] < x_BLD.shape[1]).float()
        image = (error_BM * weight_BM).sum() / weight_BM.sum().clamp(min=1)
        return text + self.image_weight * image, text, image


def patchify(image: Tensor, config: ImageConfig) -> Tensor:
    """[B, M, h, w, c] -> [B, M, P, Z]."""
    B, M, h, w, c = image.shape
    p = config.patch
    x = image.view(B, M, h // p, p, w // p, p, c).transpose(3, 4)
    return x.reshape(B, M, config.patches, config.patch_values)


def tensors(batch: Batch, device: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x).to(device) for name, x in vars(batch).items()}


class Trainer:
    """AdamW with clipping and an average of the weights, as in `training/update.py`."""

    def __init__(self, model: Transfusion, experiment: Experiment, device: str):
        self.model, self.settings = model, experiment.optimizer
        rows, length = experiment.data.batch_rows, experiment.data.row_length
        self.intervals = Intervals(rows, length, device, flex=device == "cuda")
        self.autocast = torch.autocast(
            device, torch.bfloat16, enabled=experiment.model.compute_dtype == "bfloat16"
        )
        self.weights = list(model.parameters())
        self.average = [w.detach().clone() for w in self.weights]
        self.decay = experiment.train.ema_decay
        matrices = [w for w in self.weights if w.ndim > 1]
        scales = [w for w in self.weights if w.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": scales, "weight_decay": 0.0}],
            self.settings.learning_rate,
            (self.settings.b1, self.settings.b2),
            self.settings.epsilon,
            self.settings.weight_decay,
            fused=True,
        )

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss."""
        limit_BM = batch["image_limit_BM"]
        t_BM = (torch.rand(limit_BM.shape, device=limit_BM.device) * limit_BM).long()
        noise = torch.randn_like(batch["latents_BMhwc"])
        with self.autocast:
            loss, _, _ = self.model(batch, noise, t_BM, self.intervals)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - self.decay)
        return loss.detach()


def measure(trainer: Trainer, batches, steps: int, device: str) -> tuple[np.ndarray, float, float]:
    """Seconds of every step; of the first, which compiles; the last loss."""

    def mark():
        event = torch.cuda.Event() if device == "cuda" else None
        if event:
            event.record()
        return event

    def wait(event):
        if event:
            event.synchronize()

    begin = time.perf_counter()
    for _ in range(2):  # the second allocates what the first left over
        trainer.step(tensors(next(batches), device))
    before = mark()
    wait(before)
    ends = [time.perf_counter()]
    for _ in range(steps):
        loss = trainer.step(tensors(next(batches), device))
        wait(before)
        ends.append(time.perf_counter())
        before = mark()
    wait(before)
    ends.append(time.perf_counter())
    seconds = np.diff(ends)[1:] if device == "cuda" else np.diff(ends)[:-1]
    return seconds, ends[0] - begin, float(loss)


def main() -> None:
    peer = parser()
    peer.description = __doc__.splitlines()[0]
    peer.add_argument("--remat", default="none", choices=("none", "full"))
    peer.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction)
    peer.add_argument("--keep-memory", action="store_true", help="malloc keeps freed memory")
    args = peer.parse_args()
    if args.keep_memory:
        keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiment = experiment_of(args)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Transfusion(experiment, args.remat == "full").to(device)
    count = sum(w.numel() for w in model.parameters())
    trainer = Trainer(model.compiled() if args.compile else model, experiment, device)
    seconds, first, loss = measure(trainer, rows_of(experiment), args.steps, device)
    typical = float(np.median(seconds))
    rate = args.batch * args.length / typical
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"PyTorch           {torch.__version__} on {device}, {count / 1e6:.1f} M parameters")
    print(f"rows              {args.batch} of {args.length} positions, remat {args.remat}")
    print(f"tokens/s          {rate:,.0f} ({typical:.3f} s a step)")
    print(f"peak memory       {gib:.2f} GiB of the {'device' if device == 'cuda' else 'host'}")
    print(f"first two steps   {first:.1f} s")
    print(f"loss              {loss:.4f}", flush=True)
    record = {"tokens_per_second": rate, "memory_gib": gib, "parameters": count}
    keep(record | {"compile_seconds": first, "loss": loss}, args.json)


if __name__ == "__main__":
    main()
