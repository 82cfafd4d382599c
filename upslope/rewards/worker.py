"""One worker process: loads a reward function, then answers batches until its pipe closes.

Started as `python -m upslope.rewards.worker IN OUT`, two inherited pipe numbers. Messages are a length and a
cloudpickle. What the function prints goes to standard error, never into the pipe.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import cloudpickle

HEADER = struct.Struct("<Q")


def send(pipe: IO[bytes], message: Any) -> None:
    body = cloudpickle.dumps(message)
    pipe.write(HEADER.pack(len(body)))
    pipe.write(body)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """The next message. Raises EOFError when the other side is gone."""
    head = pipe.read(HEADER.size)
    if len(head) < HEADER.size:
        raise EOFError
    (size,) = HEADER.unpack(head)
    body = pipe.read(size)
    if len(body) < size:
        raise EOFError
    return cloudpickle.loads(body)


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
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
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
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}".replace("\n", " ")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes the pipe
    requests = os.fdopen(int(sys.argv[1]), "rb")
    answers = os.fdopen(int(sys.argv[2]), "wb")
    sys.stdout = sys.stderr
    try:
        source, chunk = receive(requests), None
        try:
            function = load_function(source)
        except BaseException as error:
            send(answers, ("broken", last_line(error)))
            return
        send(answers, ("ready", getattr(function, "__name__", "reward")))
        while True:
            chunk = receive(requests)
            try:
                send(answers, ("scores", _plain(function(*chunk))))
            except Exception as error:
                send(answers, ("raised", last_line(error)))
    except (EOFError, BrokenPipeError):
        return


def _plain(scores: Any) -> Any:
    """Scores as a list of Python objects: tensors and arrays become numbers, so that the trainer needs no such type."""
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(scores, list | tuple):
        raise TypeError(f"a reward must return a list of scores, got {type(scores).__name__}")
    return [s.item() if hasattr(s, "item") else s for s in scores]


if __name__ == "__main__":
    main()
