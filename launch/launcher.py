"""What all launchers share: their arguments, and commands that are printed or run.

Launchers need Python 3.11 and nothing else: not even transfusion_jax has to be installed where they
are started.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

STOPPED = 42
RETRIABLE = (STOPPED, *range(127, 256))
"""Exit codes after which the same command may be started again: stopped and saved, lost another
process, or killed from outside. 1 (failed) and 2 (bad input) would only fail again."""
RESTARTS = 20
GRACE = 300
"""Seconds from SIGTERM to SIGKILL: a checkpoint of billions of parameters takes minutes."""


class Parser(argparse.ArgumentParser):
    """Ends with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def fail(message: str) -> NoReturn:
    """Ends for bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parser(description: str) -> Parser:
    """A parser with what every launcher takes."""
    made = Parser(
        description=description,
        epilog="After --: what `transfusion-jax train` takes, an experiment first.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--dry-run", action="store_true", help="print every command and file, do nothing"
    )
    made.add_argument(
        "--restarts",
        type=int,
        default=RESTARTS,
        metavar="N",
        help="how often to start again after exit codes 42 and 127-255, in all or without a new "
        f"checkpoint (see README.md; default: {RESTARTS})",
    )
    return made


def parse(
    made: Parser, words: Sequence[str], without: Iterable[str] = ()
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the words for `train` after `--`.

    Args:
      without: values of `arguments.action` that start nothing and so take no experiment.
    """
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    arguments = made.parse_args(words[:at])
    train = words[at + 1 :]
    if getattr(arguments, "action", None) in without:
        return arguments, train
    if not train or train[0].startswith("-"):
        fail("name the experiment after --, as in: ... -- experiments/digits.py --run-dir DIR")
    if arguments.restarts < 0:
        fail(f"--restarts {arguments.restarts} must not be negative")
    return arguments, train


def check_name(name: str, longest: int = 40) -> str:
    """A name that Kubernetes and Google Cloud accept."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > longest:
        fail(
            f"name {name!r} must be at most {longest} lower-case letters, digits and -, "
            "and start with a letter"
        )
    return name


def check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            fail(f"--{name.replace('_', '-')} {number} must be at least 1")


def container_command(train: Sequence[str]) -> str:
    """What bash runs in a container: checks, then trains in its own place, so SIGTERM reaches it.

    Bash is process 1, on which SIGTERM has no effect by default. Kubernetes replaces $(NAME), and
    $$ by $.
    """
    words = shlex.join(train)
    line = f"transfusion-jax check {words} && exec transfusion-jax train {words}"
    return f"trap 'exit {STOPPED}' TERM; {line}".replace("$", "$$")


def write(path: Path, text: str, dry_run: bool) -> None:
    """Writes a file that a command reads, or prints it."""
    if dry_run:
        print(f"# {path}\n{text}", end="" if text.endswith("\n") else "\n")
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            fail(f"cannot write {path}: {error.strerror}")


def run(command: Sequence[str], dry_run: bool) -> int:
    """Runs a command and returns its exit code; prints it first, or instead."""
    print(f"$ {shlex.join(command)}", flush=True)
    if dry_run:
        return 0
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError:
        fail(f"{command[0]} is not installed, or not on the PATH")


def run_all(commands: Iterable[Sequence[str]], dry_run: bool) -> int:
    """Runs commands until one fails; returns its exit code."""
    for command in commands:
        if code := run(command, dry_run):
            return code
    return 0
