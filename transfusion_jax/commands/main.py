"""The command line: parse, build, call. Exit codes: 0 success, 1 the work ran and failed, 2 bad input."""

import argparse
import contextlib
import errno
import functools
import io
import json
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from transfusion_jax.config import Experiment
from transfusion_jax.files import write_atomic
from transfusion_jax.host import cores, keep_freed_memory


class BadInput(Exception):
    """What the user gave cannot work; the message is one line."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """What raises ValueError in here was caused by the user."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


def say(line: str) -> None:
    """One line on standard output, above a progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def load_experiment(spec: str, overrides: Sequence[str] = (), kind: type = Experiment) -> Any:
    """The experiment of a file, or with `file:name` one point of its sweep, with dotted overrides applied.

    Raises:
      ValueError: the file, the point or an override is wrong, or the experiment is of another kind.
    """
    path, _, point = spec.partition(":") if not Path(spec).exists() else (spec, "", "")
    if not Path(path).is_file():
        raise ValueError(f"there is no experiment file {path}")
    try:
        names = runpy.run_path(path)
        wanted = "sweep" if point else "config"
        if wanted not in names:
            raise ValueError(f"{path} has no function {wanted}()")
        found = names[wanted]()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path} fails with {type(error).__name__}: {error}") from error
    if point:
        points = {experiment.name: experiment for experiment in found}
        if point not in points:
            raise ValueError(f"{path} has no point {point!r}, only {', '.join(points)}")
        found = points[point]
    if not isinstance(found, kind):
        raise ValueError(
            f"config() of {path} returns {type(found).__name__}, not an {kind.__name__}"
        )
    return override(found, overrides, "train EXPERIMENT")


def override(config: Any, arguments: Sequence[str], command: str) -> Any:
    """Applies `--a.b value` arguments to a config, checked against the types of the fields."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(
                type(config), default=config, args=list(arguments), config=(tyro.conf.FlagConversionOff,),
                prog=f"transfusion-jax {command}",
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:  # --help
            print(said.getvalue())
            raise
        raise ValueError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """The message, and the nearest names, of one of tyro's boxes: title, message, hints, parted by rules."""
    lines = [line.strip("│| ") for line in box.splitlines() if line[:1] not in ("╰", "+")]
    title, message, *hints = (
        " ".join(part.split()) for part in re.split("[─-]{3,}", "\n".join(lines)) if part.strip()
    )
    near = dict.fromkeys(
        name for hint in hints if "Perhaps" in hint for name in re.findall(r"--[\w.-]+", hint)
    )
    return message + (f"; perhaps you meant {' or '.join(near)}" if near else "")


def train(arguments: argparse.Namespace) -> int:
    from transfusion_jax.evaluation.curves import curves
    from transfusion_jax.evaluation.suite import check_suites, evaluate
    from transfusion_jax.generation.engine import load_engine
    from transfusion_jax.pretraining.run import open_run
    from transfusion_jax.training.loop import train as train_loop

    if arguments.experiment is None and {"-h", "--help"} & set(arguments.overrides):
        arguments.parser.print_help()
        return 0
    with user_input():
        if arguments.experiment is None:
            raise ValueError(f"name an experiment file (see {arguments.parser.prog} --help)")
        experiment = load_experiment(arguments.experiment, arguments.overrides)
        check_suites(experiment.evaluation)
        directory = arguments.run_dir or Path("runs") / experiment.name
        run = open_run(experiment, directory, say)
    outcome = train_loop(run, say)
    if outcome.stopped_by:
        return 0

    samples, steps, seconds = directory / "samples", experiment.train.steps, outcome.seconds
    del outcome, run  # the evaluation needs the averaged weights only
    engine, _ = load_engine(directory, say)
    metrics = evaluate(engine, experiment.evaluation, samples, say)
    curves(directory, samples / "curves.png")
    summary = {**metrics, "steps": steps, "train_seconds": round(seconds, 1)}
    _write_json(directory / "summary.json", summary)
    say(_table(summary))
    say(f"pictures  {', '.join(map(str, sorted(samples.glob('*.png'))))}")
    say(f"curve     {directory / 'metrics.jsonl'}\nnumbers   {directory / 'summary.json'}")
    return 0


