"""The package `transfusion-pytorch` on the rows of `train_step.py`: a peer of it, as installed.

    pip install transfusion-pytorch
    python benchmarks/transfusion_pytorch_peer.py --width 256 --head-dim 32 --length 1024 --batch 4

A sample is a whole packed row, its text and its images in order: the package knows no documents, so
its attention sees across them. It adds tokens of its own around each image, which are not counted,
and pads rows to the longest. AdamW with clipping; no average of the weights. With the defaults of
the package a layer has, beside ours, scales and shifts of every position: 2.7 times the parameters
at the same width and depth, which the table shows.
"""

import os
import resource
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # of our package, only the rows are used

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch_peer import patchify  # noqa: E402
from train_step import experiment_of, keep, parser, rows_of, shape_of  # noqa: E402

from transfusion_jax.batch import Batch  # noqa: E402
from transfusion_jax.config import ImageConfig  # noqa: E402
from transfusion_jax.host import keep_freed_memory  # noqa: E402


def samples(batch: Batch, image: ImageConfig) -> list[list[torch.Tensor]]:
    """Of each row, its text and images: int64 [n] and float32 [patches, values]."""
    patches_BMPZ = patchify(torch.from_numpy(batch.latents_BMhwc), image)
    found = []
    for tokens_L, segment_L, starts, patches in zip(
        batch.tokens_BL, batch.segment_BL, batch.image_start_BM, patches_BMPZ, strict=True
    ):
        length, at, row = int((segment_L > 0).sum()), 0, []
        for start, pixels in zip(starts, patches, strict=True):
            if start < length:
                row += [torch.from_numpy(tokens_L[at:start]).long(), pixels]
                at = int(start) + image.patches
        found.append([*row, torch.from_numpy(tokens_L[at:length]).long()])
    return found


def main() -> None:
    peer = parser()
    peer.description = __doc__.splitlines()[0]
    peer.add_argument("--keep-memory", action="store_true", help="malloc keeps freed memory")
    args = peer.parse_args()
    if args.keep_memory:
        keep_freed_memory()
    from transfusion_pytorch import Transfusion

    experiment, shape = experiment_of(args), shape_of(args)
    settings = experiment.optimizer
    torch.manual_seed(0)
    model = Transfusion(
        num_text_tokens=args.vocab,
        dim_latent=experiment.image.patch_values,
        modality_default_shape=(experiment.image.patches,),
        transformer=dict(
            dim=shape["width"],
            depth=shape["layers"],
            heads=shape["heads"],
            dim_head=shape["width"] // shape["heads"],
        ),
    )
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, (settings.b1, settings.b2))
    batches, seconds = rows_of(experiment), []
    for _ in range(args.steps + 2):
        begin = time.perf_counter()
        loss = model(samples(next(batches), experiment.image))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    typical = float(np.median(seconds[2:]))
    rate = args.batch * args.length / typical
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    count = sum(w.numel() for w in weights)
    print(f"transfusion-pytorch  {count / 1e6:.1f} M parameters")
    print(f"tokens/s             {rate:,.0f} ({typical:.3f} s a step)")
    print(f"peak memory          {gib:.2f} GiB", flush=True)
    keep({"tokens_per_second": rate, "memory_gib": gib, "parameters": count}, args.json)


if __name__ == "__main__":
    main()
