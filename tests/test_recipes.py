"""Every shipped recipe, whole, at smoke size: a tiny model from scratch on a few rows of the same columns."""

import json

import pytest

import upslope
from tests.conftest import make_rows
from upslope.config import load_recipe, shipped_recipes
from upslope.config.recipe import source_name
from upslope.observe.events import read_events
from upslope.training.preview import preview

WORDS = ("cat", "dog", "sun", "moon", "tree", "star", "fish", "bird", "house", "river")
SNIPPETS = [{**row, "movie_name": row["film"], "category": row["label"]} for row in make_rows()]
ROWS = {
    "arithmetic": [
        {
            "question": f"{a} + {b} =",
            "answer": str(a + b),
            "dataset": "chain_sum",
            "entry": json.dumps({"answer": str(a + b)}),
        }
        for a in range(12)
        for b in range(10)
    ],
    "sentiment-ppo": SNIPPETS,
    "lstm-ppo": SNIPPETS,
    "spelling-correction": [
        {
            "wrong": f"the {w}{w[-1]} number {n} is here",
            "right": f"the {w} number {n} is here",
            "word": f"{w}{n}",
            "family": w + str(n),
        }
        for n in range(12)
        for w in WORDS
    ],
    "spelling-encdec": [
        {"typo": f"{w}{w[-1]}{'ab'[n % 2]}{n // 2}", "word": f"{w}{'ab'[n % 2]}{n // 2}"}
        for n in range(12)
        for w in WORDS
    ],
    "sentiment-classification": SNIPPETS,
    "topic-classification": [
        {"text": f"{topic} rose {n} points, said {WORDS[n % 10]}", "topic": topic, "source": f"{topic} {n % 30}"}
        for n in range(60)
        for topic in ("crude", "grain", "gold")
    ],
    "encoder-pretrain": [
        {
            "description": f"A {w} is for {section}. It is number {n} of its kind.",
            "section": section,
            "source": f"{w}{n}",
        }
        for n, w in ((n, w) for n in range(8) for w in WORDS)
        for section in ("games", "mail")
    ],
    "spam-classification": [
        {"text": f"{says} {WORDS[n % 10]}, number {n}", "label": label, "thread": f"{label} {n}"}
        for n in range(60)
        for label, says in (("ham", "the meeting is about the"), ("spam", "buy now and win a"))
    ],
    "retrieval": [
        {"sentence": f"the {w} of {n}", "word": f"{w}{n}", "passages": [f"{w} there", "no", f"a {n}"], "right": n % 2}
        for n in range(8)
        for w in WORDS
    ],
    "word-qa": [
        {"definition": f"what is called {w} in place {n}", "word": f"{w}{n}", "words": [w, f"{w}s"]}
        for n in range(12)
        for w in WORDS
    ],
    "translation": [
        {"german": f"Das ist Nummer {n} von {w}.", "english": f"This is number {n} of {w}.", "source": f"{w} {n}"}
        for n in range(12)
        for w in WORDS
    ],
    "style-kjv": [
        {"king_james": f"And {n} {w} are good.", "modern": f"{n} {w} are good.", "book": f"{w} {n}"}
        for n in range(12)
        for w in WORDS
    ],
    "summarisation": [
        {"description": f"This is a package for {w} with {n} parts.", "synopsis": f"{w} {n}", "source": f"{w}{n % 4}"}
        for n in range(12)
        for w in WORDS
    ],
    "dialogue": [
        {"said": f"Do you like the {w}?", "reply": f"Yes, {n} of them.", "conversation": f"{w} {n}"}
        for n in range(12)
        for w in WORDS
    ],
    "fluency": SNIPPETS,
}
ROWS["spelling-loop"] = ROWS["spelling-encdec"]
KEPT = {
    "topic-classification": "data.keep={topic = ['crude', 'grain', 'gold']}",
    "encoder-pretrain": "data.keep={section = ['games', 'mail']}",
}
for name in (
    "spelling-correction",
    "spelling-encdec",
    "spelling-loop",
    "word-qa",
    "retrieval",
):  # its stem
    ROWS[name] = [{**row, "family": row["word"]} for row in ROWS[name]]
SMOKE = (
    "dtype=fp32",
    "data.near=none",
    "data.max_tokens=120",
    "rl.steps=2",
    "rl.prompts=4",
    "rl.freeze_layers=0",
    "eval.prompts=6",
    "eval.watched=4",
    "eval.every=1",
)


