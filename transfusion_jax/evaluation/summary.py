"""What a finished run says of itself: metrics and pictures of its averaged weights."""

from collections.abc import Callable
from pathlib import Path

from transfusion_jax.evaluation.curves import curves
from transfusion_jax.evaluation.suite import check_suites, evaluate
from transfusion_jax.files import write_json
from transfusion_jax.generation.engine import load_engine


def summarise(directory: Path, train_seconds: float, report: Callable[[str], None]) -> dict:
    """Evaluates a trained run by its own suites; writes `summary.json` and `samples/`.

    Raises:
      ValueError: a suite cannot measure this model.
    """
    engine, step = load_engine(directory, report)
    names, samples = engine.experiment.evaluation, directory / "samples"
    check_suites(engine, names)
    metrics = evaluate(engine, names, samples, report)
    curves(directory, samples / "curves.png")
    summary = {**metrics, "steps": step, "train_seconds": round(train_seconds, 1)}
    write_json(directory / "summary.json", summary)
    return summary
