"""The command line: parser, dispatch, exit codes.

0: success. 1: the work ran and failed, or the verdict is no. 2: bad input. 42: stopped but saved;
the same command continues. Errors are one line on standard error.
"""

import argparse
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from transfusion_jax.commands import (
    autoencoder,
    check,
    evaluate,
    export,
    generate,
    import_weights,
    inspect,
    plan,
    prepare,
    sweep,
    train,
)
from transfusion_jax.commands.bad_input import BadInput, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.help import help_text
from transfusion_jax.commands.terminal import harmless
from transfusion_jax.errors import AGAIN, ComeAgain, ProcessLost, WorkFailed
from transfusion_jax.host import keep_freed_memory

COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "generate": generate.COMMAND,
    "evaluate": evaluate.COMMAND,
    "prepare": prepare.COMMAND,
    "inspect": inspect.COMMAND,
    "autoencoder": autoencoder.COMMAND,
    "plan": plan.COMMAND,
    "check": check.COMMAND,
    "sweep": sweep.COMMAND,
    "export": export.COMMAND,
    "import": import_weights.COMMAND,
}
HELP = ("-h", "--help")
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in JAX's error
ON_DEVICES = ("train", "autoencoder", "evaluate", "generate")  # not `plan`, which only compiles
# Beginnings of JAX's errors of hardware. A compiler that fails begins like the first, and fails
# again; but a run that ends in its third week for a broken chip costs more than some restarts.
PASSING = (
    "INTERNAL:",
    "UNAVAILABLE:",
    "ABORTED:",
    "DATA_LOSS:",
    "FAILED_PRECONDITION: The program continuator has halted",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if os.getpid() == 1:  # of a container: the kernel drops a SIGTERM that nothing handles
        signal.signal(signal.SIGTERM, lambda *_: os._exit(AGAIN))  # until a command does
    keep_freed_memory()
    try:
        parser, commands = _parsers()
        if words[:1] and words[0] in HELP:
            print(parser.format_help(), end="")
            return 0
        if set(words) & set(HELP) and words[0] in COMMANDS:
            print(_help(commands[words[0]], COMMANDS[words[0]], words), end="")
            return 0
        arguments, arguments.overrides = parser.parse_known_args(words)
        command = COMMANDS[arguments.command]
        if arguments.overrides and command.config is None:
            raise BadInput(f"unknown arguments: {' '.join(arguments.overrides)}")
        return command.run(arguments)
    except BadInput as error:
        return _fail(str(error), 2)
    except ProcessLost as error:
        return _fail(str(error), AGAIN, at_once=True)  # JAX is about to abort
    except ComeAgain as error:
        return _fail(str(error), AGAIN)
    except WorkFailed as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except MemoryError as error:
        return _fail(f"memory is full: {error}", 1)
    except OSError as error:
        return _fail(f"the disk is full: {error}" if error.errno == errno.ENOSPC else str(error), 1)
    except Exception as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY in str(error):
            return _fail(f"the memory of a device is full: {_first_line(error)}", 1)
        passing = words[0] in ON_DEVICES and _from_jax(error) and str(error).startswith(PASSING)
        if not passing and not _joined():
            raise
        traceback.print_exc()
        if passing:
            line = "a device, a transfer or the compiler failed; the same command tries again"
            return _fail(f"{line}: {_first_line(error)}", AGAIN)
        return _fail(str(error), 1)  # an ordinary exit would wait for the other processes


def _from_jax(error: Exception) -> bool:
    """Whether JAX's runtime raised it; imports no JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole line, and that of each command."""
    parser = _Parser(
        prog="transfusion-jax",
        description="Pretrains one transformer that reads, writes, sees and draws. "
        "`transfusion-jax COMMAND --help` explains a command.",
        epilog="Exit codes: 0 success, 1 the work ran and failed, 2 bad input, 42 stopped but "
        "saved: the same command continues.",
        allow_abbrev=False,
    )
    choices = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    commands = {}
    for name, command in COMMANDS.items():
        commands[name] = choices.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            allow_abbrev=False,
            add_help=False,
        )
        command.add_arguments(commands[name])
        commands[name].set_defaults(prog=commands[name].prog)
        commands[name].add_argument(*HELP, action="store_true", help=_about_help(command))
    return parser, commands


def _about_help(command: Command) -> str:
    if command.config is None:
        return "print this"
    return "print this; after a Python file, with the values of its config as defaults"


def _help(parser: argparse.ArgumentParser, command: Command, words: Sequence[str]) -> str:
    if command.config is None:
        return help_text(parser)
    config = command.config()
    spec = next((word for word in words if re.search(r"\.py(:|$)", word)), None)
    if spec is not None:
        with user_input():
            config = command.load(spec, type(config))
    return help_text(parser, config)


def _fail(message: str, code: int, at_once: bool = False) -> int:
    """Says what went wrong. One of several processes ends here: an ordinary exit would wait."""
    print(f"error: {harmless(' '.join(message.split()))}", file=sys.stderr, flush=True)
    if processes := _joined():
        processes.leave(code, at_once)
    return code


def _joined() -> ModuleType | None:
    """What knows of the other processes, if this one has joined any; imports nothing."""
    processes = sys.modules.get("transfusion_jax.parallel.processes")
    return processes if processes and processes.joined() else None
