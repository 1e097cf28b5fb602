"""TensorBoard's event files, written here: its own writer fails in a thread, with a traceback."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


class EventFile:
    """Scalars of one run in a file of their own; both methods raise `OSError` as the disk does."""

    def __init__(self, folder: Path) -> None:
        # Imported here: a short run is spared it until its end.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        who = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        # TensorBoard tells event files by this name, and orders them by it.
        self._stream = (folder / f"events.out.tfevents.{time.time():010.0f}.{who}").open("xb")
        self._records = RecordWriter(self._stream)
        self._records.write(
            Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()
        )

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars by their tags."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._records.write(event.SerializeToString())
        self._stream.flush()

    def close(self) -> None:
        """Close the file, whatever the disk says to it."""
        with suppress(OSError):
            self._stream.close()
