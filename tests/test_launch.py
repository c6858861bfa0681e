"""The launchers: what they print with --dry-run, and what they do with commands that are faked."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from transfusion_jax.planning.topology import CHIPS, FLAT, SMALL

LAUNCH = Path(__file__).parent.parent / "launch"
RETRIABLE = [42, *range(127, 256)]
TRAIN = "-- experiments/digits.py --run-dir '/runs/my run' --model.layers 6"
LINES = {
    "local": f"local.py --processes 2 {TRAIN}",
    "slurm": f"slurm.py scout --nodes 2 --cpus-per-task 8 --time 24:00:00 {TRAIN}",
    "tpu_vm": f"tpu_vm.py run scout --zone z {TRAIN}",
    "gke": f"gke.py start scout --topology v5e:4x4 --slices 2 --image i {TRAIN}",
    "gcluster": "gcluster.py start scout --cluster c --location l --topology v5e:4x4 --slices 2 "
    f"--image i {TRAIN}",
}


SLURM = "slurm.py a --nodes=2 --cpus-per-task=8 --time=5"


def launched(line: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a launcher to its end; by default nothing else is on the PATH."""
    script, *words = shlex.split(line)
    return subprocess.run(
        [sys.executable, str(LAUNCH / script), *words],
        capture_output=True,
        text=True,
        env={"PATH": "/nowhere", **environment},
        timeout=60,
    )


def dry(line: str) -> str:
    """What a launcher would do."""
    launcher, dashes, train = line.partition(" -- ")
    found = launched(f"{launcher} --dry-run{dashes}{train}")
    assert found.returncode == 0 and found.stderr == "", found.stderr
    return found.stdout


