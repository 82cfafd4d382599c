"""The page on tasks: its table of metrics is the code's, and every source and word that it names is one."""

import re

import pytest

from tests.docs.test_docs import DOCS, table
from upslope.config.metrics import METRICS, WORDS
from upslope.text.corpora import CORPORA

SAID = {
    "tasks.md": {"single": "single", "set": "set", "both": "single and set", True: "yes", False: "no"},
    "tasks.zh.md": {"single": "单个", "set": "集合", "both": "单个和集合", True: "是", False: "否"},
}
BETTER = {"tasks.md": {True: "more", False: "less", None: "-"}, "tasks.zh.md": {True: "越大", False: "越小", None: "-"}}


@pytest.mark.parametrize("page", SAID)
def test_the_table_of_metrics_is_the_codes(page):
    text, words = (DOCS / page).read_text(), SAID[page]
    rows = [row for row in table(text) if row[0].startswith("`") and len(row) == 4]
    expected = []
    for name, metric in METRICS.items():
        of = "both" if metric.source and metric.set else "set" if metric.set else "single"
        expected.append([f"`{name}`", words[of], words[metric.reference], BETTER[page][metric.higher]])
    assert rows == expected


@pytest.mark.parametrize("page", SAID)
def test_what_the_page_names_is_there(page):
    text = (DOCS / page).read_text()
    assert set(re.findall(r"corpus:([\w-]+)", text)) == set(CORPORA)
    assert {word for word in WORDS if f"`{word}:" in text} == set(WORDS)
