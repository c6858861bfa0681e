"""Submits a run to SLURM; the job puts itself back into the queue until the run is done.

    python launch/slurm.py digits --nodes 2 --cpus-per-task 8 --time 24:00:00 \\
        -- experiments/digits.py --run-dir /shared/digits

With `--array 0-5`, the points 0 to 5 of a sweep, each in a job of its own:

    python launch/slurm.py sizes --array 0-5 --nodes 1 --cpus-per-task 8 --time 24:00:00 \\
        -- experiments/sizes.py --out /shared/sizes
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import GRACE, check_name, check_positive, fail, parse, parser, run, write

KINDS = ("cpu", "gpu")
ARRAY = r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?"
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --signal=TERM@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
{options}
{setup}
# When one task ends, the others have time to notice and to save. srun does not take --cpus-per-task
# from sbatch.
run() {{
    srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait={grace} transfusion-jax "$@"
}}
{work}
code=$?
restarts=${{SLURM_RESTART_COUNT:-0}}
echo "exit code $code after $restarts restarts"
if ((code == 42 || code >= 127)) && ((restarts < {restarts})); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def script(arguments, train: Sequence[str]) -> str:
    """The batch script."""
    gpus = arguments.gpus_per_node
    words = shlex.join(train)
    options = [f"--gpus-per-node={gpus}"] if gpus else []
    if arguments.array:
        options.append(f"--array={arguments.array}")
        work, job = f'run sweep {words} --index "$SLURM_ARRAY_TASK_ID"', "%A_%a"
    else:
        work, job = f"run check {words} && run train {words}", "%j"
    options += arguments.sbatch
    return SCRIPT.format(
        name=arguments.name,
        nodes=arguments.nodes,
        # JAX gives each task of a node one of its GPUs.
        tasks=gpus or 1,
        cpus=arguments.cpus_per_task,
        time=arguments.time,
        grace=GRACE,
        log=shlex.quote(f"{arguments.logs}/%x-{job}.log"),
        options="".join(f"#SBATCH {shlex.quote(option)}\n" for option in options),
        setup=f"source {shlex.quote(arguments.setup)} || exit 2\n" if arguments.setup else "",
        work=work,
        restarts=arguments.restarts,
    )


def main(words: Sequence[str]) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("name", help="of the job")
    made.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    made.add_argument(
        "--time", required=True, metavar="D-HH:MM:SS", help="longest time of one start of the job"
    )
    made.add_argument(
        "--cpus-per-task", type=int, required=True, metavar="C", help="cores of each process"
    )
    made.add_argument(
        "--array",
        default="",
        metavar="RANGE",
        help="one job for each of these points of a sweep, as in 0-5 or 0-31%%4 (four at a time); "
        "after --: what `transfusion-jax sweep` takes, a sweep file first",
    )
    made.add_argument("--kind", default="cpu", choices=KINDS, help="default: cpu")
    made.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="G", help="with --kind gpu: tasks and GPUs"
    )
    made.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option of sbatch, as in --sbatch=--partition=NAME; may be repeated",
    )
    made.add_argument(
        "--setup", default="", metavar="FILE", help="sourced first: modules, virtual environment"
    )
    made.add_argument(
        "--logs", default="logs", metavar="DIR", help="for outputs and the script (default: logs)"
    )
    arguments, train = parse(made, words)
    check_name(arguments.name)
    check_positive(nodes=arguments.nodes, cpus_per_task=arguments.cpus_per_task)
    if (arguments.kind == "gpu") != (arguments.gpus_per_node > 0):
        fail(f"--kind gpu and --gpus-per-node {arguments.gpus_per_node} go together")
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", arguments.time):
        fail(f"--time {arguments.time} must be MINUTES, HH:MM:SS or D-HH:MM:SS")
    if arguments.array and not re.fullmatch(ARRAY, arguments.array):
        fail(f"--array {arguments.array} must be like 0-5, 0,3,7 or 0-31%4")
    path = Path(arguments.logs) / f"{arguments.name}.sbatch"
    write(path, script(arguments, train), arguments.dry_run)
    return run(["sbatch", str(path)], arguments.dry_run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
