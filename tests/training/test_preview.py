"""`upslope data`: what it says of rows with every fault that can be dropped, by the real command."""

import json

import pytest

from tests.conftest import make_rows
from tests.training.test_task import make_task_rows, task_recipe
from upslope.config import load_recipe
from upslope.errors import DataError, ModelError
from upslope.training.preview import preview


def told(recipe, rows, capsys, **options):
    preview(load_recipe(recipe), rows=rows, plain=True, **options)
    return capsys.readouterr().out


def test_it_says_what_was_dropped_why_and_shows_one_of_each(model_dir, capsys):
    rows = make_task_rows()
    rows[5]["upper"], rows[7]["noun"], rows[9] = None, "", dict(rows[8])
    rows[11]["noun"] = "long " * 30
    said = told(task_recipe(model_dir), rows, capsys)
    assert "rows: 93 rows of 96; dropped: 1 without upper (first: row 5), 1 without noun (first: row 7)" in said
    assert "    without upper: row 5: star 5" in said and "    repeated: row 9: " in said
    assert "longer than 60 tokens (first: row 11)" in said or "longer than 52 tokens (first: row 11)" in said
    assert "groups)" in said and "train " in said and "valid " in said and "test " in said


def test_tokens_stand_apart_and_what_is_trained_on_is_marked(model_dir, tokenizer, capsys):
    rows = make_task_rows()
    said = told(task_recipe(model_dir), rows, capsys, examples=1)
    line = next(line for line in said.splitlines() if "[[" in line)
    assert line.count("[[") == 1 == line.count("]]") and line.endswith("<|im_end|>]]")
    start, _, trained = line.strip().partition("[[")
    assert start.replace("|", "").startswith("Shout: ") and start.replace("|", "").endswith("⏎")
    answer = trained.removesuffix("]]").removesuffix("<|im_end|>").replace("|", "")
    assert answer in {row["upper"] for row in rows}
    assert "rl, row " in said and "reference: '" in said


def test_near_duplicates_on_two_sides_are_told_and_dropped_where_asked(model_dir, capsys):
    recipe = task_recipe(model_dir)
    del recipe["data"]["group"]
    recipe["data"]["max_tokens"] = 200
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(letters[(n * k * k + 7 * k) % 26] for k in range(1, 40)) for n in range(1, 25)]
    rows = [{"noun": text[:-1] + end, "upper": "X"} for text in texts for end in "!?.;"]
    said = told(recipe, rows, capsys, examples=0)
    assert "are near one of train" in said and "set data.near = 0.8" in said
    recipe["data"]["near"] = 0.8
    said = told(recipe, rows, capsys, examples=0)
    assert "dropped: 72 near another" in said or "near another, 0.8 or more of their shingles" in said
    assert "are near one of train" not in said and "is near one of" in said


def test_texts_and_pairs_are_shown_too(recipe, capsys):
    said = told(recipe, make_rows(), capsys, examples=1)
    assert "reward, the better side" in said and "reward, the other side" in said and "sft, row " in said


