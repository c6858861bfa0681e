"""All processes of a run stop at the same point, once one of them has been asked to.

JAX has a service for this, which counts training steps, and which Orbax asks about steps too. Our
points are more than steps: a run can be stopped in the middle of an evaluation. So JAX's is off.
"""

import contextlib
import threading
from typing import Any

import jax
from jax._src import distributed

POLL = 1000  # milliseconds
PATIENCE = 1000 * 86400
ASKED = "transfusion_jax/stop"


class Stopping:
    """The points that the main thread passes, in all processes alike, numbered from 1.

    Asked to stop, every process says in the background which point it passed last, so that nobody
    has to wait for a main thread, which may be waiting for another process. The one after the
    latest of these is where all stop.
    """

    def __init__(self, client: Any, process: int) -> None:
        """
        Args:
          client: of the coordination service.
          process: the number of this one.
        """
        self._client = client
        self._process = process
        self._lock = threading.Lock()
        self._passed = 0
        self._stop_at: int | None = None
        self._why = ""
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ask(self, why: str) -> None:
        """Asks all to stop."""
        self._client.key_value_set(ASKED, why, allow_overwrite=True)

    def passed(self) -> str | None:
        """Passes a point; why to stop here, if this is where all stop."""
        with self._lock:
            self._passed += 1
            return self._why if self._passed == self._stop_at else None

    def close(self) -> None:
        self._over.set()
        self._listener.join(2 * POLL / 1000)

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # a process is gone, which JAX reports
            while not self._over.is_set():
                why = self._asked()
                if why is not None:
                    self._agree(why)
                    return

    def _asked(self) -> str | None:
        try:
            return self._client.blocking_key_value_get(ASKED, POLL)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None

    def _agree(self, why: str) -> None:
        with self._lock:
            self._client.key_value_set(f"{ASKED}/{self._process}", str(self._passed))
            self._client.wait_at_barrier(ASKED, PATIENCE)
            points = [int(point) for _, point in self._client.key_value_dir_get(ASKED)]
            self._why = why
            self._stop_at = max(points) + 1


def stopping() -> Stopping:
    """Of the processes that have joined."""
    return Stopping(distributed.global_state.client, jax.process_index())
