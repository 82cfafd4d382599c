"""One run in a process of its own: its memory is given back at its end, and its death is nobody else's.

    reason = Process(plain=True).run(recipe, folder)       "" when the run got to its end, else why not, in one line
    with passing_signals_on([process]): ...                Ctrl-C and SIGTERM go to the child, which saves and stops

The other side is child.py. The parent keeps the child's standard input open; when it closes, because the parent has
gone, the child saves itself and stops, as it does at Ctrl-C. The parent imports neither torch nor the loops.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle

from upslope.errors import RunError
from upslope.training.signals import signals_to

DEFAULT_INT = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # Ctrl-C before the run is ready for it
COMMAND = f"{DEFAULT_INT}; from upslope.training.child import main; main()"
REASON_BYTES = 1 << 16


@dataclass
class Process:
    """Runs one recipe after another, each in a process; stop requests are passed on, and end with the last child.

    output: a file that the child's lines are added to, instead of our own output.
    """

    plain: bool | None = None
    output: Path | None = None
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
        with self.output.open("ab") if self.output else nullcontext() as lines:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", COMMAND, str(say)],
                stdin=subprocess.PIPE,
                stdout=lines,
                stderr=lines,
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

    def stop(self) -> None:
        """Ask once: the child saves and stops. Twice: it stops at once. Three times: it is killed."""
        self.stop_requests += 1
        child = self.process  # another thread may be waiting for its end
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGINT if self.stop_requests < 3 else signal.SIGKILL)

    def _end(self, reasons: int) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.close()  # a child that still runs saves itself and stops
        except BrokenPipeError:
            pass  # it died before it had read everything
        self.process.wait()
        os.close(reasons)
        self.process = None


@contextmanager
def passing_signals_on(processes: Sequence[Process]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask all of them to stop."""

    def ask(_number: int, _frame: FrameType | None) -> None:
        for process in processes:
            process.stop()

    with signals_to(ask):
        yield


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
