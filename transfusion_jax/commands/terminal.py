"""What commands print."""

import sys


def say(line: str) -> None:
    """Prints lines to standard output, above the progress bar if there is one; without characters
    that do something to a terminal, which texts of data may hold."""
    from tqdm import tqdm

    tqdm.write("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in line))
    sys.stdout.flush()


def say_leading(line: str) -> None:
    """As `say`, in the process that leads; the others are silent."""
    from transfusion_jax.parallel.processes import is_leader

    if is_leader():
        say(line)


def note_leading(line: str) -> None:
    """Prints a line to standard error, where standard output is the result of the command, in the
    process that leads."""
    from transfusion_jax.parallel.processes import is_leader

    if is_leader():
        print(line, file=sys.stderr, flush=True)


def table(summary: dict) -> str:
    """Names and numbers of a summary, one line each; nested values are left to summary.json."""
    flat = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    width = max(map(len, flat), default=0)
    lines = []
    for name, value in flat.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        lines.append(f"  {name:{width}}  {shown}")
    return "\n".join(lines)
