"""The processes of a run: they join, say things to each other, and notice when one is gone.

JAX's own runtime does the work: `jax.distributed` joins processes, its coordination service keeps
what they say and watches their heartbeats.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NoReturn

import jax
from jax._src import distributed, xla_bridge

from transfusion_jax.config import ProcessesConfig
from transfusion_jax.errors import ProcessLost, WorkFailed, require
from transfusion_jax.parallel.clusters import alone_in_a_step, check_kubernetes
from transfusion_jax.parallel.roll_call import call_roll

WAIT = 1000 * 86400  # milliseconds; who is gone is known by its heartbeats, not by this
LEAVING = 2.0  # seconds that the leader, whose end would end the others, leaves them to speak
NO_CLUSTER = "coordinator_address should be defined"  # JAX's error where it knows of no others
_questions = itertools.count()


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    config: ProcessesConfig,
) -> None:
    """Joins the processes of a run; must come before the first use of a device.

    With None for all three, a process joins by itself under SLURM's `srun`, in a GKE JobSet, on a
    TPU VM or wherever else JAX knows the cluster, and is alone elsewhere.

    Args:
      coordinator: address of process 0, as in host:port.
      num_processes: in all.
      process_id: of this one, from 0.

    Raises:
      ValueError: the arguments cannot work, or the others were not found in time.
    """
    asked = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    by_hand = any(value is not None for value in asked.values())
    if by_hand:
        _check(asked)
        call_roll(coordinator, num_processes, process_id, config.initialization_timeout)
    elif xla_bridge.backends_are_initialized() or alone_in_a_step():
        return  # called from a program that computes already, or in a shell of SLURM
    jax.config.update("jax_enable_preemption_service", False)  # see `stopping.py`
    try:
        if not by_hand:
            check_kubernetes()
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.shutdown_timeout,
        )
    except ValueError as error:
        if by_hand or NO_CLUSTER not in str(error):
            raise ValueError(f"JAX does not find the other processes: {error}") from error
    except RuntimeError as error:
        raise ValueError(
            f"could not join the other processes within "
            f"processes.initialization_timeout={config.initialization_timeout} s "
            f"({_asked(asked)}): {error}"
        ) from error


def _check(asked: dict[str, Any]) -> None:
    missing = [flag for flag, value in asked.items() if value is None]
    require(not missing, f"{' and '.join(missing)} must be given too ({_asked(asked)})")
    count, number = asked["--num-processes"], asked["--process-id"]
    require(count > 0, f"--num-processes {count} must be positive")
    require(0 <= number < count, f"--process-id {number} must be in 0..{count - 1}")
    host, colon, port = asked["--coordinator"].rpartition(":")
    require(
        bool(host and colon) and port.isdecimal() and 0 < int(port) < 1 << 16,
        f"--coordinator {asked['--coordinator']} must be HOST:PORT",
    )


def _asked(asked: dict[str, Any]) -> str:
    given = [f"{flag} {value}" for flag, value in asked.items() if value is not None]
    return " ".join(given) or "found by JAX"


def joined() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def leave(code: int, at_once: bool = False) -> NoReturn:
    """Ends this process without waiting for the others, who may have failed for the same reason."""
    if is_leader() and not at_once:
        time.sleep(LEAVING)
    os._exit(code)


def is_leader() -> bool:
    """Whether this is the process that writes what only one may write."""
    return jax.process_index() == 0


def numbered() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return jax.process_index(), jax.process_count()


def gathered(value: Any) -> list[Any]:
    """What every process says here, in order of processes; values are JSON. All must say something.

    No device is involved, so it works while computations cannot.

    Raises:
      ProcessLost: another process says nothing.
    """
    count = jax.process_count()
    if count == 1:
        return [value]
    client = distributed.global_state.client
    number = next(_questions)
    question = f"transfusion_jax/{number}"
    said = json.dumps(value)
    try:
        client.key_value_set(f"{question}/{jax.process_index()}", said)
        client.wait_at_barrier(question, WAIT)
        answers = dict(client.key_value_dir_get(question))
        if is_leader() and number:  # all are here, so all have read the answers before
            client.key_value_delete(f"transfusion_jax/{number - 1}")
    except RuntimeError as error:
        silent = _silent(client, question, count)
        raise ProcessLost(f"{silent} of {count} does not answer: {error}") from error
    return [json.loads(answers[f"{question}/{process}"]) for process in range(count)]


def _silent(client: Any, question: str, count: int) -> str:
    """The first process that said nothing; process 0, which keeps what is said, if that is gone."""
    try:
        said = dict(client.key_value_dir_get(question))
    except RuntimeError:
        return "process 0"
    missing = [process for process in range(count) if f"{question}/{process}" not in said]
    return f"process {missing[0]}" if missing else "a process"  # which the error names


def leader_does(work: Callable[[], None]) -> None:
    """Runs what only one process may do in the one that leads, while the others wait; an error of
    it is raised in all, as it is in the leader, as WorkFailed in the others or as ValueError if it
    is bad input.

    Raises:
      ProcessLost: the leader is gone.
    """
    error = None
    if is_leader():
        try:
            work()
        except Exception as found:
            error = found
    line, bad_input = gathered([error and str(error), isinstance(error, ValueError)])[0]
    if error is not None:
        raise error
    if line is not None:
        raise ValueError(line) if bad_input else WorkFailed(line)


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns the error of a computation, if another process is gone, into `ProcessLost`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not joined():
            raise
        if lost := lost_processes():
            names = " and ".join(map(str, lost))
            raise ProcessLost(
                f"process {names} of {jax.process_count()} is gone; start all again to resume"
            ) from error
        raise


def lost_processes() -> list[int]:
    """Processes whose heartbeats have stopped; blocks for about the heartbeat timeout."""
    everyone = list(range(jax.process_count()))
    try:
        alive = distributed.global_state.client.get_live_nodes(everyone)
    except RuntimeError:  # the coordinator cannot be reached
        return [0]
    return [process for process in everyone if process not in alive]


def check_collectives(mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for a mesh on which several CPU processes would compute wrong values.

    The reduce-scatter between CPU processes of jaxlib 0.10 gives wrong values now and then.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    version = metadata.version("jaxlib")
    sharded = [axis for axis, size in mesh.shape.items() if axis != "data" and size > 1]
    require(
        not sharded or tuple(map(int, version.split(".")[:2])) >= (0, 12),
        f"mesh.{' and mesh.'.join(sharded)} over several CPU processes needs jaxlib 0.12 or newer: "
        f"{version} computes wrong sums there; use mesh.data only",
    )
