import json
import re

import pytest

from upslope.errors import RunError
from upslope.observe.events import EventLog
from upslope.observe.report import collect, write_report

HOSTILE = "</script><script>alert(1)</script><b>"


@pytest.fixture
def run(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("run", recipe={"name": HOSTILE}, versions={}, machine={})
    for step in (1, 2):
        log.write("step", stage="rl", step=step, metrics={"reward/mean": step / 2})
    log.write("samples", stage="rl", step=2, samples=[{"prompt": HOSTILE, "tokens": [HOSTILE], "credit": [1.0]}])
    log.write("table", stage="eval", title="T", columns=["", "before", "after", "change"], rows=[], note="")
    log.close()
    return tmp_path


def test_the_report_stands_alone_and_model_text_is_no_markup(run):
    html = write_report(run).read_text()
    assert "<script>alert" not in html and "</script><script>alert" not in html
    assert not re.search(r"""(src|href)=["']?https?:""", html)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])
    assert data["samples"][0]["samples"][0]["prompt"] == HOSTILE


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"kind": "lstm", "layers": 2, "width": 64, "vocab": 300}, "a new lstm, 2 layers of width 64"),
        ("pypi:a==1/model", "pypi:a==1/model"),
    ],
)
def test_a_model_from_nothing_is_named_by_its_kind_and_size(tmp_path, model, named):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("run", recipe={"name": "a", "model": model}, versions={}, machine={})
    log.close()
    assert json.dumps(named) in write_report(tmp_path).read_text()


def test_curves_are_collected_by_stage_and_metric():
    events = [{"kind": "step", "stage": "rl", "step": s, "metrics": {"a": s * 1.0}} for s in (1, 2)]
    assert collect(events)["stages"]["rl"]["curves"] == {"a": [[1, 1.0], [2, 2.0]]}


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        write_report(tmp_path)
