"""The process that process.py starts: reads what to run from standard input, runs it, says why where it fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import IO

import cloudpickle

from upslope.config import load_recipe
from upslope.errors import UpslopeError
from upslope.training.parts import Given
from upslope.training.pipeline import run_pipeline
from upslope.training.process import REASON_BYTES


def main() -> None:
    """The child: read what to run from standard input, run it, and say why where it fails."""
    say = int(sys.argv[1])
    given = os.fdopen(os.dup(0), "rb", buffering=0)
    quiet = os.open(os.devnull, os.O_RDONLY)
    os.dup2(quiet, 0)
    os.close(quiet)
    recipe, folder, reward, rows, plain = cloudpickle.loads(_exactly(given, int.from_bytes(_exactly(given, 8), "big")))
    threading.Thread(target=_stop_with_parent, args=(given,), daemon=True).start()
    try:
        run_pipeline(load_recipe(recipe), folder, given=Given(reward, rows), plain=plain)
    except UpslopeError as error:
        _leave(say, str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave(say, "stopped at once", 130)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        _leave(say, f"{type(error).__name__}: {lines[0] if lines else 'no message'}", 1)


def _leave(say: int, reason: str, code: int) -> None:
    os.write(say, reason.encode("utf-8", "replace")[:REASON_BYTES])
    sys.stdout.flush()
    os._exit(code)  # threads that a failed run left behind hold nothing up


def _exactly(given: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = given.read(size)
        if not part:
            os._exit(1)  # the parent went before it had said what to run
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _stop_with_parent(given: IO[bytes]) -> None:
    """Ask this process to save itself and stop once the parent's end of the pipe has closed."""
    given.read(1)
    os.kill(os.getpid(), signal.SIGTERM)
