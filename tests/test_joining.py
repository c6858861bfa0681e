"""Processes join by what SLURM, GKE and Cloud TPU VMs tell them: real ones, with fake metadata."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from jax._src import clusters

from transfusion_jax.config import ProcessesConfig
from transfusion_jax.parallel.clusters import JOBS_OF_A_JOBSET, alone_in_a_step
from transfusion_jax.parallel.processes import join

SAY_WHO = """
import os
import jax

os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where it sees no TPU
from transfusion_jax.config import ProcessesConfig
from transfusion_jax.parallel.processes import gathered, join, numbered

join(None, None, None, ProcessesConfig(initialization_timeout=60))
print([*numbered(), gathered(os.environ.get("WHO"))])
"""
SHELL_OF_SALLOC = {
    # As `env` of SLURM 22.05.8 has it, under LaunchParameters=use_interactive_step.
    "SLURM_JOB_ID": "13",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def metadata():
    """Starts servers that answer as Google Cloud's do, for instance attributes; yields what makes
    one of a mapping and returns its address."""
    servers = []

    def serve(attributes: dict[str, str]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                value = attributes.get(self.path.removeprefix(ATTRIBUTES))
                asked = self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if asked and value is not None else 404)
                self.end_headers()
                self.wfile.write((value or "").encode())

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


ATTRIBUTES = "/computeMetadata/v1/instance/attributes/"


def on_gke(serve, number: int) -> dict[str, str]:
    """What GKE sets in the pods of a JobSet of one slice of two hosts."""
    return {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "TPU_WORKER_ID": str(number),
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "GCE_METADATA_IP": serve({}),
    }


def on_gke_in_slices(serve, number: int) -> dict[str, str]:
    """Two slices of one host: two jobs of the JobSet."""
    return {
        **on_gke(serve, 0),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": str(number),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    }


def on_tpu_vms(serve, number: int) -> dict[str, str]:
    """What the metadata of Cloud TPU VMs says: a slice of two hosts."""
    attributes = {
        "agent-worker-number": str(number),
        "worker-network-endpoints": ",".join(["unknown:unknown:127.0.0.1"] * 2),
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\n",
    }
    return {"GCE_METADATA_IP": serve(attributes)}


def on_tpu_vms_in_slices(serve, number: int) -> dict[str, str]:
    slices = {"NUM_SLICES": 2, "SLICE_ID": number, "COORDINATOR_ADDRESS": "127.0.0.1:8080"}
    attributes = {
        "agent-worker-number": "0",
        "worker-network-endpoints": "unknown:unknown:127.0.0.1",
        "tpu-env": "".join(f"MEGASCALE_{name}: '{value}'\n" for name, value in slices.items()),
    }
    return {"GCE_METADATA_IP": serve(attributes)}


def say_who(settings: list[dict[str, str]]) -> list:
    """What processes with these environments know of each other."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    forced = {"JAX_PLATFORMS": "cpu", "JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAY_WHO],
            env={**os.environ, **forced, "XLA_FLAGS": "", "WHO": f"number {number}", **setting},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, setting in enumerate(settings)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert not any(process.returncode for process in processes), said
    return [json.loads(out.replace("'", '"')) for out, _ in said]


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(on_gke_in_slices, marks=pytest.mark.long),
        on_tpu_vms,
        pytest.param(on_gke, marks=pytest.mark.slow),
        pytest.param(on_tpu_vms_in_slices, marks=pytest.mark.slow),
    ],
    ids=lambda place: place.__name__,
)
def test_processes_join_by_what_the_cluster_tells_them(place, metadata):
    pytest.importorskip("requests")  # of jax[tpu]
    everyone = ["number 0", "number 1"]
    found = say_who([place(metadata, number) for number in range(2)])
    assert found == [[0, 2, everyone], [1, 2, everyone]]


def test_a_command_in_the_shell_of_salloc_is_alone(monkeypatch):
    for name, value in SHELL_OF_SALLOC.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    assert clusters.SlurmCluster.is_env_present() and clusters.SlurmCluster.get_process_count() == 2
    begun = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: begun.append(1))
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    join(None, None, None, ProcessesConfig())
    assert not begun


@pytest.mark.parametrize(
    ("step", "job", "alone"), [("1", "1", False), ("2", "2", False), ("1", "4", True)]
)
def test_a_task_of_srun_or_mpirun_is_not(monkeypatch, step, job, alone):
    for name, value in SHELL_OF_SALLOC.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", step)
    monkeypatch.setenv("SLURM_NTASKS", job)
    assert alone_in_a_step() == alone
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1")  # which JAX asks before SLURM
    assert not alone_in_a_step()
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert not alone_in_a_step()


@pytest.mark.parametrize(("jobs", "refused"), [("1", False), ("2", True)])
def test_a_jobset_of_several_jobs_without_tpus_is_refused(monkeypatch, jobs, refused):
    """JAX asks Kubernetes about one job; here, what it is told."""
    labels = {JOBS_OF_A_JOBSET: jobs}
    job = SimpleNamespace(metadata=SimpleNamespace(labels=labels))
    begun = []
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.K8sCluster, "_job", lambda: job)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: begun.append(1))
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    if refused:
        with pytest.raises(ValueError, match="a JobSet of 2 jobs"):
            join(None, None, None, ProcessesConfig())
    else:
        join(None, None, None, ProcessesConfig())
    assert bool(begun) != refused


@pytest.mark.parametrize("error", [RuntimeError("403"), KeyError("job-name")])
def test_what_kubernetes_does_not_say_is_one_line(monkeypatch, error):
    def job():
        raise error

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.K8sCluster, "_job", job)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    with pytest.raises(ValueError, match=str(error.args[0])):
        join(None, None, None, ProcessesConfig())


def test_what_a_cluster_does_not_say_is_an_error_and_no_run_of_its_own(monkeypatch):
    """As in a pod that GKE told the hosts of its slice, but not which of them it is."""
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,localhost")
    for name in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS"):
        monkeypatch.setenv(f"MEGASCALE_{name}", "")
    monkeypatch.delenv("TPU_WORKER_ID", raising=False)
    with pytest.raises(ValueError, match="does not find the other processes: invalid literal"):
        join(None, None, None, ProcessesConfig())


@pytest.mark.slow
def test_tasks_of_a_real_srun_join():
    """Where SLURM runs on this machine."""
    if not shutil.which("srun") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no SLURM here")
    command = ["srun", "--ntasks=2", "--oversubscribe", sys.executable, "-c", SAY_WHO]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(line[:6] for line in done.stdout.splitlines()) == ["[0, 2,", "[1, 2,"]
