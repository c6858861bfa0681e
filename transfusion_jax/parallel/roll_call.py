"""The roll call: processes that were started by hand find each other before JAX joins them.

JAX aborts every process of a run when one cannot join, or when a stranger does. Here process 0
listens at the coordinator's address until each of the others has said who it is, and tells them
that all are present, or what is wrong. The address is free for JAX after that.
"""

import contextlib
import json
import socket
import time

from transfusion_jax.errors import require

RETRY = 0.2  # seconds before another attempt to reach process 0
PATIENCE = 2.0  # seconds for a word that is due


def call_roll(coordinator: str, count: int, number: int, timeout: float) -> None:
    """Returns in every process when all `count` are present; `number` is this one.

    Args:
      coordinator: HOST:PORT of process 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: some did not come in time, or what they say does not fit together.
    """
    deadline = time.monotonic() + timeout
    if number == 0:
        _listen(coordinator, count, timeout, deadline)
    else:
        _report(coordinator, count, number, timeout, deadline)


def _listen(coordinator: str, count: int, timeout: float, deadline: float) -> None:
    present: dict[int, socket.socket] = {}
    peers: list[socket.socket] = []
    problem = None
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(coordinator))
        while len(present) < count - 1 and problem is None:
            left = deadline - time.monotonic()
            if left <= 0:
                problem = _missing(set(range(1, count)) - set(present), count, timeout)
                break
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                peers.append(stack.enter_context(server.accept()[0]))
                problem = _admit(peers[-1], count, present)
                if len(present) == count - 1:
                    present = {n: peer for n, peer in present.items() if not _gone(peer)}
        for peer in peers:
            with contextlib.suppress(OSError):  # it has gone; JAX will say so
                peer.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    require(problem is None, problem or "")


def _server(coordinator: str) -> socket.socket:
    address = "", int(coordinator.rpartition(":")[2])
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(address)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {coordinator} ({error.strerror}): is there another "
            "--process-id 0, or another program at this port?"
        ) from error


def _admit(peer: socket.socket, count: int, present: dict[int, socket.socket]) -> str | None:
    """Enters who has called; what is wrong with it, if anything."""
    peer.settimeout(PATIENCE)
    try:
        heard = _hear(peer)
        number, total = int(heard["process"]), int(heard["count"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # not one of us
    if total != count:
        return f"process {number} was given --num-processes {total}, process 0 {count}"
    if number in present and not _gone(present[number]):
        return f"there are two processes with --process-id {number}"
    present[number] = peer
    return None


def _gone(peer: socket.socket) -> bool:
    """Whether a peer, which waits for an answer, has ended; it may have been started again."""
    peer.setblocking(False)
    try:
        return peer.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.settimeout(PATIENCE)


def _report(coordinator: str, count: int, number: int, timeout: float, deadline: float) -> None:
    host, _, port = coordinator.rpartition(":")
    problem = "nobody answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as server:
                server.settimeout(left + PATIENCE)
                server.sendall(json.dumps({"process": number, "count": count}).encode() + b"\n")
                heard = _hear(server)["problem"]
            require(heard is None, heard)
            return
        except socket.gaierror as error:
            problem = str(error.strerror)
        except OSError as error:
            problem = str(error.strerror or error)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            problem = "what answers is not a process 0 that waits for others"
        time.sleep(RETRY)
    raise ValueError(
        f"process {number} did not find process 0 at {coordinator} within "
        f"processes.initialization_timeout={timeout:g} s: {problem}"
    )


def _hear(peer: socket.socket) -> dict:
    """What a peer says: one short line, which comes whole."""
    return json.loads(peer.recv(1 << 12))


def _missing(missing: set[int], count: int, timeout: float) -> str:
    some = ", ".join(map(str, sorted(missing)[:10])) + (", ..." if len(missing) > 10 else "")
    return (
        f"{len(missing)} of {count} processes did not come within "
        f"processes.initialization_timeout={timeout:g} s: {some}"
    )
