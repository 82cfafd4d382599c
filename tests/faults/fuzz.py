"""`make fuzz`: atheris on every reader of targets.py, led by the coverage of our own code; docs/reliability.md is told.

    python -m tests.faults.fuzz [SECONDS A TARGET] [TARGET ...]

Each target is fuzzed in a process of its own, since a fuzzer ends with what it finds. The first input that leads to
anything else than an answer or one line ends its target; it is kept under fuzz/ and printed. Where targets are named,
their rows of the table are written anew and the others stay.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["upslope"], enable_loader_override=False):
    from tests.faults.targets import TARGETS, meets
from tests.checkpoints import ROOT
from tests.faults.machine import REPORT, replace_section, section, where_and_when

HANG_S = 120
MEMORY_MB = 6000


def one_target(name: str, seconds: int, work: Path) -> None:
    """Fuzz in this process; atheris never returns."""
    corpus = work / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    inputs = work / "input"
    inputs.mkdir()
    options = [f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1"]
    kept = ROOT / "fuzz"
    kept.mkdir(exist_ok=True)
    options += [f"-artifact_prefix={kept}/{name.replace(' ', '-')}-", "-max_len=50000"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: meets(TARGETS[name], inputs, data) and None)
    atheris.Fuzz()


def campaign(seconds: int, names: list[str]) -> list[tuple[str, int, int, int, str]]:
    """Of each target: inputs tried, coverage at the start's seeds and at the end, and what was found."""
    found = []
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, "-m", "tests.faults.fuzz", "--one", name, str(seconds), work]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        tried = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
        covered = [int(n) for n in re.findall(r"cov: (\d+)", done.stderr)] or [0]
        wrong = "" if done.returncode == 0 else _last_words(done.stdout + done.stderr)
        found.append((name, int(tried[1]) if tried else 0, covered[0], covered[-1], wrong))
        print(*found[-1], sep="  ", flush=True)
    return found


def _last_words(said: str) -> str:
    """The exception's line, or libFuzzer's."""
    lines = [line for line in said.splitlines() if re.match(r"^ *[\w.]*(Error|Exception)\b", line)]
    lines += [line for line in said.splitlines() if "ERROR: libFuzzer" in line]
    return (lines or said.splitlines()[-1:] or ["no word"])[0][:200]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one_target(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 45
    names = sys.argv[2:] or list(TARGETS)
    machine, day, commit = where_and_when().split("; ")
    found = campaign(seconds, names)
    rows = {line.split(" | ")[0]: line for line in section("Fuzzing", REPORT) if line.startswith("| ")}
    kept = [rows[f"| {name}"] for name in TARGETS if name not in names and f"| {name}" in rows]
    made = [
        f"| {n} | {seconds} | {day}, {commit} | {tried} | {a}, {b} | {wrong or 'nothing'} |"
        for n, tried, a, b, wrong in found
    ]
    order = [f"| {name} " for name in TARGETS]
    text = [
        f"`make fuzz` ({machine}). Right is an answer, or an error of one line.",
        "",
        "| target | seconds | when | inputs tried | branches covered: by the seeds, in the end | found |",
        "|---|---|---|---|---|---|",
        *sorted([*kept, *made], key=lambda row: next(n for n, start in enumerate(order) if row.startswith(start))),
    ]
    replace_section("Fuzzing", text)
    sys.exit(any(wrong for *_, wrong in found))


if __name__ == "__main__":
    main()
