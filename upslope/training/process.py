"""One run in a process of its own: its memory is given back at its end, and its death is nobody else's.

    reason = Process(plain=True).run(recipe, folder)       "" when the run got to its end, else why not, in one line

The other side is child.py. The parent keeps the child's standard input open; when it closes, because the parent has
gone, the child saves itself and stops, as it does at Ctrl-C. The parent imports neither torch nor the loops.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle

from upslope.errors import RunError

DEFAULT_INT = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # Ctrl-C before the run is ready for it
COMMAND = f"{DEFAULT_INT}; from upslope.training.child import main; main()"
REASON_BYTES = 1 << 16


@dataclass
class Process:
    """Runs one recipe after another, each in a process; stop requests are passed on, and end with the last child."""

    plain: bool | None = None
    stop_requests: int = 0
    process: subprocess.Popen[bytes] | None = None
    kept_open: tuple[int, ...] = field(default=())  # files that live as long as the child: the lock of a sweep

    def run(self, recipe: dict[str, Any], folder: Path, reward: Any = None, rows: Any = None) -> str:
        """Run a recipe to its end in a new process; "" when it got there, else why not, in one line."""
        try:
            body = cloudpickle.dumps((recipe, folder, reward, rows, self.plain))
        except Exception as error:
            raise RunError(
                f"the reward or the rows cannot be sent to a process: {error}", "name files instead"
            ) from None
        reasons, say = os.pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", COMMAND, str(say)],
            stdin=subprocess.PIPE,
            pass_fds=(say, *self.kept_open),
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C comes to us alone, and is passed on once
        )
        os.close(say)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(len(body).to_bytes(8, "big") + body)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: its exit status says so
        try:
            code = self.process.wait()
            os.set_blocking(reasons, False)
            return "" if code == 0 else _reason(reasons, code)
        finally:
            self._end(reasons)

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """First Ctrl-C or SIGTERM: the child saves and stops. Second: it stops at once. Third: it is killed."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self.stop_requests += 1
            if self.process is not None and self.process.poll() is None:
                self.process.send_signal(signal.SIGINT if self.stop_requests < 3 else signal.SIGKILL)

        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread (a notebook's executor): the caller's handling stays
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, reasons: int) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.close()  # a child that still runs saves itself and stops
        except BrokenPipeError:
            pass  # it died before it had read everything
        self.process.wait()
        os.close(reasons)
        self.process = None


def _reason(reasons: int, code: int) -> str:
    try:
        said = os.read(reasons, REASON_BYTES).decode("utf-8", "replace")
    except BlockingIOError:
        said = ""
    if said:
        return " ".join(said.split())
    if code >= 0:
        return f"its process ended with exit status {code}"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}" + (", as a system short of memory does" if name == "SIGKILL" else "")
