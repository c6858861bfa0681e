"""Faults of sweeps: points run twice, skipped, mixed up or left out of the table."""

from faults.fault import Fault

POINTS = "sweeps/points.py"
RUNNER = "sweeps/runner.py"
TABLE = "sweeps/table.py"
COMMAND = "commands/sweep.py"

FAULTS = (
    Fault(
        "a point that was never run counts as finished",
        POINTS,
        "        if not file.exists():\n            return None\n",
        "        if not file.exists():\n            return {}\n",
        "sweep",
    ),
    Fault(
        "numbers of another sampler count as those of a point",
        POINTS,
        "(ran.sampler, ran.evaluation) != (asked.sampler, asked.evaluation)",
        "ran.evaluation != asked.evaluation",
        "sweep sweep_table",
    ),
    Fault(
        "numbers of other suites count as those of a point",
        POINTS,
        "(ran.sampler, ran.evaluation) != (asked.sampler, asked.evaluation)",
        "ran.sampler != asked.sampler",
        "sweep",
    ),
    Fault(
        "directories of another config are seen when their point comes",
        POINTS,
        "        check_owner(point.experiment, point.directory)\n    for",
        "        pass\n    for",
        "sweep",
    ),
    Fault(
        "a point that ran another config than was read counts",
        RUNNER,
        "if code == 0 and (trouble := point.ran_otherwise()):",
        "if trouble := None:",
        "sweep",
    ),
    Fault(
        "a finished point is shown with what is asked for now",
        TABLE,
        "experiments = [point.as_run() for point in points]",
        "experiments = [point.experiment for point in points]",
        "sweep",
    ),
    Fault(
        "damage of another point stops an array job",
        POINTS,
        "    for point in asked:\n",
        "    for point in points:\n",
        "sweep",
    ),
    Fault(
        "a value that half of the points have is no change of theirs",
        POINTS,
        "count > len(rows) / 2",
        "count >= len(rows) / 2",
        "sweep_table",
    ),
    Fault(
        "points that differ in more than their seed are averaged",
        POINTS,
        'return replace(experiment, name="",',
        'return replace(experiment, name="", model=type(experiment.model)(),',
        "sweep_table",
    ),
    Fault(
        "a failed point stops the others",
        RUNNER,
        "                failed[point.name] = code\n",
        "                failed[point.name] = code\n                break\n",
        "sweep",
    ),
    Fault(
        "signals end the sweep but not its point",
        RUNNER,
        "self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)",
        "pass",
        "sweep::test_a_signal_reaches_the_point_that_runs_and_ends_the_sweep_with_42",
    ),
    Fault(
        "a point that is stopped is started again",
        RUNNER,
        "        _check_stop(child)\n        if left == 0",
        "        if left == 0",
        "sweep::test_a_signal_reaches_the_point_that_runs_and_ends_the_sweep_with_42",
    ),
    Fault(
        "a closed terminal leaves a point behind",
        RUNNER,
        "signal.SIGINT, signal.SIGHUP)",
        "signal.SIGINT)",
        "sweep::test_a_signal_reaches_the_point_that_runs_and_ends_the_sweep_with_42",
    ),
    Fault(
        "points that were killed are given up",
        RUNNER,
        "code == AGAIN or code > 128",
        "code == AGAIN",
        "sweep",
    ),
    Fault(
        "failed points end with 0",
        COMMAND,
        "    if failed:\n",
        "    if failed and arguments.table:\n",
        "sweep",
    ),
    Fault(
        "overrides choose the directory and do not reach the run",
        COMMAND,
        "return [*PROGRAM, *train, *overrides]",
        "return [*PROGRAM, *train]",
        "sweep",
    ),
    Fault(
        "an array job tries its point again and again",
        COMMAND,
        "RESTARTS if arguments.index is None else 0",
        "RESTARTS",
        "sweep",
    ),
    Fault(
        "published numbers stand beside the point before",
        TABLE,
        "published.get(point.name, {})",
        "published.get(rows[-1].name if rows else point.name, {})",
        "sweep_table",
    ),
    Fault(
        "two points of one name are one",
        "commands/experiments.py",
        "            if point.name in points:\n",
        "            if point.name is points:\n",
        "sweep",
    ),
    Fault(
        "FLOPs of a run leave out the steps between two rows",
        "evaluation/summary.py",
        '* (row["step"] - before)',
        "",
        "sweep::test_flops_of_a_run_are_those_of_all_its_steps",
    ),
    Fault(
        "one experiment twice",
        "commands/experiments.py",
        "if same != experiment.name:",
        "if False:",
        "sweep::test_points_that_overrides_make_one_are_refused",
    ),
    Fault(
        "a title that ends within a number",
        "sweeps/table.py",
        'shared = shared.rstrip("0123456789")',
        "pass",
        "sweep_table::test_a_title_does_not_end_within_a_number",
    ),
    Fault(
        "a mean over two of three seeds counts as one over three",
        "sweeps/table.py",
        "text if len(values) == seeds else",
        "text if values else",
        "sweep_table",
    ),
)
