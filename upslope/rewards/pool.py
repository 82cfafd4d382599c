"""Worker processes with a time limit: what the user's code does there cannot stop, crash or corrupt the trainer."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

import cloudpickle

from upslope.errors import RewardError
from upslope.rewards.worker import HEADER, send

START_LIMIT_S = 120.0  # loading the user's module: large libraries take their time


class WorkerFailed(Exception):
    """A worker did not answer a chunk: it raised, hung or died. The text says which."""


class Worker:
    """One process that holds a loaded reward function."""

    def __init__(self, source: Any, name: str) -> None:
        self.source = source
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def start(self) -> None:
        """Start the process and load the function. Raises RewardError when it cannot be loaded."""
        to_child, requests = os.pipe()
        answers, from_child = os.pipe()
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "upslope.rewards.worker", str(to_child), str(from_child)],
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
        try:
            send(self.requests, self.source)
            kind, what = self._answer(START_LIMIT_S)
        except (WorkerFailed, BrokenPipeError) as error:
            self.stop()
            raise RewardError(
                f"reward {self.name}: its worker did not start: {error}", "import the module by hand"
            ) from None
        if kind == "broken":
            self.stop()
            raise RewardError(
                f"reward {self.name} cannot be loaded: {what}", "name module:function or file.py:function"
            )

    def ask(self, chunk: tuple[list[str], list[str], list[dict[str, Any]]], limit_s: float) -> list[Any]:
        """The function's scores of a chunk. Raises WorkerFailed; after a hang or a death the process is a new one."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            send(self.requests, chunk)
            kind, what = self._answer(limit_s)
        except BrokenPipeError:
            raise self._gone() from None
        if kind == "raised":
            raise WorkerFailed(what)
        return list(what)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        try:
            self.requests.close()
        except OSError:
            pass  # bytes that the dead process never took
        os.close(self.answers)
        self.said.close()
        self.process = None

    def _answer(self, limit_s: float) -> tuple[str, Any]:
        end = time.monotonic() + limit_s
        while True:
            if len(self.buffer) >= HEADER.size:
                (size,) = HEADER.unpack(self.buffer[: HEADER.size])
                if len(self.buffer) >= HEADER.size + size:
                    body = self.buffer[HEADER.size : HEADER.size + size]
                    self.buffer = self.buffer[HEADER.size + size :]
                    answer: tuple[str, Any] = cloudpickle.loads(body)
                    return answer
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.stop()
                raise WorkerFailed(f"no answer within {limit_s:g} s")
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise self._gone()
            self.buffer += part

    def _gone(self) -> WorkerFailed:
        assert self.process is not None
        code = self.process.wait()
        self.said.seek(0, os.SEEK_END)
        self.said.seek(max(0, self.said.tell() - 2000))
        lines = self.said.read().decode("utf-8", "replace").strip().splitlines()
        self.stop()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return WorkerFailed(f"its process ended with {how}" + (f", last words: {lines[-1][:200]}" if lines else ""))