def test_each_recipe_has_rows_to_be_tried_with():
    assert set(shipped_recipes()) == set(ROWS)


def tiny(name, recipe):
    """What makes a recipe's model a tiny one and its rows those above."""
    chooses = bool(recipe.data.classes or recipe.data.passages)
    kind = recipe.model.kind if not isinstance(recipe.model, str) else "encoder" if chooses else "decoder"
    over = [f"model={{kind = '{kind}', width = 32, layers = 1, context = 128, vocab = 300}}", *SMOKE]
    over += [KEPT[name]] if name in KEPT else []
    return [*over, f"rl.max_tokens={1 if chooses else 8}"]


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_says_what_becomes_of_its_data(name, capsys):
    recipe = load_recipe(name)
    preview(load_recipe(name, tiny(name, recipe)), rows=ROWS[name], plain=True, examples=1)
    said = capsys.readouterr().out
    assert all(f"{stage}: train " in said for stage in recipe.stages)
    assert ("[[" in said) == bool({"pretrain", "sft"} & set(recipe.stages))


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_runs_from_its_first_stage_to_its_table(name, tmp_path, model_dir):
    recipe = load_recipe(name)
    if "verifier" in recipe.task.metrics:
        pytest.importorskip("reasoning_gym")
    over = tiny(name, recipe)
    for stage in recipe.stages:
        over += [f"{stage}.steps=2"] + ([f"{stage}.batch=4"] if stage != "rl" else [])
        over += [f"{stage}.freeze_layers=0"]
    if recipe.expert:  # a model that has learned nothing writes no right word, and would be refused
        over += ["expert.prompts=8", "expert.max_tokens=8", "expert.min_score=none"]
    if recipe.rl.algorithm == "ppo" and name == "sentiment-ppo":
        over += ["rl.ppo.prompts=4"]
    if any(source.startswith("likelihood:") for source in recipe.rl.rewards):  # a judge that needs no network
        others = [f"{s} = {w}" for s, w in recipe.rl.rewards.items() if not s.startswith("likelihood:")]
        over += ["rl.reward={" + ", ".join([f'"likelihood:{model_dir}" = 1.0', *others]) + "}"]
    folder = upslope.train(name, *over, rows=ROWS[name], out=tmp_path / "run", plain=True)
    events = read_events(folder / "events.jsonl")
    table = next(e for e in events if e["kind"] == "table" and e["stage"] == "eval")
    names = [row[0] for row in table["rows"]]
    measured = [*map(source_name, recipe.task.metrics), *(["mrr"] if recipe.data.passages else [])]
    assert [f"task: {metric}" for metric in measured] == [n for n in names if n.startswith("task: ")]
    assert ("baseline" in table["columns"]) == (recipe.task.baseline is not None)
    assert not [e for e in events if e["kind"] == "account" and "malformed" in e["text"]]
    assert any("valid/next_accuracy" in e.get("metrics", {}) for e in events) == recipe.data.next


def test_a_second_turn_of_the_loop_begins_with_the_model_of_the_first(tmp_path):
    recipe = load_recipe("spelling-loop")
    assert recipe.rl and recipe.expert and recipe.expert.min_score == sum(recipe.rl.rewards.values())  # all right
    small = [*SMOKE, "rl.max_tokens=8", "expert.prompts=8", "expert.max_tokens=8", "expert.min_score=none"]
    small += ["expert.steps=2", "expert.batch=4"]
    shape = "model={kind = 'encdec', width = 32, layers = 1, context = 128, vocab = 300}"

    def turn(number, *over):
        rows, out = ROWS["spelling-loop"], tmp_path / str(number)
        folder = upslope.train("spelling-loop", *small, *over, rows=rows, out=out, plain=True)
        return folder, read_events(folder / "events.jsonl")

    first, told = turn(1, shape, "sft.steps=2", "sft.batch=4")
    _, again = turn(2, f"model={first / 'expert' / 'model'}", "sft=none")
    (split,), (same_split,) = ([e["text"] for e in t if e.get("text", "").startswith("split: ")] for t in (told, again))
    assert split == same_split
    assert {e["stage"] for e in again if e["kind"] == "step"} == {"rl", "expert"}
