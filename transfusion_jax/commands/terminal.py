"""What commands print."""

import re
import sys

ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that do something to a terminal: controls but tab and newline, and those that turn the
direction of writing."""


def harmless(text: str) -> str:
    """A text that may come from data, with such characters written as escapes."""
    return ACTING.sub(lambda found: ascii(found[0])[1:-1], text)


def say(line: str) -> None:
    """Prints lines to standard output, `harmless`, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(harmless(line))
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
