"""The metrics of steps and evaluations, for TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardLog:
    """Scalars named STAGE/METRIC over the stage's steps; a resumed run hides what lies beyond its first step."""

    def __init__(self, folder: Path) -> None:
        self.writer = EventFileWriter(str(folder))
        self.seen: set[str] = set()

    def event(self, event: dict[str, Any]) -> None:
        stage, step = event.get("stage", "run"), int(event.get("step", 0))
        if stage not in self.seen:
            self.seen.add(stage)
            start = Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
            self.writer.add_event(start)
        values = [
            Summary.Value(tag=f"{stage}/{name}", simple_value=value)
            for name, value in event["metrics"].items()
            if value is not None
        ]
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self.writer.close()
