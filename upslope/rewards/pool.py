"""Worker processes with limits of time and memory: what the user's code does there cannot harm the trainer."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

import cloudpickle

from upslope.errors import Interrupted, RewardError
from upslope.rewards import tree
from upslope.rewards.worker import HEADER, send_body

START_LIMIT_S = 120.0  # loading the user's module: large libraries take their time
SAID_LIMIT = 1 << 20  # bytes of what a worker prints that are kept for its last words
ANSWER_LIMIT = 1 << 24  # bytes of one answer: more is no list of scores of one chunk
GLANCE_S = 0.2  # between two looks at a stop that was asked for, and at the memory of all processes
THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")


KINDS = ("ready", "broken", "scores", "raised", "full")


class WorkerFailed(Exception):
    """A worker gave no scores of a chunk: the function raised, or `lost`: it hung, died or filled its memory.

    The text says which. again: what the calls before had left there may be to blame, and a new process may do it.
    """

    def __init__(self, what: str, *, lost: bool, again: bool = False) -> None:
        super().__init__(what)
        self.lost = lost
        self.again = again


class Worker:
    """One process that holds a loaded reward function."""

    def __init__(
        self, source: Any, name: str, *, memory_gb: float, should_stop: Callable[[], bool] | None = None
    ) -> None:
        self.source = source
        self.name = name
        self.memory = int(memory_gb * 1e9)
        self.should_stop = should_stop
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""
        self.calls = 0  # that this process has answered
        self.looked = 0.0  # when its memory was looked at

    def start(self) -> None:
        """Start the process and load the function. Raises RewardError when it cannot be loaded."""
        try:
            source = cloudpickle.dumps(self.source)
        except Exception as error:
            raise RewardError(
                f"reward {self.name} cannot be sent to its worker: {error}", "name module:function or file.py:function"
            ) from None
        self._open()
        try:
            self._send(source)
            kind, what = self._answer(START_LIMIT_S)
        except WorkerFailed as error:
            raise RewardError(
                f"reward {self.name}: its worker did not start: {error}", "import the module by hand"
            ) from None
        except BaseException:
            self.stop()
            raise
        if kind == "broken":
            self.stop()
            raise RewardError(
                f"reward {self.name} cannot be loaded: {what}", "name module:function or file.py:function"
            )

    def ask(self, chunk: tuple[list[str], list[str], list[dict[str, Any]]], limit_s: float) -> list[Any]:
        """The function's scores of a chunk. Raises WorkerFailed; after a hang or a death the process is a new one.

        It is a new one, too, after it has filled its memory.
        """
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.start()
        body = cloudpickle.dumps(chunk)
        try:
            self._send(body)
            kind, what = self._answer(limit_s)
        except BaseException:
            self.stop()  # an answer still to come would be taken for that of the next chunk
            raise
        self.calls += 1
        if kind == "full":
            self.stop()
            told = f"needs more than limits.memory_gb = {self.memory / 1e9:g}: {what}"
            raise WorkerFailed(told, lost=True, again=self.calls > 1)
        if kind == "raised":
            raise WorkerFailed(str(what), lost=False)
        return list(what)

    def stop(self) -> None:
        """End the process, whatever it is doing, and those that it started."""
        if self.process is None:
            return
        tree.end(self.process.pid)
        self.process.kill()  # where there is no /proc to find it by
        self.process.wait()
        try:
            self.requests.close()
        except OSError:
            pass  # bytes that the dead process never took
        os.close(self.answers)
        self.said.close()
        self.process = None

    def _open(self) -> None:
        to_child, requests = os.pipe()
        answers, from_child = os.pipe()
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        environment = {**os.environ, **{f"{name}_NUM_THREADS": "1" for name in THREADS}}
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)  # "" is the current folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "upslope.rewards.worker", str(to_child), str(from_child), str(self.memory)],
            pass_fds=(to_child, from_child),
            stdin=subprocess.DEVNULL,
            stdout=self.said,
            stderr=self.said,
            env=environment,
            start_new_session=True,
        )
        os.close(to_child)
        os.close(from_child)
        self.requests: IO[bytes] = os.fdopen(requests, "wb")
        self.answers = answers
        self.buffer = b""
        self.calls = 0

    def _send(self, body: bytes) -> None:
        try:
            send_body(self.requests, body)
        except BrokenPipeError:
            pass  # it died: _answer reads so, and how

    def _answer(self, limit_s: float) -> tuple[str, Any]:
        end = time.monotonic() + limit_s
        poller = select.poll()
        poller.register(self.answers, select.POLLIN)
        while True:
            if len(self.buffer) >= HEADER.size:
                (size,) = HEADER.unpack(self.buffer[: HEADER.size])
                if size > ANSWER_LIMIT:
                    self.stop()
                    raise WorkerFailed("its answer was garbage", lost=True)
                if len(self.buffer) >= HEADER.size + size:
                    body = self.buffer[HEADER.size : HEADER.size + size]
                    self.buffer = self.buffer[HEADER.size + size :]
                    self._trim()
                    return self._understood(body)
            if self.should_stop is not None and self.should_stop():
                self.stop()
                raise Interrupted(f"stopped while reward {self.name} was asked", "the same command carries on")
            left = end - time.monotonic()
            if left <= 0:
                self.stop()
                raise WorkerFailed(f"no answer within {limit_s:g} s", lost=True)
            if time.monotonic() - self.looked > GLANCE_S:
                self._check_memory()
            if poller.poll(1000 * min(left, GLANCE_S) + 1):
                part = os.read(self.answers, 1 << 20)
                if not part:
                    raise self._gone()
                self.buffer += part
            self._trim()

    def _check_memory(self) -> None:
        """End the process where all that it has started hold more than the limit together; each alone is held to it."""
        assert self.process is not None
        self.looked = time.monotonic()
        held = tree.memory(self.process.pid, self.memory)
        if held > self.memory:
            again = self.calls > 0
            self.stop()
            told = f"needs more than limits.memory_gb = {self.memory / 1e9:g}: its processes held {held / 1e9:.2g} GB"
            raise WorkerFailed(told, lost=True, again=again)

    def _understood(self, body: bytes) -> tuple[str, Any]:
        """An answer in its parts; the function may have written anything into the pipe."""
        try:
            kind, what = json.loads(body)
            if kind not in KINDS or (kind == "scores") != isinstance(what, list):
                raise ValueError(f"kind {kind!r}")
            if kind == "scores" and not all(isinstance(score, float | str) or _is_steps(score) for score in what):
                raise ValueError("scores that are neither numbers, steps nor words")
        except (ValueError, TypeError, RecursionError):
            self.stop()
            raise WorkerFailed("its answer was garbage", lost=True) from None
        return str(kind), what

    def _trim(self) -> None:
        """Forget what the worker printed beyond the limit: the file and its position are shared with it."""
        if os.fstat(self.said.fileno()).st_size > SAID_LIMIT:
            os.ftruncate(self.said.fileno(), 0)
            os.lseek(self.said.fileno(), 0, os.SEEK_SET)

    def _gone(self) -> WorkerFailed:
        assert self.process is not None
        try:
            code = self.process.wait(timeout=1.0)
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            how = "its pipe closed"
        size = os.fstat(self.said.fileno()).st_size
        tail = os.pread(self.said.fileno(), 2000, max(0, size - 2000))
        lines = tail.decode("utf-8", "replace").strip().splitlines()
        self.stop()
        words = f", last words: {lines[-1][:200]}" if lines else ""
        return WorkerFailed(f"its process ended with {how}{words}", lost=True)


def _is_steps(score: Any) -> bool:
    return isinstance(score, list) and all(
        isinstance(step, list) and len(step) == 2 and all(isinstance(x, float) for x in step) for step in score
    )
