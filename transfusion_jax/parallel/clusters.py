"""Where JAX would join the wrong number of processes, though it knows the cluster."""

import os

from jax._src import clusters

from transfusion_jax.errors import require

JOBS_OF_A_JOBSET = "jobset.sigs.k8s.io/global-replicas"  # a label of each of its jobs


def alone_in_a_step() -> bool:
    """Whether this process is the only task of a step of SLURM, in an allocation of several.

    So it is in the shell that `salloc` opens where SLURM is told to (`use_interactive_step`): JAX
    takes the step for one of `srun`, and waits there for as many tasks as the allocation has.
    """
    count = {name: os.environ.get(f"SLURM_{name}", "1") for name in ("STEP_NUM_TASKS", "NTASKS")}
    return (
        "SLURM_STEP_NUM_TASKS" in os.environ
        and count["STEP_NUM_TASKS"] == "1" != count["NTASKS"]
        and _chosen() is clusters.SlurmCluster
    )


def check_kubernetes() -> None:
    """Raises ValueError in a pod of a JobSet of several jobs, without TPUs.

    JAX counts the pods of one job there, so each job would be a run of its own.
    """
    if "KUBERNETES_SERVICE_HOST" not in os.environ or _chosen() is not clusters.K8sCluster:
        return
    try:
        labels = clusters.K8sCluster._job().metadata.labels or {}
    except KeyError as error:
        raise ValueError(f"this pod does not say which job it is of: it has no {error}") from None
    jobs = int(labels.get(JOBS_OF_A_JOBSET, 1))
    require(
        jobs == 1,
        f"this pod belongs to a JobSet of {jobs} jobs, of which JAX would join one: give "
        "--coordinator, --num-processes and --process-id",
    )


def _chosen() -> type | None:
    """The cluster that JAX takes: the first that is there."""
    known = (env for env in clusters.ClusterEnv._cluster_types if not env.opt_in_only_method)
    return next((env for env in known if env.is_env_present()), None)
