"""`make faults`: 200 runs struck at random points, unless told otherwise; the table goes to docs/reliability.md.

    python -m tests.faults.campaign [TRIALS] [SEED] [VARIANT ...]

A trial strikes one to three starts of a run, each at a random event of a random phase by a random kind of fault, or by
a SIGKILL after a random time, then lets it end in peace and compares it with an unbroken one. Every strike that took
place is counted; one that came too late, after the end of its start, is not. The variants and pairs are
those of variants.py in turn, all of them unless some are named: their figures have a section of their own. Ctrl-C ends
the campaign before its time, with the table of what has been tried.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.harness import Harness, Strike
from tests.faults.inject import KINDS, PHASES
from tests.faults.machine import replace_section, where_and_when
from tests.faults.tiny import tiny_files
from tests.faults.variants import PAIRS, VARIANTS

ANY_TIME = "any time"


def draw(random_: random.Random, counts: dict[str, int], seconds: float, share: float) -> Strike:
    """One strike in the first `share` of a start's events. Half are SIGKILLs, the one fault that no handler sees.

    A phase that the run does not have, and the reward's fault where it has none, are not drawn.
    """
    if random_.random() < 0.15:
        return Strike(kill_after=random_.uniform(0.0, share * seconds))
    phase = random_.choice([phase for phase in PHASES if counts.get(phase)])
    kinds = [kind for kind in KINDS if kind != "reward" or counts.get("rewards")]
    kind = random_.choice(kinds) if random_.random() < 0.6 else "sigkill"
    return Strike(phase, random_.randint(1, max(1, round(share * counts[phase]))), kind)


def campaign(
    work: Path, trials: int, seed: int, variants: Sequence[str]
) -> tuple[Counter[tuple[str, str]], list[str], Counter[str], float]:
    """Strikes that took place by phase and kind, failed trials, trials by variant, and the slowest stop in seconds."""
    random_ = random.Random(seed)
    struck: Counter[tuple[str, str]] = Counter()
    by_variant: Counter[str] = Counter()
    failed: list[str] = []
    slowest = 0.0
    model, rows = tiny_files(work)
    with Harness(work / "runs", model, rows) as harness:
        for number in range(trials):
            variant = variants[number % len(variants)]
            folder = harness.work / f"run-{number}"
            try:
                _, counts, seconds = harness.reference(variant)
                strikes = [draw(random_, counts, seconds, 1.0 / (n + 1)) for n in range(random_.randint(1, 3))]
                wrong = harness.trial(variant, folder, strikes, minutes=random_.choice((0.0, 0.0, 60.0)))
            except KeyboardInterrupt:
                break
            by_variant[variant] += 1
            for strike, ended in harness.last_starts:
                took_place = ended.fired or (strike.kill_after is not None and ended.code == -9)
                if took_place:
                    struck[strike.phase or ANY_TIME, strike.kind or "sigkill"] += 1
                if ended.fired and strike.kind in ("sigterm", "sigint", "sigint-twice"):
                    slowest = max(slowest, ended.seconds_after)
            if wrong:
                failed.append(f"trial {number}, {variant}, {strikes}: {'; '.join(wrong)}")
                print(failed[-1], flush=True)
            for path in harness.work.glob(f"run-{number}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if number % 20 == 19:
                print(f"{number + 1} trials, {sum(struck.values())} strikes, {len(failed)} failed", flush=True)
    return struck, failed, by_variant, slowest


def table(struck: Counter[tuple[str, str]]) -> list[str]:
    """Strikes by phase and kind, in Markdown."""
    lines = [f"| phase | {' | '.join(KINDS)} | all |", f"|---|{'---|' * (len(KINDS) + 1)}"]
    for phase in (*PHASES, ANY_TIME):
        row = [struck[phase, kind] for kind in KINDS]
        lines.append(f"| {phase} | {' | '.join(str(n) for n in row)} | {sum(row)} |")
    sums = [sum(n for (_, k), n in struck.items() if k == kind) for kind in KINDS]
    lines.append(f"| all | {' | '.join(str(n) for n in sums)} | {sum(sums)} |")
    return lines


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    named = sys.argv[3:]
    for name in named:
        if name not in (*VARIANTS, *PAIRS):
            sys.exit(f"no variant {name!r}: there are {', '.join((*VARIANTS, *PAIRS))}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to Ctrl-C
    began, measured = time.monotonic(), where_and_when()
    fast = Path("/dev/shm")  # a process that is killed loses nothing of what it wrote, wherever that is
    work = Path(tempfile.mkdtemp(prefix="upslope-faults-", dir=fast if fast.is_dir() else None))
    try:
        struck, failed, by_variant, slowest = campaign(work, trials, seed, named or (*VARIANTS, *PAIRS))
    finally:
        shutil.rmtree(work)
    minutes = (time.monotonic() - began) / 60
    tried, whole = sum(by_variant.values()), [name for name in by_variant if name in VARIANTS]
    command = f"python -m tests.faults.campaign {trials} {seed} {' '.join(named)}" if sys.argv[1:] else "make faults"
    early = "" if tried == trials else f" of {trials}, ended by hand"
    text = [
        f"`{command.strip()}` ({tried} trials{early}, seed {seed}; {measured}; {minutes:.0f} min): "
        f"{len(whole)} variants ({', '.join(whole)}) and {len(by_variant) - len(whole)} pairs of an algorithm and a "
        f"model kind in turn, struck {sum(struck.values())} times in all, one to three times each.",
        f"Trials that ended otherwise than an unbroken run, in a traceback, or later than allowed: **{len(failed)}**.",
        f"Slowest end after SIGTERM or SIGINT: {slowest:.2f} s.",
        "",
        *table(struck),
    ]
    text += [f"- {failure[:300]}" for failure in failed]
    replace_section("Random faults, chosen variants" if named else "Random faults", text)
    print("\n".join(text))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
