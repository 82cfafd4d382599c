import subprocess
import sys
import time

import pytest

from upslope import cli
from upslope.config import shipped_recipes


def upslope(*arguments, stdin=""):
    command = [sys.executable, "-m", "upslope", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120)


def test_help_is_instant():
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = upslope("--help")
        seconds.append(time.perf_counter() - begin)
    assert done.returncode == 0 and min(seconds) < 1.0  # 0.2 s alone; the suite's other worker shares the machine
    for command in ("train", "sweep", "compare", "eval", "generate", "chat", "export", "report", "recipes"):
        assert command in done.stdout
    imported = (
        "import sys; import upslope.cli; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "sentiment-ppo", "-s", "rl.lamda=1"), "unknown key 'rl.lamda'; did you mean 'rl.lam'?"),
        (("train", "no-such-recipe"), "no recipe 'no-such-recipe'"),
        (("report", "nowhere"), "is not a run folder"),
        (("generate", "no/such/model", "hi"), "no such file or folder"),
        (("eval", "nowhere"), "has no finished rl stage"),
        (("sweep", "sentiment-ppo", "rl.lamda=0.9,1"), "unknown key 'rl.lamda'; did you mean 'rl.lam'?"),
        (("sweep", "sentiment-ppo", "rl.lam=0.9,1", "--metric", "x"), "add --search 20"),
        (
            ("sweep", "sentiment-ppo", "optim.lr=1e-5,1e-4"),
            "override 'optim.lr=1e-5' changes nothing: each stage has its own lr; write rl.optim.lr",
        ),
        (("compare", "nowhere"), "holds no run and no sweep"),
        (("train", "sentiment-ppo", "rl.kl=0.2"), "write -s rl.kl=0.2"),
        (
            ("train", "spelling-correction", "-s", "rl.reward.accuracy=0.5"),
            "reward is 'accuracy', not a table; shorten the key, or write -s 'rl.reward={ accuracy = 0.5 }' for",
        ),
        (("train",), "error: missing argument 'recipe'; see upslope train --help"),
        (("trian",), "error: no such command 'trian'"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, command_here):
    status, _, said = command_here(*arguments)
    assert status == 2, said
    assert message in said and "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


def test_debug_shows_the_traceback_and_wrong_options_are_told(command_here):
    assert "Traceback" in command_here("train", "no-such-recipe", "--debug")[2]
    status, _, said = command_here("train", "sentiment-ppo", "--ouput", "x")
    assert status == 2 and "--ouput" in said


def test_recipes_are_listed_and_printed(command_here):
    listed = upslope("recipes")
    for name, path in shipped_recipes().items():
        assert name in listed.stdout
        assert command_here("recipes", name)[1] == path.read_text()


def test_a_model_generates_chats_and_is_exported(model_dir, tmp_path, command_here):
    done = upslope("generate", model_dir, "a fine", "--max-tokens", "4", "--samples", "2", "--seed", "1")
    assert done.returncode == 0 and done.stdout.count("a fine") >= 2, done.stderr
    status, talk, _ = command_here("chat", model_dir, "--max-tokens", "4", stdin="hi\n\n")
    assert status == 0 and "model:" in talk
    assert command_here("export", model_dir, tmp_path / "out")[0] == 0
    (tmp_path / "file").write_text("")
    status, _, said = command_here("export", model_dir, tmp_path / "file")
    assert status == 2 and "file: File exists; choose another" in said
    assert (tmp_path / "out" / "config.json").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("said", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried to"])
def test_a_full_memory_is_one_line_on_every_device(said, monkeypatch, command_here):
    def full(**_):
        raise RuntimeError(said)

    monkeypatch.setattr(cli, "app", full)
    status, _, told = command_here()
    assert status == 2
    assert told.strip().endswith("lower optim.micro_tokens or limits.slots, what was saved stands")
