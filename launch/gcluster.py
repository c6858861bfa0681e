"""Runs on GKE through Cluster Toolkit, which writes the JobSet and queues it with Kueue.

    python launch/gcluster.py start scout --cluster pods --location us-west4 \\
        --topology v5e:4x4 --image IMAGE --mount runs:/runs \\
        -- experiments/digits.py --run-dir /runs/digits
"""

import sys
from collections.abc import Sequence

from launcher import (
    GRACE,
    RETRIABLE,
    check_name,
    check_positive,
    container_command,
    fail,
    parse,
    parser,
    run_all,
)
from tpus import find_slice

ACTIONS = ("start", "status", "follow", "stop")


def start(arguments, train: Sequence[str]) -> list[str]:
    """The flags of `gcluster job submit`."""
    if not (arguments.topology and arguments.image):
        fail("start needs --topology, as in v5e:4x4, and --image")
    check_positive(slices=arguments.slices)
    made = find_slice(arguments.topology)
    return [
        *("--name", arguments.name),
        *("--compute-type", made.generation.machine),
        *("--topology", made.layout),
        *("--num-slices", str(arguments.slices)),
        *("--image", arguments.image),
        *("--restarts", str(arguments.restarts)),
        *("--restart-on-exit-codes", ",".join(map(str, RETRIABLE))),
        *("--grace-period", f"{GRACE}s"),
        *(("--queue", arguments.queue) if arguments.queue else ()),
        *(("--service-account", arguments.service_account) if arguments.service_account else ()),
        *(("--mount", f"{arguments.mount}:rw") if arguments.mount else ()),
        *("--command", container_command(train)),
    ]


def main(words: Sequence[str]) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    made.add_argument("name", help="of the workload")
    made.add_argument("--cluster", required=True, help="the GKE cluster")
    made.add_argument("--location", required=True, help="its region or zone")
    made.add_argument("--project", default="", help="default: gcloud's own")
    made.add_argument(
        "--topology", default="", metavar="NAME", help="start: one slice, as in v5e:4x4"
    )
    made.add_argument("--slices", type=int, default=1, metavar="n", help="start: default 1")
    made.add_argument("--image", default="", help="start: with transfusion_jax and jax[tpu] in it")
    made.add_argument("--queue", default="", metavar="NAME", help="start: the LocalQueue of Kueue")
    made.add_argument(
        "--service-account",
        default="",
        metavar="NAME",
        help="start: account of the pods",
    )
    made.add_argument(
        "--mount",
        default="",
        metavar="SOURCE:/PATH",
        help="start: gs://BUCKET or a PersistentVolumeClaim as a directory, to read and write",
    )
    arguments, train = parse(made, words, without=set(ACTIONS) - {"start"})
    name = check_name(arguments.name)
    place = ["--cluster", arguments.cluster, "--location", arguments.location]
    if arguments.project:
        place += ["--project", arguments.project]
    if arguments.action == "start":
        verb, more = "submit", start(arguments, train)
    elif arguments.action == "status":
        verb, more = "list", ["--name-contains", name]
    elif arguments.action == "follow":
        verb, more = "logs", [name, "--follow"]
    else:
        verb, more = "cancel", [name]
    return run_all([["gcluster", "job", verb, *place, *more]], arguments.dry_run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
