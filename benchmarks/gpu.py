"""Everything that is asked of one GPU, one part after another: kernels' parity, then our training
step and PyTorch's on the same rows.

    benchmarks/gpu.sh                            all of it: about five minutes on an H100
    benchmarks/gpu.sh --only parity 0.16B        the parts whose names begin so
    benchmarks/gpu.sh --seconds 240              begins no part after so many seconds

Every part is a process with its own time limit, whose lines appear as they come; one that fails
does not stop the others. `--try` makes the shapes tiny, to try all this without a GPU. Exit code 1:
a part failed, or a kernel was wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROWS = ("--length", "4096", "--vocab", "32128", "--dtype", "bfloat16", "--steps", "20")
SHAPES = {
    "0.16B": ("--size", "0.16B", "--batch", "8", *ROWS),
    "0.76B": ("--size", "0.76B", "--batch", "4", *ROWS),
}
TINY = ("--width", "64", "--layers", "1", "--length", "300", "--batch", "1", "--steps", "2")


@dataclass(frozen=True)
class Part:
    size: str
    """Of `SHAPES`, or empty."""
    what: str
    program: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.size}/{self.what}" if self.size else self.what


# What matters most comes first.
PARTS = (
    Part("", "parity", "attention_parity.py"),
    Part("0.16B", "ours-minimal", "train_step.py", ("--remat", "minimal")),
    Part("0.16B", "torch", "torch_peer.py"),
    Part("0.76B", "ours-minimal", "train_step.py", ("--remat", "minimal")),
    Part("0.76B", "torch", "torch_peer.py"),
    Part("0.16B", "ours-scan", "train_step.py", ("--remat", "minimal", "--layer-loop", "scan")),
    Part("0.16B", "ours-none", "train_step.py", ("--remat", "none")),
    Part("0.76B", "ours-none", "train_step.py", ("--remat", "none")),
    Part("0.16B", "ours-tokamax", "train_step.py", ("--remat", "minimal", "--tokamax-backward")),
    Part("0.16B", "ours-logits", "train_step.py", ("--remat", "minimal", "--vocab-chunk", "4096")),
)
LIMIT = 120
"""Seconds of a part."""


def run(part: Part, shape: tuple[str, ...], directory: Path, limit: float) -> dict | None:
    """What a part found in `limit` seconds; None if it failed."""
    found = directory / f"{part.name.replace('/', '-')}.json"
    arguments = (*shape, *part.arguments)
    command = [sys.executable, "-u", str(HERE / part.program), *arguments, "--json", str(found)]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    print(f"\n== {part.name}: {part.program} {' '.join(arguments)}", flush=True)
    begin = time.monotonic()
    try:
        code = subprocess.run(command, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = f"none in {limit} s"
    print(f"== {part.name}: {time.monotonic() - begin:.0f} s, exit code {code}", flush=True)
    return json.loads(found.read_text()) if code == 0 and found.exists() else None


def table(found: dict[str, dict | None]) -> str:
    """One line for each part, the speed of the part `torch` of its size as 1."""
    names = f"{'GiB':>6} {'M weights':>9} {'of PyTorch':>10}"
    lines = [f"{'':28} {'tokens/s':>9} {'of matrix rate':>14} {names}"]
    for name, figures in found.items():
        if figures is None:
            lines.append(f"{name:28} failed")
        elif name == "parity":
            lines.append(f"{name:28} {'all right' if figures['right'] else 'NOT right'}")
        else:
            peer = found.get(f"{name.split('/')[0]}/torch")
            share = figures.get("utilisation")
            lines.append(
                f"{name:28} {figures['tokens_per_second']:9,.0f} "
                f"{'' if share is None else f'{share:.1%}':>14} {figures['memory_gib']:6.1f} "
                f"{figures['parameters'] / 1e6:9.1f} "
                + (
                    f"{figures['tokens_per_second'] / peer['tokens_per_second']:10.2f}"
                    if peer
                    else ""
                )
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of parts' names")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no part later")
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="where the figures are kept")
    args = parser.parse_args()
    directory = args.out or Path(tempfile.mkdtemp(prefix="gpu-"))
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    found = {}
    for part in PARTS:
        if part.name.startswith(tuple(args.only)):
            if time.monotonic() - begin > args.seconds:
                print(f"== {part.name}: no time left")
                continue
            shape = (TINY if args.tiny else SHAPES[part.size]) if part.size else ()
            found[part.name] = run(part, shape, directory, LIMIT)
    print(f"\n{time.monotonic() - begin:.0f} s in all\n{table(found)}", flush=True)
    return 0 if found and all(found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
