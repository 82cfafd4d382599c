"""`make large`: a gigabyte of JSONL, read, cleaned, split and tokenised in a process of its own, whose memory is told.

python -m tests.faults.large [BYTES]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.checkpoints import ROOT
from tests.faults.machine import replace_section, where_and_when

READ = """
import json, resource, sys, threading, time
from pathlib import Path
from upslope.text import cleaning, prepare
from upslope.text.rows import load_rows
from upslope.text.tokenizer import train_tokenizer

def held(what):
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return int(line.split()[1]) / 1024

before, most, done = held("RssAnon"), [0.0], threading.Event()

def watch():
    while not done.wait(0.02):
        most[0] = max(most[0], held("RssAnon"))

threading.Thread(target=watch).start()
start = time.monotonic()
rows = load_rows(Path(sys.argv[1]))
read = time.monotonic() - start
rows, account = cleaning.clean(rows, text="text")
sides, _ = cleaning.split(rows, group=None, same="text", fractions={"train": 0.9, "test": 0.1}, seed=0)
told = {"rows": account.kept, "read_s": read, "split_s": time.monotonic() - start, "rows_mb": most[0] - before}
if sys.argv[2] == "tokens":
    tokenizer = train_tokenizer(sides["test"].select(range(100))["text"], 400)
    examples, _ = prepare.text_examples(sides["train"], tokenizer, text="text", max_tokens=4096)
    told["tokens"] = sum(len(examples[i].ids) for i in range(len(examples)))
    told["learned"] = sum(sum(examples[i].trained) for i in range(0, len(examples), 1000))
done.set()
told |= {"all_s": time.monotonic() - start}
told |= {"before_mb": before, "grown_mb": most[0] - before}
told["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(told))
"""


def peak_of_reading(folder: Path, size: int, *, tokens: bool = False) -> dict[str, Any]:
    """Write that many bytes of rows, read them and, where asked to, make training examples of nine tenths of them.

    grown_mb: the most memory held beyond that of the imports; rows_mb: the same before any tokens are made.
    """
    path = folder / "large.jsonl"
    with path.open("w") as file:
        written, number = 0, 0
        while written < size:
            row = {"text": f"row {number} " + "words and more words of a text that is long, " * 20, "label": number % 7}
            written += file.write(json.dumps(row) + "\n")
            number += 1
    command = [sys.executable, "-c", READ, str(path), "tokens" if tokens else "rows"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    path.unlink()
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000_000
    measured = where_and_when()
    with tempfile.TemporaryDirectory() as folder:
        told = peak_of_reading(Path(folder), size, tokens=True)
    text = [
        f"`make large` ({measured}): {size / 1e9:g} GB of JSONL, {told['rows']} rows, read in "
        f"{told['read_s']:.0f} s, cleaned and split after {told['split_s']:.0f} s, nine tenths of it made into "
        f"{told['tokens'] / 1e6:.0f} million tokens to learn, every one of which is read again, after "
        f"{told['all_s']:.0f} s. Memory grew by at most {told['rows_mb']:.0f} MB until the split and "
        f"{told['grown_mb']:.0f} MB in all over the {told['before_mb']:.0f} MB of the imports (anonymous memory, "
        "sampled every 20 ms); with the pages of mapped files, which the system may take back at any time, the peak "
        f"was {told['peak_rss_mb']:.0f} MB.",
    ]
    replace_section("Large files", text)
    print("\n".join(text))


if __name__ == "__main__":
    main()