def test_the_command_is_the_same_and_colours_only_a_terminal(model_dir, tmp_path, capsys):
    from upslope.cli import app

    rows = make_task_rows()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = task_recipe(model_dir)
    recipe["data"]["rows"] = str(tmp_path / "rows.jsonl")
    lines = [f"{k} = {json.dumps(v)}" for k, v in recipe.items() if not isinstance(v, dict)]
    for table, content in recipe.items():
        if isinstance(content, dict):
            lines += [f"[{table}]", *(f"{k} = {json.dumps(v)}" for k, v in content.items())]
    (tmp_path / "r.toml").write_text("\n".join(lines).replace('{"lr": 0.001', "{lr = 0.001"))
    app(args=["data", str(tmp_path / "r.toml"), "--examples", "1"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "rows: 96 rows of 96; nothing dropped" in said and "\x1b[" not in said and "[[" in said


def test_nothing_left_is_an_error_as_in_a_run(model_dir, capsys):
    with pytest.raises(DataError, match=r"no prompts left of \d+: longer than 2 tokens"):
        recipe = task_recipe(model_dir)
        del recipe["sft"]
        recipe["data"]["max_tokens"] = 10
        recipe["rl"]["max_tokens"] = 8
        told(recipe, make_task_rows(), capsys)


def test_columns_that_are_no_text_are_one_line(capsys):
    shape = {"width": 16, "layers": 1, "heads": 2, "context": 64, "vocab": 300}
    recipe = {"model": shape, "data": {"rows": "given", "messages": "m", "max_tokens": 60}, "sft": {"steps": 1}}
    with pytest.raises(DataError, match=r"no examples left of \d+: without turns of role and content"):
        told(recipe, [{"m": f"hello {n}"} for n in range(40)], capsys)
    recipe["data"] = {"rows": "given", "prompt": "q", "completion": "a", "max_tokens": 60}
    with pytest.raises(DataError, match=r"no examples left of \d+: that are no text"):
        told(recipe, [{"q": n, "a": n} for n in range(40)], capsys)


def test_what_an_encoder_chooses_is_shown_with_what_it_is_for(capsys):
    shape = {"kind": "encoder", "width": 16, "layers": 1, "heads": 2, "context": 64, "vocab": 300}
    data = {"rows": "given", "text": "text", "classes": "label", "max_tokens": 60}
    recipe = {"model": shape, "data": data, "sft": {"steps": 1}, "rl": {"reward": "a:b", "max_tokens": 1}}
    said = told(recipe, make_rows(), capsys, examples=1)
    assert "[[fresh]]" in said or "[[rotten]]" in said
    text = next(line for line in said.splitlines() if "[[" in line).partition("[[")[0].replace("|", "")
    assert any(row["text"] in text for row in make_rows()) and "rl, row " in said
    data = {"rows": "given", "passages": "found", "max_tokens": 200}
    task = {"prompt": "{asked}", "reference": "right"}
    rows = [{"asked": f"the {n}", "found": [f"about {n}", "another"], "right": n % 2} for n in range(60)]
    said = told({"model": shape, "data": data, "task": task, "sft": {"steps": 1}}, rows, capsys, examples=1)
    line = next(line for line in said.splitlines() if "[[" in line).replace("|", "")
    assert "the " in line and "about " in line and "another" in line and ("[[0]]" in line or "[[1]]" in line)


def test_every_side_is_told_and_a_row_beyond_the_context_stops_it_as_a_run(model_dir, capsys):
    recipe = task_recipe(model_dir)
    said = told(recipe, make_task_rows(), capsys, examples=1)
    for side in ("train", "valid", "test"):
        assert f"sft: {side} examples: " in said and f"rl: {side} prompts: " in said
    assert said.count("  sft, row ") == 1  # examples of the training side alone
    recipe["model"] = {"width": 16, "layers": 1, "heads": 2, "context": 8, "vocab": 300}
    recipe["data"]["max_tokens"] = 60
    with pytest.raises(DataError, match=r"row \d+ of the train side, .* context of 8; lower data.max_tokens to 8"):
        told(recipe, make_task_rows(), capsys)


def test_an_encoders_texts_are_shown_as_they_are_masked_from_and_one_that_should_write_is_refused(capsys):
    shape = {"kind": "encoder", "width": 16, "layers": 1, "heads": 2, "context": 64, "vocab": 300}
    data = {"rows": "given", "text": "text", "max_tokens": 60}
    recipe = {"model": shape, "data": data, "pretrain": {"steps": 1}}
    said = told(recipe, make_rows(), capsys, examples=1)
    assert "pretrain: train texts: " in said and "of which some are masked at each step" in said
    chooses = recipe | {"data": data | {"classes": "label"}, "sft": {"steps": 1}}
    said = told(chooses, make_rows(), capsys, examples=1)
    pretrain, sft = (line for line in said.splitlines() if line.startswith("    <|begin|>|"))
    assert "[[" not in pretrain and sft.endswith(("[[fresh]]", "[[rotten]]"))  # read as text, written as a label
    with pytest.raises(ModelError, match=r"an encoder, which writes no text, and \[sft\] asks it to; set data.classes"):
        told(recipe | {"sft": {"steps": 1}}, make_rows(), capsys)
    recipe["model"] = shape | {"kind": "decoder"}
    with pytest.raises(ModelError, match=r"data.classes is set, and the model is no encoder"):
        told(recipe | {"data": data | {"classes": "label"}}, make_rows(), capsys)
