"""One worker process: loads a reward function, then answers batches until its pipe closes.

Started as `python -m upslope.rewards.worker IN OUT BYTES`: two inherited pipe numbers and a memory limit. A message is
a length and that many bytes: a cloudpickle on the way in, JSON on the way out, so that nothing a worker says can run in
the trainer. What the function prints goes to standard error, never into the pipe.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import cloudpickle

from upslope.rewards import tree

HEADER = struct.Struct("<Q")
GRACE_S = 0.5  # for an idle worker to leave by itself when its owner is gone


def send(pipe: IO[bytes], kind: str, what: Any) -> None:
    send_body(pipe, json.dumps([kind, what]).encode())


def send_body(pipe: IO[bytes], body: bytes) -> None:
    pipe.write(HEADER.pack(len(body)))
    pipe.write(body)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes:
    """The next message's bytes. Raises EOFError when the other side is gone."""
    head = pipe.read(HEADER.size)
    if len(head) < HEADER.size:
        raise EOFError
    (size,) = HEADER.unpack(head)
    body = pipe.read(size)
    if len(body) < size:
        raise EOFError
    return body


def load_function(source: Any) -> Callable[..., Any]:
    """The function of `module:name`, `path/file.py:name`, or a callable itself. Raises LookupError in plain words."""
    if callable(source):
        return source  # type: ignore[no-any-return]
    place, colon, name = str(source).rpartition(":")
    if not colon or not place or not name:
        raise LookupError(f"{source!r} is not module:function or file.py:function")
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise LookupError(f"there is no file {place}")
        sys.path.insert(0, str(path.parent))  # for the modules beside it
        # a file may be called struct.py: the module that everybody else means keeps its name
        title = f"reward_{path.stem}" if path.stem in sys.stdlib_module_names | set(sys.modules) else path.stem
        spec = importlib.util.spec_from_file_location(title, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[title] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise LookupError(f"{place} has no function {name!r}; it has {', '.join(known) or 'none'}")
    return found  # type: ignore[no-any-return]


def last_line(error: BaseException) -> str:
    """An exception in one line: its type and text, and the line of code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    told = isinstance(error, SyntaxError) or not frames or frames[-1].filename == __file__  # it says where, or is ours
    where = "" if told else f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {error}{where}".replace("\n", " ")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes the pipe
    requests = os.fdopen(int(sys.argv[1]), "rb")
    answers = os.fdopen(int(sys.argv[2]), "wb")
    sys.stdout = sys.stderr
    limit_memory(int(sys.argv[3]))
    tree.adopt_orphans()
    threading.Thread(target=_end_with_owner, args=(requests.fileno(),), daemon=True).start()
    try:
        body = receive(requests)
        try:
            function = load_function(cloudpickle.loads(body))
        except BaseException as error:
            send(answers, "broken", last_line(error))
            return
        send(answers, "ready", getattr(function, "__name__", "reward"))
        while True:
            body = receive(requests)
            try:
                kind: str = "scores"
                what: Any = _plain(function(*cloudpickle.loads(body)))
            except BaseException as error:  # exit() too: it costs its rows, not a new process
                said = last_line(error)
                full = isinstance(error, MemoryError) or "allocate memory" in said
                kind, what = "full" if full else "raised", said
            send(answers, kind, what)
    except (EOFError, BrokenPipeError):
        return


def limit_memory(size: int) -> None:
    """Let allocations beyond `size` bytes fail, in this process and in each that it starts, for good.

    Private writable memory is what is counted (RLIMIT_DATA, Linux 4.7 and later): files that are mapped and address
    space that is only reserved are not, so that large libraries load. Elsewhere the call changes nothing.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    size = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _end_with_owner(requests: int) -> None:
    """Kill this process's group, hanging or not, once the other end of its pipe has closed."""
    poller = select.poll()
    poller.register(requests, 0)  # no events asked for: only the hang-up is told
    poller.poll()
    time.sleep(GRACE_S)
    tree.end(os.getpid())
    os._exit(1)


def _plain(scores: Any) -> list[Any]:
    """Scores in plain Python: tensors, arrays and the user's own types stay in this process."""
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        raise TypeError(f"a reward must return a list of scores, got {type(scores).__name__}")
    return [_steps(score) if _is_steps(score) else _number(score) for score in scores]


def _is_steps(score: Any) -> bool:
    """Whether a score is a list of (end, score) steps."""
    return isinstance(score, list | tuple) and all(isinstance(step, list | tuple) and len(step) == 2 for step in score)


def _steps(score: Any) -> list[list[float]] | str:
    steps = [[_number(end), _number(value)] for end, value in score]
    good = [step for step in steps if isinstance(step[0], float) and isinstance(step[1], float)]
    return good if len(good) == len(steps) and steps else f"{score!r:.80}"  # type: ignore[return-value]


def _number(score: Any) -> float | str:
    """A score as a float, or in words where it is no number (a nan or an infinity is one: it fails later)."""
    if not isinstance(score, str | bytes):
        try:
            return float(score.item() if hasattr(score, "item") else score)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass  # a list, None, an array of several numbers, an integer beyond any float
    return f"{score!r:.80}"


if __name__ == "__main__":
    main()