def command(text: str, program: str) -> list[str]:
    """The words of the one command of a program that was printed."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"$ {program} ")]
    return shlex.split(line[2:])


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_dry_run_does_nothing(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dry(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("local.py", "--processes"),
        ("local.py --processes 2", "name the experiment after --"),
        ("local.py --processes 2 --", "name the experiment after --"),
        ("local.py --processes 2 -- --model.layers 6", "name the experiment after --"),
        ("local.py --processes 2 experiments/digits.py", "unrecognized arguments"),
        ("local.py --processes 0 -- x.py", "--processes 0 must be at least 1"),
        ("local.py --processes 2 --kind tpu -- x.py", "invalid choice: 'tpu'"),
        ("local.py --processes 2 --restarts -1 -- x.py", "--restarts -1 must not be negative"),
        ("local.py --processes two -- x.py", "invalid int value: 'two'"),
        ("local.py --processes 1 -- x.py", "transfusion-jax is not installed"),
        ("slurm.py", "name"),
        ("slurm.py a --nodes 2 --cpus-per-task 8 -- x.py", "--time"),
        ("slurm.py a --nodes 2 --time 5 -- x.py", "--cpus-per-task"),
        (f"{SLURM.replace('=5', '=soon')} -- x.py", "--time soon must be MINUTES"),
        (f"{SLURM.replace('nodes=2', 'nodes=0')} -- x.py", "--nodes 0 must be at least 1"),
        (f"{SLURM.replace('=8', '=0')} -- x.py", "--cpus-per-task 0 must be at least 1"),
        (f"{SLURM} --kind tpu -- x.py", "invalid choice: 'tpu'"),
        (f"{SLURM} --kind gpu -- x.py", "--kind gpu and --gpus-per-node 0"),
        (f"{SLURM} --gpus-per-node 4 -- x.py", "--gpus-per-node 4"),
        (f"{SLURM.replace(' a ', ' a;b ')} -- x.py", "name 'a;b' must be"),
        (f"{SLURM} --array all -- x.py", "--array all must be like 0-5"),
        (f"{SLURM} --array 0-3", "name the experiment after --"),
        ("tpu_vm.py", "ACTION"),
        ("tpu_vm.py restart a --zone z", "invalid choice: 'restart'"),
        ("tpu_vm.py create a --topology v5e:4x4", "--zone"),
        ("tpu_vm.py create a --zone z", "create needs --topology"),
        ("tpu_vm.py create a --zone z --topology v9:4x4", "TPU 'v9' of --topology v9:4x4 is not"),
        ("tpu_vm.py create a --zone z --topology v5e:4x4x4", "must name 2 dimensions"),
        ("tpu_vm.py create a --zone z --topology v5p:4x4", "must name 3 dimensions"),
        ("tpu_vm.py create a --zone z --topology v5e:1x3", "whole hosts of 4 chips"),
        ("tpu_vm.py create a --zone z --topology v5e", "must name 2 dimensions"),
        ("tpu_vm.py create a --zone z --topology tpu7x:4x4x4", "on GKE only"),
        ("tpu_vm.py create a --zone z --topology v5e:4x4 --spot --reserved", "exclude each other"),
        ("tpu_vm.py create a --zone z --topology v5e:4x4 --slices 0", "--slices 0 must be"),
        ("tpu_vm.py run a --zone z", "name the experiment after --"),
        ("tpu_vm.py stop A_b --zone z", "name 'A_b' must be"),
        ("tpu_vm.py stop a --zone z", "gcloud is not installed"),
        ("gke.py start a -- x.py", "start needs --topology, as in v5e:4x4, and --image"),
        ("gke.py start a --topology v9:1 --image i -- x.py", "TPU 'v9'"),
        ("gke.py start a --topology v5e:4x4 --image i", "name the experiment after --"),
        (
            "gke.py start a --topology v5e:4x4 --image i --spot --reservation r -- x.py",
            "exclude each other",
        ),
        (
            "gke.py start a --topology v5e:4x4 --image i --mount gs://b -- x.py",
            "--mount gs://b must be CLAIM:/PATH or gs://BUCKET:/PATH",
        ),
        (f"gke.py stop {'a' * 41}", "at most 40"),
        ("gke.py follow a", "kubectl is not installed"),
        ("gcluster.py start a --cluster c -- x.py", "--location"),
        ("gcluster.py start a --cluster c --location l -- x.py", "start needs --topology"),
        ("gcluster.py stop a --cluster c --location l", "gcluster is not installed"),
        (
            f"{SLURM} --logs {__file__}/logs -- x.py",
            f"cannot write {__file__}/logs/a.sbatch: Not a directory",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(line, message):
    found = launched(line)
    assert found.returncode == 2, found
    assert message in found.stderr
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


def test_topologies_are_those_of_plan():
    script = (
        "import sys, json; from tpus import GENERATIONS, find_slice;"
        "print(json.dumps({k: g.dimensions for k, g in GENERATIONS.items()}));"
        "made = [find_slice(name) for name in sys.argv[1:]];"
        "print(json.dumps([[m.hosts, m.accelerator_type] for m in made]))"
    )
    names = [f"v5e:{layout}" for layout in FLAT] + [f"v5p:{layout}" for layout in SMALL]
    run = [sys.executable, "-c", script, *names]
    done = subprocess.run(run, cwd=LAUNCH, capture_output=True, text=True, check=True)
    kinds, made = map(json.loads, done.stdout.splitlines())
    assert kinds == {kind: chip.torus for kind, chip in CHIPS.items()}
    found = dict(zip(names, made, strict=True))
    assert found["v5e:2x2"] == [1, "v5litepod-4"] and found["v5e:16x16"] == [64, "v5litepod-256"]
    assert found["v5p:2x2x1"] == [1, "v5p-8"] and found["v5p:2x4x4"] == [8, "v5p-64"]


# Fakes


def fake(folder: Path, name: str, script: str) -> None:
    """A program on the PATH of `with_fakes`; $LOG is a file of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\nLOG={shlex.quote(str(folder / f'{name}.log'))}\n{script}\n")
    file.chmod(0o755)


