"""What a finished run says of itself: metrics and pictures of its averaged weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transfusion_jax.evaluation.curves import curves
from transfusion_jax.evaluation.suite import check_suites, evaluate
from transfusion_jax.files import write_json
from transfusion_jax.generation.engine import load_engine, nothing
from transfusion_jax.parallel.processes import is_leader
from transfusion_jax.training.goodput import Account


def summarise(
    directory: Path,
    train_seconds: float,
    account: Account,
    report: Callable[[str], None],
    moved: Callable[[], None] = nothing,
) -> dict:
    """Evaluates a trained run by its own suites; writes `summary.json` and `samples/`.

    Args:
      account: of the run's time, which evaluation is charged to.
      moved: called between batches; what it raises ends the evaluation.

    Raises:
      ValueError: a suite cannot measure this model.
    """
    try:
        with account.during("evaluation"):
            return _summary(directory, train_seconds, account, report, moved)
    finally:
        account.write()


def _summary(
    directory: Path,
    train_seconds: float,
    account: Account,
    report: Callable[[str], None],
    moved: Callable[[], None],
) -> dict:
    engine, step = load_engine(directory, report)
    engine = replace(engine, moved=moved)
    names, samples = engine.experiment.evaluation, directory / "samples"
    check_suites(engine, names)
    metrics = evaluate(engine, names, samples, report)
    times = {"train_seconds": round(train_seconds, 1), **account.summary()}
    summary = {**metrics, "steps": step, **times}
    if is_leader():
        curves(directory, samples / "curves.png")
        write_json(directory / "summary.json", summary)
    return summary
