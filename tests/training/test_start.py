"""A run that makes its own model: the tokenizer, the weights, and that nothing later can tell."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import upslope
from tests.conftest import TEXTS, make_recipe
from tests.training.test_pipeline import outcome, same
from upslope.config import Scratch, load_recipe
from upslope.errors import Interrupted, ModelError, RecipeError, RunError
from upslope.models.open import Outline, load_model, make_runner, new_model, outline
from upslope.text.tokenizer import Tokenizer, train_tokenizer
from upslope.training import supervised
from upslope.training.preview import preview
from upslope.training.start import check_kind, require_same_rows, texts_of

SHAPE = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "context": 64, "vocab": 300}


def scratch_recipe(**shape):
    recipe = make_recipe("none")
    del recipe["reward"]
    recipe["pretrain"] = {"steps": 2, "batch": 4}
    recipe["rl"] |= {"reward": "tests.scores:length", "epochs": 1, "minibatches": 1, "steps": 2}
    return recipe | {"model": SHAPE | shape}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows):
    return upslope.train(scratch_recipe(), rows=rows, out=tmp_path_factory.mktemp("scratch") / "run", plain=True)


def test_a_run_from_scratch_goes_through_every_stage(finished):
    assert all((finished / stage / "done.json").is_file() for stage in ("pretrain", "sft", "rl", "eval"))
    start, pretrained = (load_file(finished / stage / "model" / "model.safetensors") for stage in ("start", "pretrain"))
    assert start.keys() == pretrained.keys()
    assert any(not torch.equal(start[name], pretrained[name]) for name in start)
    words = upslope.load(finished, dtype="fp32").generate(["a fine film"], max_tokens=4)
    assert len(words) == 1


def test_the_tokenizer_has_seen_the_training_side_only(finished):
    """A word that only other sides have stays in pieces; one that the training side has becomes a token."""
    tokenizer = Tokenizer.load(finished / "start" / "model")
    assert len(tokenizer.encode(" film", special=False)) == 1
    rows = Dataset.from_list([{"text": "alpha alpha alpha", "other": "omega"}] * 3)
    learned = train_tokenizer(texts_of(rows, load_recipe(scratch_recipe()).data), 300)
    assert len(learned.encode(" alpha", special=False)) == 1
    assert len(learned.encode(" omega", special=False)) > 1


def test_a_trained_tokenizer_keeps_every_text_and_marks_both_ends(tmp_path):
    made = train_tokenizer(TEXTS, 300)
    made.save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for text in (*TEXTS, "Ünïcødé 学习 \x00\n\t", ""):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id != tokenizer.bos_id and tokenizer.inner.pad_token_id is None
    assert tokenizer.vocab_size <= 300 and tokenizer.fingerprint == made.fingerprint
    ids, trained = tokenizer.chat_example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert [i for i, t in zip(ids, trained, strict=True) if t][-1] == tokenizer.eos_id


def test_the_same_texts_give_the_same_tokenizer_in_another_process():
    code = (
        "from upslope.text.tokenizer import train_tokenizer\nfrom tests.conftest import TEXTS\n"
        "print(train_tokenizer(TEXTS * 50, 300).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == train_tokenizer(TEXTS * 50, 300).fingerprint


def test_a_stopped_run_from_scratch_ends_where_an_unbroken_one_does(finished, rows, tmp_path, monkeypatch):
    inner, calls = supervised.supervised_step, []

    def stopping(run, *args):
        calls.append(0)
        run.stop_requested = len(calls) == 3
        return inner(run, *args)

    monkeypatch.setattr(supervised, "supervised_step", stopping)
    with pytest.raises(Interrupted):
        upslope.train(scratch_recipe(), rows=rows, out=tmp_path / "run", plain=True)
    upslope.train(scratch_recipe(), rows=rows, out=tmp_path / "run", plain=True)
    same(outcome(finished), outcome(tmp_path / "run"))


def test_a_first_try_of_another_shape_leaves_nothing_behind(rows, tmp_path):
    class Sudden(Exception):
        pass

    def refuse(*args):
        raise Sudden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "evaluate", refuse)
        with pytest.raises(Sudden):
            upslope.train(scratch_recipe(), rows=rows, out=tmp_path / "run", plain=True)
    upslope.train(scratch_recipe(layers=1), rows=rows, out=tmp_path / "run", plain=True)
    config = json.loads((tmp_path / "run" / "start" / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1


def test_weights_are_of_the_seed():
    shape = Scratch(**SHAPE)
    one, two, other = (new_model(shape, 300, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"widht": 8}, r"unknown key 'model.widht'; did you mean 'model.width'\?"),
        ({"heads": 3}, r"model: width = 16 does not divide among 3 heads; set heads to a divisor"),
        ({"kv_heads": 3}, r"model: 4 heads do not divide among kv_heads = 3"),
        ({"heads": 16}, r"gives each an odd share"),
        ({"kind": "tree"}, r"model.kind = 'tree'"),
        ({"vocab": 100}, r"model.vocab = 100"),
    ],
)
def test_a_table_that_cannot_be_is_one_line(shape, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(scratch_recipe(**shape))


def test_a_model_that_is_neither_name_nor_table_is_one_line():
    with pytest.raises(RecipeError, match="model = 3"):
        load_recipe(scratch_recipe() | {"model": 3})


def test_keys_of_the_table_are_set_from_the_command_line():
    assert load_recipe(scratch_recipe(), ["model.layers=7"]).model.layers == 7
    assert load_recipe(scratch_recipe(), ["model=some/folder"]).model == "some/folder"


def test_a_model_of_another_kind_than_the_recipe_is_for_is_refused(model_dir, rows, tmp_path):
    recipe = scratch_recipe() | {"kind": "encdec", "model": {"kind": "encdec", "width": 16, "layers": 1}}
    message = "the model is a decoder, and the recipe tiny is for an encoder-decoder; name a model of that kind, or set"
    with pytest.raises(ModelError, match=message):
        upslope.train(recipe, f"model={model_dir}", rows=rows, out=tmp_path / "run", plain=True)
    with pytest.raises(ModelError, match=message):
        preview(load_recipe(recipe, [f"model={model_dir}"]), rows=rows, plain=True)
    check_kind(load_recipe(recipe, [f"model={model_dir}", "kind=none"]), outline(model_dir))
    check_kind(load_recipe(recipe), outline(Scratch(kind="encdec", width=16, layers=1)))


def test_an_outline_says_what_a_model_is_before_it_is_read(finished):
    assert outline(finished / "rl" / "model") == Outline("decoder", False, 64)
    assert outline(Scratch(kind="encoder", width=16, layers=1, context=32, vocab=300)) == Outline("encoder", True, 32)


def test_what_no_kind_knows_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(ModelError, match="architecture 'mystery' is not known; known: llama"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="Linear is no model kind"):
        make_runner(torch.nn.Linear(1, 1), dtype=torch.float32)


def test_a_run_goes_on_with_the_rows_it_was_begun_with_and_no_others(tmp_path, finished, rows):
    folder, recipe = tmp_path / "run", scratch_recipe()
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "eval")
    changed = [row | {"text": f"{row['text']} again"} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    recipe["data"] |= {"rows": str(tmp_path / "rows.jsonl")}
    kept = json.loads((folder / "recipe.json").read_text())
    kept["data"]["rows"] = recipe["data"]["rows"]
    (folder / "recipe.json").write_text(json.dumps(kept))
    for act in (lambda: upslope.train(recipe, out=folder, plain=True), lambda: upslope.reevaluate(folder, plain=True)):
        with pytest.raises(
            RunError, match=r"begun with other rows: .*another content; its rows were given from Python"
        ):
            act()
    with pytest.raises(RunError, match=r"(\d+)/\d+/\d+ then, .* now \(train, valid, test\); bring those back"):
        upslope.train(recipe, rows=rows[: len(rows) // 2], out=folder, plain=True)
    upslope.train(recipe, rows=rows, out=folder, plain=True)
    again = upslope.reevaluate(folder, prompts=4, rows=rows, plain=True)
    assert json.loads((again / "eval" / "done.json").read_text())["prompts"] == 4


def test_rows_may_change_as_long_as_nothing_was_learned_from_them(tmp_path, rows):
    sides = {name: Dataset.from_list(rows[:n]) for name, n in (("train", 4), ("valid", 2), ("test", 2))}
    require_same_rows(tmp_path, sides, given=True)
    require_same_rows(tmp_path, sides | {"test": Dataset.from_list(rows[2:4])}, given=False)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "done.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"4/2/2 \(train, valid, test\) then as now, of another content; bring those back"
    ):
        require_same_rows(tmp_path, sides, given=False)
