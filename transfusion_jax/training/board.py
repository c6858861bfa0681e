"""Event files for TensorBoard, on a disk that may be full for a while."""

import contextlib
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class Board:
    """Event files that TensorBoard shows, without what earlier ones hold of later steps.

    Each event is written at once: the queue of tensorboardX's own writer blocks for ever when the
    disk has been full. A file in which a write failed ends there; the next event begins another.
    """

    def __init__(self, directory: Path, step: int):
        self._directory = directory
        self._writer: EventsWriter | None = None
        # Goes before the first event: it takes back what earlier files hold from this step on.
        self._start: Event | None = Event(
            step=step + 1, session_log=SessionLog(status=SessionLog.START)
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._add(step, summary=summary.scalar(name, value))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Of uint8 [H, W, C]."""
        self._add(step, summary=summary.image(name, picture, dataformats="HWC"))

    def text(self, step: int, name: str, text: str) -> None:
        self._add(step, summary=summary.text(name, text))

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        """Raises OSError if it cannot be written."""
        try:
            if self._writer is None:
                self._directory.mkdir(exist_ok=True)
                self._writer = EventsWriter(
                    str(self._directory / "events"), f".{secrets.token_hex(4)}"
                )
            if self._start:
                self._write(self._start)
                self._start = None
            self._write(Event(step=step, **content))
        except OSError:
            self._close_failed()
            raise

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    def _close_failed(self) -> None:
        """Lets go of a file that cannot be written; the next event begins another."""
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):
            if writer:
                writer.close()
