"""Runs on Cloud TPU VMs, asked for as a queued resource: one slice, or several of the same kind.

    python launch/tpu_vm.py create scout --zone us-west4-a --topology v5e:4x4 --spot
    python launch/tpu_vm.py install scout --zone us-west4-a
    python launch/tpu_vm.py run scout --zone us-west4-a \\
        -- experiments/digits.py --run-dir /runs/digits
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import check_name, check_positive, fail, parse, parser, run_all
from tpus import find_slice

REPOSITORY = Path(__file__).parent.parent
ACTIONS = ("create", "status", "install", "run", "follow", "stop", "delete")
VENV = "~/transfusion/venv"


def resource(verb: str, name: str, place: Sequence[str], *more: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, name, *place, *more]


def on_all(name: str, place: Sequence[str], command: str) -> list[str]:
    """A command on every worker of every slice."""
    everywhere = ("--node=all", "--worker=all", f"--command={command}")
    return resource("ssh", name, place, *everywhere)


def create(arguments, place: Sequence[str]) -> list[list[str]]:
    if not arguments.topology:
        fail("create needs --topology, as in v5e:4x4")
    if arguments.spot and arguments.reserved:
        fail("--spot and --reserved exclude each other")
    check_positive(slices=arguments.slices)
    made = find_slice(arguments.topology)
    if not made.generation.vm:
        fail(f"{arguments.topology} is offered on GKE only: launch/gke.py")
    nodes = [f"--node-id={arguments.name}"]
    if arguments.slices > 1:
        nodes = [f"--node-count={arguments.slices}", f"--node-prefix={arguments.name}"]
    options = [f"--{kind}" for kind in ("spot", "reserved") if getattr(arguments, kind)]
    kind = f"--accelerator-type={made.accelerator_type}"
    runtime = f"--runtime-version={arguments.runtime or made.generation.runtime}"
    return [resource("create", arguments.name, place, kind, runtime, *nodes, *options)]


def install(name: str, place: Sequence[str]) -> list[list[str]]:
    """This checkout, as last committed, in an environment of its own on every worker."""
    archive = f"/tmp/{name}.tar.gz"
    steps = (
        "rm -rf ~/transfusion/source",
        "mkdir -p ~/transfusion/source",
        f"tar -xzf ~/{name}.tar.gz -C ~/transfusion/source",
        "python3 -m pip install --user --quiet uv",
        f"~/.local/bin/uv venv --quiet --clear --python 3.12 {VENV}",
        f'~/.local/bin/uv pip install --quiet --python {VENV} "$HOME/transfusion/source[tpu]"',
    )
    copy = ["gcloud", "compute", "tpus", "queued-resources", "scp", archive, f"{name}:"]
    return [
        ["git", "-C", str(REPOSITORY), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        [*copy, *place, "--node=all", "--worker=all"],
        on_all(name, place, " && ".join(steps)),
    ]


def start(name: str, place: Sequence[str], train: Sequence[str], restarts: int) -> list[list[str]]:
    """rerun.sh in the background of every worker; they find each other, and restart together."""
    line = shlex.join(["bash", "launch/rerun.sh", str(restarts), *train])
    command = (
        f"! kill -0 $(cat ~/{name}.pid 2>/dev/null) 2>/dev/null || "
        f"{{ echo {name} is running already >&2; exit 1; }}; "
        'cd ~/transfusion/source && export PATH="$HOME/transfusion/venv/bin:$PATH" && '
        f"{{ nohup {line} >> ~/{name}.log 2>&1 < /dev/null & echo $! > ~/{name}.pid; }}"
    )
    return [on_all(name, place, command)]


def commands(arguments, train: Sequence[str]) -> list[list[str]]:
    """What an action does."""
    name = arguments.name
    place = [f"--zone={arguments.zone}"]
    if arguments.project:
        place.append(f"--project={arguments.project}")
    if arguments.action == "create":
        return create(arguments, place)
    if arguments.action == "install":
        return install(name, place)
    if arguments.action == "run":
        return start(name, place, train, arguments.restarts)
    one_line = {
        "status": resource("describe", name, place, "--format=value(state.state)"),
        "follow": resource("ssh", name, place, f"--command=tail -n 50 -F ~/{name}.log"),
        "stop": on_all(name, place, f"kill -TERM $(cat ~/{name}.pid)"),
        "delete": resource("delete", name, place, "--force", "--quiet"),
    }
    return [one_line[arguments.action]]


def main(words: Sequence[str]) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    made.add_argument("name", help="of the queued resource")
    made.add_argument("--zone", required=True, help="as in us-west4-a")
    made.add_argument("--project", default="", help="default: gcloud's own")
    made.add_argument(
        "--topology", default="", metavar="NAME", help="create: one slice, as in v5e:4x4"
    )
    made.add_argument("--slices", type=int, default=1, metavar="n", help="create: default 1")
    made.add_argument("--spot", action="store_true", help="create: cheap, may be taken away")
    made.add_argument("--reserved", action="store_true", help="create: from your reservation")
    made.add_argument("--runtime", default="", metavar="VERSION", help="create: software version")
    arguments, train = parse(made, words, without=set(ACTIONS) - {"run"})
    check_name(arguments.name)
    return run_all(commands(arguments, train), arguments.dry_run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