def autoencoder(arguments: argparse.Namespace) -> int:
    from transfusion_jax.autoencoder.config import AutoencoderExperiment
    from transfusion_jax.autoencoder.training.run import open_run, train_autoencoder

    with user_input():
        experiment = load_experiment(
            arguments.experiment, arguments.overrides, AutoencoderExperiment
        )
        directory = arguments.run_dir or Path("runs") / experiment.name
        run = open_run(experiment, directory, say)
    if (summary := train_autoencoder(run, say)) is not None:
        say(_table(summary))
        say(f"pictures  {', '.join(map(str, sorted((directory / 'samples').glob('*.png'))[-1:]))}")
        say(
            f"numbers   {directory / 'summary.json'}\nuse       transfusion-jax prepare ... --autoencoder {directory}"
        )
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    from transfusion_jax.data.pipeline import Data
    from transfusion_jax.evaluation.inspection import inspect_row, totals
    from transfusion_jax.pretraining.run import tokenizer_of

    with user_input():
        experiment = load_experiment(arguments.experiment, arguments.overrides)
        if arguments.row < 0:
            raise ValueError(f"--row {arguments.row} must not be negative")
        data = Data(experiment, tokenizer_of(experiment, Path("runs") / experiment.name))
        out = arguments.out or Path(f"{experiment.name}_row_{arguments.row}.png")
        if not out.parent.is_dir():
            raise ValueError(f"there is no directory {out.parent} for --out {out}")
    say(inspect_row(data, arguments.row, out))
    say(totals(data))
    say(f"picture   {out}")
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    from transfusion_jax.data.sources.dataset import open_dataset
    from transfusion_jax.preparation.prepare import Preparation, parse_part
    from transfusion_jax.preparation.prepare import prepare as prepare_data

    with user_input():
        words = arguments.overrides
        if words and words[0].endswith(".py"):
            preparation = load_experiment(words[0], words[1:], Preparation)
        else:
            preparation = override(Preparation(), words, "prepare INPUT... --out DIR")
        if arguments.out is None:
            raise ValueError("name the directory to make: --out DIR")
        part = parse_part(arguments.part) if arguments.part else None
        workers = cores() if arguments.workers is None else arguments.workers
        if workers < 1:
            raise ValueError(f"--workers {workers} must be at least 1")
        info = prepare_data(preparation, arguments.out, part, arguments.finish, workers, say)
    if info is None:
        return 0
    from transfusion_jax.preparation.preview import description, leave_samples

    dataset = open_dataset(arguments.out)
    leave_samples(dataset)
    say(description(dataset))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    import jax

    from transfusion_jax.planning.describe import page, ranked, size, table
    from transfusion_jax.planning.plan import make_plan
    from transfusion_jax.planning.rows import sample_rows
    from transfusion_jax.planning.search import remedies, search
    from transfusion_jax.planning.topology import find_topology

    jax.config.update("jax_platforms", "cpu")  # compiles for TPU, and computes nothing to speak of
    with user_input():
        experiment = load_experiment(arguments.experiment, arguments.overrides)
        name = arguments.topology or experiment.mesh.topology
        if not name:
            raise ValueError(
                "name a topology: --topology v5p:4x4x4, or mesh.topology in the experiment"
            )
        if arguments.json and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
            raise ValueError(f"--json {arguments.json} is a directory, or in one that is not there")
        topology = find_topology(name, arguments.slices)
        rows = sample_rows(experiment)
        planner = functools.partial(make_plan, rows=rows)
        say(f"compiling the training step of {experiment.name} for {name}, about a minute")
        planned = planner(experiment, topology)
    say(page(planned))
    answer = planned.json()
    if arguments.json:
        _write_json(arguments.json, answer)
    if arguments.search:
        plans = [planned]
        for found in search(planner, planned):
            plans.append(found)
            say(table([found]).splitlines()[-1])
        say("\nbest first\n" + table(plans))
        planned = ranked(plans)[0]
        answer = {**planned.json(), "search": [found.json() for found in ranked(plans)]}
    elif not planned.fits:
        say("trying what would fit")
        answer["remedies"] = []
        for change, found in remedies(planner, planned):
            if found.fits:
                say(
                    f"  {change}: fits in {size(found.memory.peak)}, {found.step_seconds:.4g} s a step at best"
                )
                answer["remedies"].append({"change": change, **found.json()})
            else:
                say(f"  {change}: does not fit, {size(found.memory.peak)}")
        if not answer["remedies"]:
            say("  nothing found")
    if arguments.json:
        _write_json(arguments.json, answer)
    return 0 if planned.fits else 1


