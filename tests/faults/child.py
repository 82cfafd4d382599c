"""Started once as `python -m tests.faults.child MODEL`: for each line on standard input it forks a process that runs

    upslope train RECIPE -o FOLDER --plain ...

with a fault in it, and answers with how that process ended. Forking saves the five seconds of imports of each start;
the run is a process of its own, and signals and deaths are real.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import upslope.training.reevaluate
from tests.faults.inject import Injector, beside, install
from upslope import cli
from upslope.models.hf import load_decoder
from upslope.text.tokenizer import Tokenizer

LIMIT_S = 120.0
PAUSE_S = 1.0


def run(ask: dict[str, Any]) -> None:
    """What the forked process does; never returns."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to Ctrl-C
    log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    folder = Path(ask["folder"])
    os.environ["UPSLOPE_TEST_UNWELL"] = str(beside(folder, "unwell"))
    injector = Injector(folder, ask.get("phase"), ask.get("at", 0), ask.get("kind", ""), ask.get("stage"))
    install(injector)
    sys.argv = ["upslope", "train", ask["recipe"], "-o", str(folder), "--plain", *ask.get("arguments", [])]
    code = 1
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", flush=True)
    beside(folder, "counts").write_text(json.dumps(injector.counts | {"work after": injector.work_after}))
    sys.stdout.flush()
    os._exit(code)


def watch(pid: int, ask: dict[str, Any]) -> dict[str, Any]:
    """Wait for the forked process; a SIGKILL after a delay, where asked for, comes from here.

    A look that comes late counts as PAUSE_S: where all processes were stopped for a while, none of them hung.
    """
    now, before = 0.0, time.monotonic()
    kill_after = ask.get("kill_after")
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        now, before = now + min(time.monotonic() - before, PAUSE_S), time.monotonic()
        if done:
            break
        if (kill_after is not None and now >= kill_after) or now > LIMIT_S:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    answer = {"code": os.waitstatus_to_exitcode(status), "seconds": now, "hung": now > LIMIT_S}
    fired = beside(ask["folder"], "fired")
    if fired.exists():
        answer["fired"] = True
        answer["seconds_after"] = time.time() - json.loads(fired.read_text())[3]
        fired.unlink()
    beside(ask["folder"], "unwell").unlink(missing_ok=True)
    return answer


def main() -> None:
    torch.set_num_threads(1)
    assert upslope.training.reevaluate  # everything is imported before the first fork, and what a first use imports
    Tokenizer.load(sys.argv[1])
    load_decoder(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(ask)
        print(json.dumps(watch(pid, ask)), flush=True)


if __name__ == "__main__":
    main()
