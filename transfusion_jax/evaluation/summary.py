"""What a finished run says of itself: metrics and pictures of its averaged weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from transfusion_jax.evaluation.curves import curves
from transfusion_jax.evaluation.suite import check_suites, evaluate
from transfusion_jax.files import write_json
from transfusion_jax.generation.engine import load_engine
from transfusion_jax.model.build import abstract_model
from transfusion_jax.parallel.processes import is_leader
from transfusion_jax.pretraining.run import stored
from transfusion_jax.training.goodput import Account
from transfusion_jax.training.metrics import read_metrics
from transfusion_jax.training.observation import nothing


def summarise(
    directory: Path,
    train_seconds: float,
    account: Account,
    report: Callable[[str], None],
    moved: Callable[[], None] = nothing,
) -> dict:
    """Evaluates a finished run by its own suites, if it names any; writes `summary.json` and
    `samples/`.

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
    experiment, _ = stored(directory, report)
    samples = directory / "samples"
    if experiment.evaluation:
        engine, _ = load_engine(directory, report)
        engine = replace(engine, moved=moved)
        check_suites(engine, experiment.evaluation)
        metrics = evaluate(engine, experiment.evaluation, samples, report)
    else:
        _, parameters = abstract_model(experiment)
        metrics = {"parameters": sum(x.size for x in jax.tree.leaves(parameters))}
    steps, data = experiment.train.steps, experiment.data
    summary = {
        **metrics,
        "steps": steps,
        "tokens": steps * data.batch_rows * data.row_length,
        **trained_flops(directory),
        "train_seconds": round(train_seconds, 1),
        **account.summary(),
    }
    if is_leader():
        samples.mkdir(exist_ok=True)
        curves(directory, samples / "curves.png")
        write_json(directory / "summary.json", summary)
    return summary


def trained_flops(directory: Path) -> dict[str, float]:
    """`model_flops` of all steps of a run, from its log; empty where they were not counted.

    A step whose row was lost with a restart counts as much as those logged after it.
    """
    total, before = 0.0, 0
    for row in read_metrics(directory):
        if row.get("model_flops_per_step") is None:
            return {}
        total += row["model_flops_per_step"] * (row["step"] - before)
        before = row["step"]
    return {"model_flops": total} if before else {}