def generate(arguments: argparse.Namespace) -> int:
    from transfusion_jax.generation.engine import load_engine
    from transfusion_jax.images import write_image

    with user_input():
        if not (arguments.prompt or "").strip() and not arguments.image:
            raise ValueError("the prompt is empty: give --prompt TEXT, or --image FILE, or both")
        if arguments.num < 1:
            raise ValueError(f"--num {arguments.num} must be at least 1")
        engine, _ = load_engine(arguments.run_dir, say)
        asked = {name: getattr(arguments, name) for name in ("guidance", "steps", "temperature")}
        engine = engine.using(**{name: value for name, value in asked.items() if value is not None})
        image = [engine.read(arguments.image)] if arguments.image else []
        request = (*image, *([arguments.prompt] if (arguments.prompt or "").strip() else []))
        engine.check([request])
        if arguments.out.exists() and not arguments.out.is_dir():
            raise ValueError(f"--out {arguments.out} is a file, not a directory")
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines, pictures = [], 0
    for spans in engine.generate([request] * arguments.num, arguments.seed):
        written = []
        for span in spans:
            if isinstance(span, str):
                written.append({"text": span})
            else:
                write_image(arguments.out / f"{pictures}.png", span)
                written.append({"image": f"{pictures}.png"})
                pictures += 1
        lines.append({"prompt": arguments.prompt or "", "spans": written})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (arguments.out / "outputs.jsonl").write_text(text)
    print(text, end="")
    say(f"written to {arguments.out}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from transfusion_jax.evaluation.suite import check_suites
    from transfusion_jax.evaluation.suite import evaluate as run_suites
    from transfusion_jax.generation.engine import load_engine

    with user_input():
        check_suites((arguments.suite,) if arguments.suite else ())
        engine, step = load_engine(arguments.run_dir, lambda line: print(line, file=sys.stderr))
    names = (arguments.suite,) if arguments.suite else engine.experiment.evaluation
    metrics = run_suites(
        engine, names, arguments.run_dir / "samples", lambda line: print(line, file=sys.stderr)
    )
    metrics = {**metrics, "step": step}
    if arguments.out:
        _write_json(arguments.out, metrics)
    print(json.dumps(metrics, indent=2))
    return 0


def _write_json(path: Path, value: dict) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def _table(summary: dict) -> str:
    flat = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    return "\n".join(
        f"  {name:26}{value:.4f}" if isinstance(value, float) else f"  {name:26}{value}"
        for name, value in flat.items()
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="transfusion-jax", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(function, help_text: str, **options: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            function.__name__, help=help_text, description=help_text, allow_abbrev=False, **options
        )
        sub.set_defaults(function=function, parser=sub)
        return sub

    # --help after an experiment is answered with the fields of its config.
    sub = command(
        train,
        "train an experiment, or resume it; --a.b VALUE overrides a field of its config",
        add_help=False,
    )
    sub.add_argument(
        "experiment",
        metavar="EXPERIMENT",
        nargs="?",
        help="a file, with :name for a point of its sweep",
    )
    sub.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="default: runs/<name of the experiment>"
    )

    sub = command(
        inspect, "draw a packed row of an experiment's data, and count what the rows hold"
    )
    sub.add_argument(
        "experiment", metavar="EXPERIMENT", help="as for train; --a.b VALUE overrides a field"
    )
    sub.add_argument("--row", type=int, default=0, metavar="N", help="(0)")
    sub.add_argument("--out", type=Path, metavar="FILE", help="default: <name>_row_<N>.png")

    # Inputs and fields of the preparation are read by tyro, and answered for by its --help.
    sub = command(
        prepare,
        "make a data set of pictures, captions and text: INPUT... or CONFIG.py, --out DIR",
        add_help=False,
    )
    sub.add_argument("--out", type=Path, metavar="DIR")
    sub.add_argument("--part", metavar="i/n", help="make the shards of this part only")
    sub.add_argument(
        "--finish", action="store_true", help="make no shard; check that all are there, and finish"
    )
    sub.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode pictures (all cores)"
    )

    sub = command(
        autoencoder,
        "train an autoencoder, or resume it; --a.b VALUE overrides a field of its config",
    )
    sub.add_argument(
        "experiment", metavar="EXPERIMENT", help="a file, with :name for a point of its sweep"
    )
    sub.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="default: runs/<name of the experiment>"
    )

    sub = command(
        plan,
        "compile the training step for TPUs that are not there: memory, FLOPs, collectives, time",
    )
    sub.add_argument(
        "experiment", metavar="EXPERIMENT", help="as for train; --a.b VALUE overrides a field"
    )
    sub.add_argument(
        "--topology",
        metavar="NAME",
        help="as in v5p:4x4x4; default: mesh.topology of the experiment",
    )
    sub.add_argument("--slices", type=int, default=1, metavar="n", help="joined by the network (1)")
    sub.add_argument("--json", type=Path, metavar="FILE")
    sub.add_argument(
        "--search", action="store_true", help="try meshes, remat policies and parts of the batch"
    )

    sub = command(generate, "continue a prompt with text and images")
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    sub.add_argument("--prompt", metavar="TEXT")
    sub.add_argument("--image", type=Path, metavar="FILE", help="an image before the prompt")
    sub.add_argument(
        "--num", type=int, default=1, metavar="N", help="continuations of the prompt (1)"
    )
    sub.add_argument(
        "--guidance", type=float, metavar="W", help="classifier-free guidance; 1 is none"
    )
    sub.add_argument("--steps", type=int, metavar="S", help="denoising steps of an image")
    sub.add_argument("--seed", type=int, default=0, metavar="K", help="(0)")
    sub.add_argument("--temperature", type=float, metavar="T", help="of text; 0 is greedy")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")

    sub = command(evaluate, "measure a run; prints JSON")
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    sub.add_argument("--suite", metavar="NAME", help="default: those of the experiment")
    sub.add_argument("--out", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    keep_freed_memory()
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest and arguments.function not in (train, prepare, inspect, autoencoder, plan):
            raise BadInput(f"unknown arguments: {' '.join(rest)}")
        arguments.overrides = rest
        return arguments.function(arguments)
    except BadInput as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except OSError as error:
        return _fail(f"the disk is full: {error}" if error.errno == errno.ENOSPC else str(error), 1)
    except Exception as error:
        # Failures of the work itself, which say all there is to say. By name: importing their modules costs seconds.
        if type(error).__name__ not in (
            "TrainingFailed",
            "CheckpointError",
            "PreparationFailed",
            "BrokenProcessPool",
        ):
            raise
        return _fail(str(error), 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