def with_fakes(folder: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{folder}:/usr/bin:/bin", "PAUSE": "0", **more}


def logged(folder: Path, name: str) -> list[str]:
    file = folder / f"{name}.log"
    return file.read_text().splitlines() if file.exists() else []


def in_turn(folder: Path, check: str, train: str) -> None:
    """A transfusion-jax whose `check` and `train` do this; the latter finds the process in $ID, and
    in $TURN how often that has been started."""
    fake(
        folder,
        "transfusion-jax",
        f'echo "$*" >> "$LOG"\n'
        f'[ "$1" = train ] || {{ {check}; exit 0; }}\n'
        f'ID="${{@: -1}}"\nTURN=$(grep -c "^train.* $ID\\$" "$LOG")\n{train}',
    )


# SLURM


def batch_script(line: str) -> str:
    text = dry(line)
    assert command(text, "sbatch") == ["sbatch", "logs/scout.sbatch"]
    return text.partition("\n")[2].rpartition("$ sbatch")[0]


def test_a_slurm_job_is_warned_in_time_and_may_be_requeued():
    script = batch_script(LINES["slurm"])
    head = script.split("\n\n")[0]
    assert script.startswith("#!/bin/bash\n")
    for option in ("signal=TERM@300", "requeue", "nodes=2", "ntasks-per-node=1", "time=24:00:00"):
        assert f"#SBATCH --{option}\n" in head
    gpus = "--kind gpu --gpus-per-node 8 --sbatch=--partition=p --sbatch=--account=q --setup env.sh"
    script = batch_script(LINES["slurm"].replace(" -- ", f" {gpus} -- "))
    options = re.findall(r"^#SBATCH --(\S+)$", script, re.MULTILINE)
    assert "    srun --cpus-per-task=8 " in script  # srun does not take it from sbatch
    assert {"ntasks-per-node=8", "gpus-per-node=8", "partition=p", "account=q"} <= set(options)
    assert script.index("source env.sh || exit 2\n") < script.index("srun")


@pytest.mark.parametrize(
    ("check", "train", "restarts", "code", "requeued"),
    [
        (0, 0, "", 0, False),
        (0, 42, "", 42, True),
        (0, 134, "3", 134, True),
        (0, 137, "19", 137, True),
        (0, 137, "20", 137, False),
        (0, 1, "", 1, False),
        (0, 2, "", 2, False),
        (0, 126, "", 126, False),
        (1, 0, "", 1, False),
        (137, 0, "", 137, True),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_when_that_helps(
    tmp_path, check, train, restarts, code, requeued
):
    fake(
        tmp_path,
        "srun",
        f'echo "$*" >> "$LOG"\ncase "$*" in *" check "*) exit {check};; *) exit {train};; esac',
    )
    fake(tmp_path, "scontrol", 'echo "$*" >> "$LOG"')
    environment = with_fakes(tmp_path, SLURM_JOB_ID="7")
    if restarts:
        environment["SLURM_RESTART_COUNT"] = restarts
    run = ["bash", "-c", batch_script(LINES["slurm"])]
    assert subprocess.run(run, env=environment, capture_output=True).returncode == code
    assert logged(tmp_path, "scontrol") == (["requeue 7"] if requeued else [])
    starts = [line.split()[4] for line in logged(tmp_path, "srun")]
    assert starts == (["check"] if check else ["check", "train"])


ARRAY = (
    "slurm.py scout --array 0-3%2 --nodes 2 --cpus-per-task 8 --time 24:00:00 "
    "-- experiments/x.py --out '/runs/my x' --model.layers 6"
)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (42, True), (137, True)])
def test_a_job_of_a_slurm_array_runs_its_point_of_the_sweep(tmp_path, code, requeued):
    fake(tmp_path, "srun", f'printf "%s\\n" "$@" >> "$LOG"; exit {code}')
    fake(tmp_path, "scontrol", 'echo "$*" >> "$LOG"')
    script = batch_script(ARRAY)
    assert "#SBATCH --array=0-3%2\n" in script and "--output=logs/%x-%A_%a.log\n" in script
    environment = with_fakes(tmp_path, SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    run = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
    assert run.returncode == code
    assert logged(tmp_path, "scontrol") == (["requeue 7"] if requeued else [])
    words = logged(tmp_path, "srun")
    assert words[words.index("transfusion-jax") + 1 :] == [
        *("sweep", "experiments/x.py", "--out", "/runs/my x", "--model.layers", "6"),
        *("--index", "3"),
    ]


def test_slurm_writes_the_script_that_it_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake(tmp_path / "bin", "sbatch", 'cat "$1" >> "$LOG"')
    found = launched(LINES["slurm"], **with_fakes(tmp_path / "bin"))
    assert found.returncode == 0 and found.stdout == "$ sbatch logs/scout.sbatch\n"
    written = (tmp_path / "logs" / "scout.sbatch").read_text()
    assert written == batch_script(LINES["slurm"])
    assert logged(tmp_path / "bin", "sbatch") == written.splitlines()


# GKE


def jobset(line: str) -> dict:
    text = dry(line)
    assert command(text, "kubectl")[-2:] == ["--filename", "manifests/scout.yaml"]
    return yaml.safe_load(text.rpartition("$ kubectl")[0])


def test_a_jobset_has_a_job_for_each_slice_and_a_pod_for_each_host():
    made = jobset(LINES["gke"])
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 4, 4)
    assert spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 300 and pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["image"] == "i"
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"] == container["volumeMounts"] == pod["tolerations"] == []
    bash, flag, line = container["command"]
    assert (bash, flag) == ("bash", "-c")
    assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0


def test_a_jobset_restarts_by_exit_code():
    made = jobset(LINES["gke"].replace(" -- ", " --restarts 7 -- "))
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    disruption, codes = made["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"][
        "rules"
    ]
    assert disruption["action"] == "Count"
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (codes["action"], codes["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert codes["onExitCodes"]["values"] == RETRIABLE
    assert codes["onExitCodes"]["containerName"] == "train"
    assert len(RETRIABLE) <= 255  # Kubernetes takes no more


def test_a_jobset_on_spot_nodes_with_a_shared_disk_and_a_bucket():
    options = "--spot --mount runs:/runs --mount gs://b:/data --service-account s --namespace n"
    line = LINES["gke"].replace(" -- ", f" {options} -- ")
    assert "kubectl --namespace n create" in dry(line)  # fails where there is one of that name
    template = jobset(line)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pod = template["spec"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert pod["serviceAccountName"] == "s"
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    claim, bucket = pod["volumes"]
    assert (mounts[claim["name"]], mounts[bucket["name"]]) == ("/runs", "/data")
    assert claim["persistentVolumeClaim"] == {"claimName": "runs"}
    assert bucket["csi"]["volumeAttributes"]["bucketName"] == "b"
    # The driver and Workload Identity do not serve pods on the host's network.
    assert "hostNetwork" not in pod
    line = LINES["gke"].replace(" -- ", " --reservation r -- ")
    pod = jobset(line)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "r"


def test_gke_and_gcluster_watch_and_stop():
    kubectl = "$ kubectl --namespace default"
    assert dry("gke.py status a").splitlines() == [
        f"{kubectl} get jobset a",
        f"{kubectl} get pods --selector jobset.sigs.k8s.io/jobset-name=a",
    ]
    assert "logs --follow" in dry("gke.py follow a")
    assert dry("gke.py stop a") == f"{kubectl} delete jobset a --cascade=foreground\n"
    place = "--cluster c --location l"
    for action, expected in [
        ("status", f"list {place} --name-contains a"),
        ("follow", f"logs {place} a --follow"),
        ("stop", f"cancel {place} a"),
    ]:
        assert dry(f"gcluster.py {action} a {place}") == f"$ gcluster job {expected}\n"


def test_gcluster_is_asked_for_the_same():
    options = " --mount runs:/runs --service-account s -- "
    words = command(dry(LINES["gcluster"].replace(" -- ", options)), "gcluster")
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[1:3] == ["job", "submit"]
    assert given["--compute-type"] == "ct5lp-hightpu-4t" and given["--topology"] == "4x4"
    assert (given["--num-slices"], given["--restarts"]) == ("2", "20")
    assert given["--restart-on-exit-codes"] == ",".join(map(str, RETRIABLE))
    assert int(given["--grace-period"].removesuffix("s")) >= 300
    assert (given["--mount"], given["--service-account"]) == ("runs:/runs:rw", "s")


# TPU VMs


def test_queued_resources_of_one_slice_and_of_several():
    one = command(dry("tpu_vm.py create a --zone z --project p --topology v5p:4x4x4"), "gcloud")
    assert one[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "a"]
    assert {"--zone=z", "--project=p", "--accelerator-type=v5p-128", "--node-id=a"} <= set(one)
    assert "--runtime-version=v2-alpha-tpuv5" in one
    assert not {"--spot", "--reserved"} & set(one)
    several = "tpu_vm.py create a --zone z --topology v5e:4x4 --slices 3 --spot --runtime r"
    words = command(dry(several), "gcloud")
    assert {"--node-count=3", "--node-prefix=a", "--spot", "--runtime-version=r"} <= set(words)
    assert not [word for word in words if word.startswith("--node-id")]
    assert "--reserved" in dry("tpu_vm.py create a --zone z --topology v5e:4x4 --reserved")


@pytest.mark.parametrize("action", ["install", "run", "stop"])
def test_what_concerns_all_workers_reaches_all(action):
    train = " -- x.py" if action == "run" else ""
    text = dry(f"tpu_vm.py {action} a --zone z{train}")
    remote = [line for line in text.splitlines() if " ssh " in line or " scp " in line]
    assert remote and all("--node=all --worker=all" in line for line in remote)
    for line in remote:
        for word in shlex.split(line[2:]):
            if word.startswith("--command="):
                shell = word.removeprefix("--command=")
                assert subprocess.run(["bash", "-n", "-c", shell]).returncode == 0


def test_follow_shows_one_worker_and_delete_asks_nothing():
    assert "--worker" not in dry("tpu_vm.py follow a --zone z")
    assert {"--force", "--quiet"} <= set(command(dry("tpu_vm.py delete a --zone z"), "gcloud"))


def test_a_worker_starts_in_the_background_and_is_stopped_by_its_number(tmp_path):
    """The commands that go to a worker, run here with a home of their own."""
    home = tmp_path / "home"
    source = home / "transfusion" / "source" / "launch"
    source.mkdir(parents=True)
    shutil.copy(LAUNCH / "rerun.sh", source)
    binaries = home / "transfusion" / "venv" / "bin"
    binaries.mkdir(parents=True)
    ready = tmp_path / "ready"
    train = f"trap 'kill $!; exit 42' TERM; sleep 60 & touch '{ready}'; wait"
    in_turn(binaries, "true", train)

    def remote(line: str) -> None:
        word = command(dry(line), "gcloud")[-1].removeprefix("--command=")
        environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        subprocess.run(["bash", "-c", word], env=environment, check=True, timeout=20)

    remote("tpu_vm.py run a --zone z -- x.py --run-dir r")
    log = home / "a.log"
    wait_until(ready.exists)
    number = int((home / "a.pid").read_text())
    remote("tpu_vm.py stop a --zone z")
    wait_until(lambda: "exit code" in log.read_text())
    assert log.read_text() == "exit code 42\n"  # and it is not started again
    wait_until(lambda: not Path(f"/proc/{number}").exists())
    assert logged(binaries, "transfusion-jax") == [
        "check x.py --run-dir r",
        "train x.py --run-dir r",
    ]


def wait_until(condition, patience: float = 20.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "starts"),
    [
        ([0], 5, 0, 1),
        ([42, 134, 0], 5, 0, 3),
        ([42, 1], 5, 1, 2),
        ([2], 5, 2, 1),
        ([126], 5, 126, 1),
        ([127, 255, 0], 5, 0, 3),
        ([42, 42, 42, 42], 2, 42, 3),
    ],
)
def test_rerun_starts_again_only_when_that_helps(tmp_path, codes, restarts, code, starts):
    ends = " ".join(map(str, codes))
    in_turn(tmp_path, "true", f'ends=({ends}); exit "${{ends[$((TURN - 1))]}}"')
    run = ["bash", str(LAUNCH / "rerun.sh"), str(restarts), "x.py", "--name", "a b"]
    found = subprocess.run(run, env=with_fakes(tmp_path), capture_output=True)
    assert found.returncode == code
    assert (
        logged(tmp_path, "transfusion-jax")
        == [
            "check x.py --name a b",
            "train x.py --name a b",
        ]
        * starts
    )


@pytest.mark.parametrize("given", ["--run-dir 'my run'", "'--run-dir=my run'"])
@pytest.mark.parametrize(
    ("saves", "code", "starts"),
    [
        ("$((TURN * 5))", 0, 12),  # 50 after 5: as numbers, not as words
        ("$((50 - TURN))", 42, 2),  # only the first gets further than all before
        ("5.orbax-checkpoint-tmp", 42, 2),
    ],
)
def test_only_restarts_without_progress_are_counted(
    tmp_path, monkeypatch, given, saves, code, starts
):
    """The first start finds the checkpoint of an earlier one."""
    monkeypatch.chdir(tmp_path)
    train = f'mkdir -p "my run/checkpoints/{saves}"; [ $TURN = 12 ] || exit 42'
    fake(
        tmp_path,
        "transfusion-jax",
        f'[ $1 = train ] || exit 0; echo >> "$LOG"\nTURN=$(wc -l < "$LOG"); {train}',
    )
    words = ["x.py", *shlex.split(given)]
    for command in (
        ["bash", str(LAUNCH / "rerun.sh"), "1", *words],
        [
            sys.executable,
            str(LAUNCH / "local.py"),
            *"--processes 1 --restarts 1 --".split(),
            *words,
        ],
    ):
        (tmp_path / "my run" / "checkpoints" / "4").mkdir(parents=True)
        done = subprocess.run(command, env=with_fakes(tmp_path), timeout=60, capture_output=True)
        assert (done.returncode, len(logged(tmp_path, "transfusion-jax"))) == (code, starts), done
        shutil.rmtree(tmp_path / "my run")
        (tmp_path / "transfusion-jax.log").unlink()


def test_rerun_knows_the_code_of_a_run_that_ends_as_soon_as_it_is_told(tmp_path):
    """Both on one core, where the run has ended before the shell asks whether it is still there."""
    ready = tmp_path / "ready"
    quick = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
        f"open({str(ready)!r}, 'w'); signal.sigwait([signal.SIGTERM]); os._exit(42)"
    )
    in_turn(tmp_path, "true", f"exec {shlex.join([sys.executable, '-c', quick])}")
    core = min(os.sched_getaffinity(0))
    run = ["taskset", "-c", str(core), "bash", str(LAUNCH / "rerun.sh"), "1", "x.py"]
    codes = []
    for _ in range(5):
        ready.unlink(missing_ok=True)
        with subprocess.Popen(run, env=with_fakes(tmp_path), stdout=subprocess.DEVNULL) as rerun:
            wait_until(ready.exists)
            time.sleep(0.05)
            rerun.terminate()
            codes.append(rerun.wait(20))
    assert codes == [42] * 5


def test_rerun_does_not_train_where_the_check_fails(tmp_path):
    in_turn(tmp_path, "exit 1", "exit 0")
    run = ["bash", str(LAUNCH / "rerun.sh"), "5", "x.py"]
    found = subprocess.run(run, env=with_fakes(tmp_path), capture_output=True)
    assert found.returncode == 1 and logged(tmp_path, "transfusion-jax") == ["check x.py"]
    for words in ([], ["x.py"], ["five", "x.py"]):
        found = subprocess.run(["bash", run[1], *words], capture_output=True, text=True)
        assert found.returncode == 2 and found.stderr.startswith("error: ")


# Several processes on this machine


def start_local(folder: Path, options: str = "") -> subprocess.Popen:
    words = shlex.split(f"--processes 2 {options} -- x.py")
    return subprocess.Popen(
        [sys.executable, str(LAUNCH / "local.py"), *words],
        env=with_fakes(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("train", "options", "code", "starts"),
    [
        ("exit 0", "", 0, 1),
        ("[ $TURN = 1 ] && exit 42; exit 0", "", 0, 2),
        ("[ $TURN = 1 ] && kill -KILL $$; exit 0", "", 0, 2),
        ("[ $ID = 1 ] && exit 1; exit 134", "", 1, 1),
        ("exit 2", "", 2, 1),
        ("exit 42", "--restarts 2", 42, 3),
        ("[ $ID = 1 ] && [ $TURN = 1 ] && exit 42; exit 0", "", 0, 2),
    ],
)
def test_local_processes_restart_together_only_when_that_helps(
    tmp_path, train, options, code, starts
):
    in_turn(tmp_path, "true", train)
    running = start_local(tmp_path, options)
    said = running.communicate(timeout=60)
    assert running.returncode == code, said
    lines = logged(tmp_path, "transfusion-jax")
    for process in range(2):
        own = [line for line in lines if line.endswith(f"--process-id {process}")]
        assert [line.split()[0] for line in own] == ["check", "train"] * starts
        assert all("--num-processes 2" in line for line in own)
    addresses = [line.split("--coordinator ")[1].split()[0] for line in lines]
    assert len(set(addresses)) == 2 * starts  # one for all processes of a start
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses)


def test_a_check_that_fails_trains_nothing(tmp_path):
    in_turn(tmp_path, "exit 1", "exit 0")
    running = start_local(tmp_path)
    running.communicate(timeout=60)
    assert running.returncode == 1
    assert {line.split()[0] for line in logged(tmp_path, "transfusion-jax")} == {"check"}


def test_when_one_ends_the_others_are_killed_if_they_hang(tmp_path):
    hang = f'echo $$ > "{tmp_path}/hanging"; trap "" TERM; while :; do sleep 0.1; done'
    train = f"[ $ID = 0 ] && {{ sleep 0.5; exit 1; }}; {hang}"
    in_turn(tmp_path, "true", train)
    running = start_local(tmp_path, "--patience 1")
    running.communicate(timeout=60)
    assert running.returncode == 1
    assert not Path(f"/proc/{(tmp_path / 'hanging').read_text().strip()}").exists()


def test_a_process_that_was_killed_for_hanging_does_not_hide_why_the_other_ended(tmp_path):
    train = "[ $TURN = 2 ] && exit 0; [ $ID = 0 ] && exit 42; sleep 60"
    in_turn(tmp_path, "true", train)
    running = start_local(tmp_path, "--patience 1")
    said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert "exit code 42: starting again" in said[0]


@pytest.mark.parametrize(("last", "code"), [("exit 42", 42), ("exit 0", 0), ("kill -9 $$", 42)])
def test_a_stopped_run_says_whether_it_was_done(tmp_path, last, code):
    in_turn(tmp_path, "true", f"trap 'kill $!; {last}' TERM; sleep 60 & wait")
    running = start_local(tmp_path)
    wait_until(lambda: str(logged(tmp_path, "transfusion-jax")).count("train") == 2)
    time.sleep(0.5)  # until both have set their traps
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == code
    assert str(logged(tmp_path, "transfusion-jax")).count("train") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_and_ends_the_run(tmp_path, number):
    train = "trap 'kill $!; echo stopped >> \"$LOG\"; exit 42' TERM; sleep 60 & wait"
    in_turn(tmp_path, "true", train)
    running = start_local(tmp_path)
    wait_until(lambda: str(logged(tmp_path, "transfusion-jax")).count("train") == 2)
    time.sleep(0.5)  # until both have set their traps
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == 42
    assert logged(tmp_path, "transfusion-jax").count("stopped") == 2


def test_local_processes_compute_on_what_they_are_told():
    cpu = dry("local.py --processes 2 -- x.py")
    assert cpu.count("$ JAX_PLATFORMS=cpu transfusion-jax") == 4
    gpu = dry("local.py --processes 2 --kind gpu -- x.py").splitlines()
    assert [line.split()[1] for line in gpu] == [f"CUDA_VISIBLE_DEVICES={i}" for i in (0, 1)] * 2
    alone = dry("local.py --processes 1 -- x.py")
    assert "--coordinator" not in alone


# Awkward words

WORDS = [
    "my runs/x y.py", "it's", 'a "b"', "$(exit 9)", "$HOME", "$$", "a;b&c", "*", "back\\slash", "é",
    "",
]  # fmt: skip


def in_kubernetes(word: str) -> str:
    """What becomes of a word of a container's command: $$ is $, and $(NAME) the variable."""
    kept = word.replace("$$", "\0")
    assert "$(" not in kept
    return kept.replace("\0", "$")


def shell_command(name: str, line: str) -> list[str]:
    """The command that a launcher's dry run would run in the end, as far as it is a shell's."""
    if name == "slurm":
        return ["bash", "-c", batch_script(line)]
    if name == "gke":
        pod = jobset(line)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        return [in_kubernetes(word) for word in pod["containers"][0]["command"]]
    if name == "gcluster":
        return ["bash", "-c", in_kubernetes(command(dry(line), "gcluster")[-1])]
    remote = command(dry(line), "gcloud")[-1].removeprefix("--command=")
    started = re.search(r"nohup (.*) >> ~", remote)[1]
    return ["bash", "-c", started.replace("launch/rerun.sh", f"'{LAUNCH}/rerun.sh'")]


@pytest.mark.parametrize("name", LINES)
def test_awkward_words_reach_check_and_train_as_they_are(name, tmp_path):
    fake(tmp_path, "transfusion-jax", r"""printf '%s\n' "$@" >> "$LOG" """)
    fake(tmp_path, "srun", 'while [ "$1" != transfusion-jax ]; do shift; done; exec "$@"')
    line = f"{LINES[name].partition(' -- ')[0]} -- {shlex.join(WORDS)}"
    if name == "local":
        line = line.replace("--processes 2", "--processes 1")
        assert launched(line, **with_fakes(tmp_path)).returncode == 0
    else:
        subprocess.run(shell_command(name, line), env=with_fakes(tmp_path), check=True, timeout=20)
    assert logged(tmp_path, "transfusion-jax") == ["check", *WORDS, "train", *WORDS]


def test_a_container_that_is_stopped_while_it_checks_does_not_train(tmp_path):
    fake(tmp_path, "transfusion-jax", 'echo "$1" >> "$LOG"; sleep 1')
    running = subprocess.Popen(shell_command("gke", LINES["gke"]), env=with_fakes(tmp_path))
    wait_until(lambda: logged(tmp_path, "transfusion-jax"))
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=20) == 42
    assert logged(tmp_path, "transfusion-jax") == ["check"]


TINY = """
from dataclasses import replace
from runpy import run_path

from transfusion_jax.config import ProcessesConfig

def config():
    base = run_path({digits!r})["config"]()
    return replace(
        base,
        name="tiny",
        model=replace(base.model, layers=1, width=32, heads=2, mlp_width=64),
        data=replace(base.data, batch_rows=4),
        optimizer=replace(base.optimizer, warmup_steps=2),
        train=replace(base.train, steps=200, log_every=1, checkpoint_every=5),
        processes=ProcessesConfig(heartbeat_timeout=10, initialization_timeout=60),
        evaluation=(),
    )
"""


def steps_of(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def checkpoints_of(run_dir: Path) -> list[int]:
    names = [place.name for place in (run_dir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def last(values: list[int]) -> int:
    return max(values, default=0)


@pytest.fixture
def launch_tiny(tmp_path):
    """Starts two processes that train; whatever becomes of the test, none is left."""
    experiment = TINY.format(digits=str(LAUNCH.parent / "experiments" / "digits.py"))
    (tmp_path / "tiny.py").write_text(experiment)
    fake(tmp_path, "transfusion-jax", f'exec {sys.executable} -m transfusion_jax "$@"')
    environment = {**os.environ, **with_fakes(tmp_path), "PYTHONPATH": str(LAUNCH.parent)}
    started = []

    def start() -> subprocess.Popen:
        words = ["--processes", "2", "--patience", "60", "--restarts", "2", "--", "tiny.py"]
        started.append(
            subprocess.Popen(
                [sys.executable, str(LAUNCH / "local.py"), *words, "--run-dir", "run"],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for running in started:
        running.terminate()
        running.communicate(timeout=100)


@pytest.mark.slow  # trains for a minute
def test_a_real_run_survives_a_lost_process_stops_when_told_and_resumes(tmp_path, launch_tiny):
    run_dir = tmp_path / "run"
    running = launch_tiny()
    wait_until(lambda: last(checkpoints_of(run_dir)) >= 5, 100)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    seen = last(steps_of(run_dir))
    wait_until(lambda: last(steps_of(run_dir)) > seen + 20, 100)  # it was started again
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=100)[0]
    assert running.returncode == 42, said
    assert "starting again, 1 restarts left" in said
    (saved,) = map(int, re.findall(r"stopped by SIGTERM.* at step (\d+), saved", said))
    assert last(checkpoints_of(run_dir)) == saved
    running = launch_tiny()
    said = running.communicate(timeout=100)[0]
    assert running.returncode == 0, said
    assert f"resuming from checkpoint run/checkpoints/{saved}" in said
    assert steps_of(run_dir) == list(range(1, 201))


# What the README says


def test_every_command_of_the_readme_is_taken_as_it_is_written():
    text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python launch/")]
    launchers = {path.name for path in LAUNCH.glob("*.py")} - {"launcher.py", "tpus.py"}
    assert {line.split()[1].removeprefix("launch/") for line in lines} == launchers
    for line in lines:
        dry(" ".join(line.removeprefix("python launch/").split()))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shell_scripts_have_no_known_mistakes(tmp_path):
    script = tmp_path / "scout.sbatch"
    script.write_text(batch_script(LINES["slurm"]))
    for file in (LAUNCH / "rerun.sh", script):
        subprocess.run(["shellcheck", str(file)], check=True)
