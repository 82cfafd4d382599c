import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from upslope.errors import RunError
from upslope.observe.events import EventLog, read_events
from upslope.observe.tensorboard import TensorBoardLog
from upslope.observe.terminal import Terminal, duration


def test_written_and_read_back(tmp_path):
    log = EventLog(tmp_path / "e.jsonl")
    log.write("step", stage="rl", step=3, metrics={"a": 1.5, "b": float("nan")})
    log.write("account", text="naïve \ud800")
    log.close()
    first, second = read_events(tmp_path / "e.jsonl")
    assert first == {
        "kind": "step",
        "stage": "rl",
        "step": 3,
        "metrics": {"a": 1.5, "b": None},
        "nonfinite": ["metrics.b"],
    }
    assert second["text"].startswith("naïve")


def test_c55_a_resumed_log_has_no_line_twice_and_none_missing(tmp_path):
    path = tmp_path / "e.jsonl"
    log = EventLog(path)
    log.write("step", step=1)
    offset = log.offset
    log.write("step", step=2)
    log.close()
    log = EventLog(path, keep_bytes=offset)
    log.write("step", step=2)
    log.write("step", step=3)
    log.close()
    assert [e["step"] for e in read_events(path)] == [1, 2, 3]


def test_a_torn_last_line_is_left_out_and_a_torn_middle_one_named(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b"')
    assert [e["kind"] for e in read_events(path)] == ["a"]
    path.write_bytes(b'{"kind": "a"}\n{"kin\n{"kind": "b"}\n')
    with pytest.raises(RunError, match="line 2 is not an event"):
        read_events(path)


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path):
    (tmp_path / "e.jsonl").write_bytes(b"x")
    with pytest.raises(RunError, match="has 1 bytes where a checkpoint remembers 9"):
        EventLog(tmp_path / "e.jsonl", keep_bytes=9)


def test_tensorboard_gets_the_numbers(tmp_path):
    log = TensorBoardLog(tmp_path)
    log.event({"kind": "step", "stage": "rl", "step": 4, "metrics": {"reward/mean": 0.25, "bad": None}})
    log.close()
    (file,) = tmp_path.iterdir()
    values = [v for e in LegacyEventFileLoader(str(file)).Load() for v in e.summary.value]
    assert [(v.tag, v.simple_value) for v in values] == [("rl/reward/mean", 0.25)]


@pytest.mark.parametrize("plain", [True, False])
def test_the_display_shows_what_matters(plain, capsys):
    terminal = Terminal(plain)
    terminal.start(["sft", "rl"])
    terminal.stage("sft", "start")
    terminal.progress("sft", 1, 4, 95.0, "update")
    terminal.event({"kind": "step", "stage": "sft", "step": 1, "metrics": {"loss/total": 2.5}})
    terminal.event({"kind": "alarm", "stage": "sft", "step": 1, "message": "[red]odd[/red]"})
    terminal.event({"kind": "table", "title": "T", "columns": ["", "x"], "rows": [["[a]", "1 [0, 2]"]], "note": "n"})
    terminal.close()
    shown = capsys.readouterr().out
    for text in ("[red]odd[/red]", "[a]", "[0, 2]"):
        assert text in shown
    assert ("1 min 35 s left" in shown) is plain  # the live picture is drawn on terminals only


def test_durations():
    assert [duration(s) for s in (41.6, 185, 7800)] == ["42 s", "3 min 05 s", "2 h 10 min"]
