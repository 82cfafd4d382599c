"""An encoder-decoder from scratch through the real command: sft, rl, use; and its errors, one line each."""

import json
import subprocess
import sys
import tomllib

import pytest
from safetensors.torch import load_file

import upslope
from upslope.errors import DataError, ModelError

pytestmark = pytest.mark.xdist_group("encdec run")  # its run is one for all
NAMES = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
RECIPE = """
name = "mirror"
dtype = "fp32"
[model]
kind = "encdec"
width = 16
layers = 1
heads = 2
context = 24
vocab = 280
[data]
rows = "rows.jsonl"
prompt = "said"
completion = "answer"
max_tokens = 40
[optim]
lr = 2e-3
micro_tokens = 128
[sft]
steps = 3
batch = 4
[rl]
algorithm = "reinforce"
reward = "reward.py:score"
steps = 2
prompts = 3
samples = 2
max_tokens = 5
[eval]
prompts = 4
judges = []
"""


def rows_of(count=40):
    return [
        {"said": f"{NAMES[i % 8]} {NAMES[i // 8 % 8]} {i}", "answer": f"{i} {NAMES[i // 8 % 8]} {NAMES[i % 8]}"}
        for i in range(count)
    ]


def recipe(**changes):
    tables = tomllib.loads(RECIPE)
    del tables["rl"], tables["eval"]
    return tables | changes


def command(*arguments):
    code = "from upslope.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirror")
    (folder / "mirror.toml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    (folder / "reward.py").write_text(
        "def score(prompts, completions, rows):\n    return [-len(c) for c in completions]\n"
    )
    done = command(
        "train",
        folder / "mirror.toml",
        "-o",
        folder / "run",
        "-s",
        f"data.rows={folder / 'rows.jsonl'}",
        "-s",
        f"rl.reward={folder / 'reward.py'}:score",
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_command_trains_it_and_uses_it(folder, command_here):
    run = folder / "run"
    assert all((run / stage / "done.json").is_file() for stage in ("sft", "rl", "eval"))
    sft, rl = (load_file(run / stage / "model" / "model.safetensors") for stage in ("sft", "rl"))
    assert any((sft[name] != rl[name]).any() for name in sft)
    status, said, _ = command_here("generate", folder / "run", "one two", "--max-tokens", "4")
    assert status == 0 and "one two" in said
    assert command_here("export", folder / "run", folder / "exported")[0] == 0
    assert json.loads((folder / "exported" / "config.json").read_text())["model_type"] == "t5"


def test_the_prompts_of_episodes_are_sources(folder):
    episode = json.loads((folder / "run" / "episodes.jsonl").read_text().splitlines()[0])
    begin = upslope.load(folder / "run").tokenizer.bos_id
    assert episode["ids"][0] == begin and begin not in episode["ids"][1:]


def test_a_model_of_another_kind_is_refused_by_name(folder, model_dir, tmp_path):
    with pytest.raises(ModelError, match="is a model without an encoder, the recipe's model is an encoder-decoder"):
        upslope.train(
            recipe(sft={"steps": 1, "init": str(model_dir)}), rows=rows_of(), out=tmp_path / "run", plain=True
        )
    other = recipe(model=str(model_dir), sft={"steps": 1, "init": str(folder / "run" / "sft" / "model")})
    with pytest.raises(ModelError, match="is an encoder-decoder, the recipe's model is a model without an encoder"):
        upslope.train(other, rows=rows_of(), out=tmp_path / "other", plain=True)


def test_a_source_beyond_the_context_is_named_by_its_row(tmp_path):
    rows = [*rows_of(), *({"said": f"{i} " * 12, "answer": "x"} for i in range(40))]
    with pytest.raises(DataError, match=r"row \d+ of the train side, .* exceeds the model's context of 24; lower data"):
        upslope.train(recipe(), rows=rows, out=tmp_path / "run", plain=True)
