"""Runs on GKE as a JobSet: one job for each TPU slice, one pod for each of its hosts.

    python launch/gke.py start scout --topology v5e:4x4 --slices 2 --image IMAGE \\
        --mount runs:/runs -- experiments/digits.py --run-dir /runs/digits
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    write,
)
from tpus import CHIPS_OF_A_HOST, Slice, find_slice

ACTIONS = ("start", "status", "follow", "stop")
MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    # All pods of a job on one node pool, which is one slice, and no other job's there.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  ttlSecondsAfterFinished: 86400
  failurePolicy:
    maxRestarts: {restarts}
    restartStrategy: BlockingRecreate
    rules:
    # What podFailurePolicy gives up on is not started again; all else restarts all slices.
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # Taken away (maintenance, spot): counts as a failure that a restart mends.
          - action: Count
            onPodConditions:
            - type: DisruptionTarget
              status: "True"
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: NotIn
              values: {retriable}
        template:
          metadata:
            annotations: {annotations}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            serviceAccountName: {account}
            nodeSelector: {selector}
            tolerations: {tolerations}
            containers:
            - name: train
              image: {image}
              command: [bash, -c, {command}]
              securityContext:
                privileged: true
              resources:
                requests:
                  google.com/tpu: {chips}
                limits:
                  google.com/tpu: {chips}
              volumeMounts: {mounts}
            volumes: {volumes}
"""


def storage(mounts: Sequence[str]) -> tuple[list[dict], list[dict], bool]:
    """Mounts and volumes of each --mount, and whether one of them is a bucket."""
    places = []
    volumes = []
    for number, mount in enumerate(mounts):
        source, colon, path = mount.rpartition(":")
        if not (source and colon and path.startswith("/")) or path.startswith("//"):
            fail(f"--mount {mount} must be CLAIM:/PATH or gs://BUCKET:/PATH")
        volume: dict[str, Any] = {"persistentVolumeClaim": {"claimName": source}}
        if source.startswith("gs://"):
            bucket = source.removeprefix("gs://")
            attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
            driver = "gcsfuse.csi.storage.gke.io"
            volume = {"csi": {"driver": driver, "volumeAttributes": attributes}}
        name = f"mount-{number}"
        places.append({"name": name, "mountPath": path})
        volumes.append({"name": name, **volume})
    return places, volumes, any(mount.startswith("gs://") for mount in mounts)


def manifest(arguments, made: Slice, train: Sequence[str]) -> str:
    """The JobSet."""
    mounts, volumes, has_bucket = storage(arguments.mount)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": made.generation.accelerator,
        "cloud.google.com/gke-tpu-topology": made.layout,
    }
    tolerations = []
    if arguments.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        tolerations = [{"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if arguments.reservation:
        selector["cloud.google.com/reservation-name"] = arguments.reservation
    values: dict[str, Any] = {
        "retriable": list(RETRIABLE),
        "annotations": {"gke-gcsfuse/volumes": "true"} if has_bucket else {},
        "account": arguments.service_account,
        "selector": selector,
        "tolerations": tolerations,
        "image": arguments.image,
        "command": container_command(train),
        "mounts": mounts,
        "volumes": volumes,
    }
    return MANIFEST.format(
        name=arguments.name,
        restarts=arguments.restarts,
        slices=arguments.slices,
        hosts=made.hosts,
        grace=GRACE,
        chips=CHIPS_OF_A_HOST,
        **{name: json.dumps(value) for name, value in values.items()},  # JSON is YAML too
    )


def start(arguments, train: Sequence[str]) -> int:
    if not (arguments.topology and arguments.image):
        fail("start needs --topology, as in v5e:4x4, and --image")
    if arguments.spot and arguments.reservation:
        fail("--spot and --reservation exclude each other")
    check_positive(slices=arguments.slices)
    text = manifest(arguments, find_slice(arguments.topology), train)
    path = Path(arguments.manifests) / f"{arguments.name}.yaml"
    write(path, text, arguments.dry_run)
    kubectl = ["kubectl", "--namespace", arguments.namespace]
    return run_all([[*kubectl, "create", "--filename", str(path)]], arguments.dry_run)


def main(words: Sequence[str]) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    made.add_argument("name", help="of the JobSet")
    made.add_argument("--namespace", default="default", help="default: default")
    made.add_argument(
        "--topology", default="", metavar="NAME", help="start: one slice, as in v5e:4x4"
    )
    made.add_argument("--slices", type=int, default=1, metavar="n", help="start: default 1")
    made.add_argument("--image", default="", help="start: with transfusion_jax and jax[tpu] in it")
    made.add_argument("--spot", action="store_true", help="start: on spot nodes")
    made.add_argument("--reservation", default="", metavar="NAME", help="start: on reserved nodes")
    made.add_argument("--service-account", default="default", metavar="NAME", help="of the pods")
    made.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SOURCE:/PATH",
        help="start: a PersistentVolumeClaim or gs://BUCKET as a directory; may be repeated",
    )
    made.add_argument(
        "--manifests", default="manifests", metavar="DIR", help="where the manifest is written"
    )
    arguments, train = parse(made, words, without=set(ACTIONS) - {"start"})
    name = check_name(arguments.name)
    if arguments.action == "start":
        return start(arguments, train)
    pods = f"jobset.sigs.k8s.io/jobset-name={name}"
    leader = f"{pods},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    follow = ["logs", "--follow", "--tail=50", "--container=train"]
    commands = {
        "status": [["get", "jobset", name], ["get", "pods", "--selector", pods]],
        "follow": [[*follow, "--selector", leader]],
        "stop": [["delete", "jobset", name, "--cascade=foreground"]],  # waits for the pods
    }[arguments.action]
    kubectl = ["kubectl", "--namespace", arguments.namespace]
    return run_all([[*kubectl, *command] for command in commands], arguments.dry_run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
