"""The training step on this CPU beside its peers: plain PyTorch, and `transfusion-pytorch`.

    pip install -e '.[oracles]' transfusion-pytorch
    python benchmarks/peers.py

Two shapes, each part a process of its own, one after another on an otherwise idle machine: our
step, with a device for every core as `train` makes them, rematerialised (`full`, the default) and
hardly (`minimal`); PyTorch, which rematerialises nothing, on the same rows (`torch_peer.py`)
compiled, as it is, and with memory kept as ours keeps it; and the package as installed and with
memory kept (`transfusion_pytorch_peer.py`), where it is installed. A last table has the ratios to
compiled PyTorch. Exit code 1: a part failed.
"""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

from gpu import TINY, Part, run, table

ROWS = ("--layers", "8", "--length", "1024", "--batch", "4", "--vocab", "1024", "--steps", "8")
SHAPES = {
    "256": ("--width", "256", "--head-dim", "32", *ROWS),
    "512": ("--width", "512", "--head-dim", "64", *ROWS),
}
KEPT = ("--keep-memory",)
PACKAGE = "transfusion_pytorch_peer.py"
KINDS = (
    ("ours", "train_step.py", ()),
    ("ours-minimal", "train_step.py", ("--remat", "minimal")),
    ("torch", "torch_peer.py", ()),
    ("torch-eager", "torch_peer.py", ("--no-compile",)),
    ("torch-kept", "torch_peer.py", KEPT),
    ("transfusion-pytorch", PACKAGE, ()),
    ("transfusion-pytorch-kept", PACKAGE, KEPT),
)
LIMIT = 900
"""Seconds of a part."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of parts' names")
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    installed = importlib.util.find_spec("transfusion_pytorch") is not None
    if not installed:
        print("transfusion-pytorch is not installed: left out")
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    directory = Path(tempfile.mkdtemp(prefix="peers-"))
    parts = [Part(size, *kind) for size in SHAPES for kind in KINDS]
    found = {
        part.name: run(part, TINY if args.tiny else SHAPES[part.size], directory, LIMIT)
        for part in parts
        if part.name.startswith(tuple(args.only)) and (installed or part.program != PACKAGE)
    }
    print(table(found), flush=True)
    return 0 if found and all(found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
