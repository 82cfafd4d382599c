"""docs/metrics.md names every metric that any stage or algorithm writes, with what it is a mean of, and no other."""

import json
import re

import pytest

from tests.checkpoints import ROOT
from tests.faults.variants import VARIANTS
from upslope.observe.events import read_events

PAGES = {"en": ROOT / "docs" / "metrics.md", "zh": ROOT / "docs" / "metrics.zh.md"}
WRITTEN_BY_OTHERS = {"valid/mrr", "valid/next_loss", "valid/next_accuracy"}  # of encoders: no struck run has them
ON_A_GPU = {"memory/gpu_peak_gb"}  # which no test asks for
FREE = {
    "NAME": "(learned|score|rare|odd|chrf|distinct_1|reward|likelihood|vader|language_en)",
    "STAGE": "(reward|preference)",
    "_N": r"_\d+",
}


def listed(language):
    """Name as it is listed -> what it is and over what."""
    rows = {}
    for line in PAGES[language].read_text().splitlines():
        if line.startswith("| `"):
            names, what, over = (cell.strip() for cell in line.strip("|").split(" | "))
            for name in re.findall(r"`([^`]+)`", names):
                assert name not in rows, f"{name} is listed twice"
                assert what and over
                rows[name] = (what, over)
    return rows


def pattern(name):
    found = re.escape(name)
    for word, meaning in FREE.items():
        found = found.replace(re.escape(word), meaning)
    return re.compile(found + "(_before)?")


def written(folder):
    """Every metric's name in a finished run: of its events and of its closing records."""
    names = {name for event in read_events(folder / "events.jsonl") for name in event.get("metrics", {})}
    for path in folder.glob("*/done.json"):
        names |= json.loads(path.read_text())["metrics"].keys()
    return names


@pytest.fixture(scope="module")
def found(harness):
    names = set()
    for variant in VARIANTS:
        harness.reference(variant)
        names |= written(harness.work / f"unbroken-{variant}")
    return names


def test_every_metric_that_a_run_writes_is_listed(found):
    patterns = [pattern(name) for name in listed("en")]
    assert {name for name in found if not any(p.fullmatch(name) for p in patterns)} == set()


def test_every_metric_that_is_listed_is_written_by_some_run(found):
    plain = {name for name in listed("en") if not any(word in name for word in FREE)}
    others = found - plain  # a name with a free word in it is one that no plain name is
    names = {n for n in listed("en") if n not in found and not any(pattern(n).fullmatch(f) for f in others)}
    assert names - ON_A_GPU - WRITTEN_BY_OTHERS == set()


def test_both_languages_list_the_same():
    assert list(listed("en")) == list(listed("zh"))
