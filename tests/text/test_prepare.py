import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.errors import DataError
from upslope.text import cleaning, prepare
from upslope.text.tokenizer import Tokenizer

FRACTIONS = {"train": 0.6, "valid": 0.2, "test": 0.2}


def table(**columns):
    return Dataset.from_dict(columns)


def test_cleaning_says_what_was_dropped_and_why():
    rows = table(text=["fine", " FINE ", "", None, "x" * 50, "ok", "no"], kind=["a"] * 6 + ["b"])
    kept, account = cleaning.clean(rows, text="text", min_chars=2, max_chars=40, keep={"kind": ["a"]})
    assert kept["text"][:] == ["fine", "ok"]
    assert account.dropped == {"repeated": 1, "without text": 2, "outside 2 to 40 characters": 1, "of another kind": 1}
    assert account.kept + sum(account.dropped.values()) == account.read
    assert str(account).startswith("2 rows of 7; dropped: 1 repeated (first: row 1)")


def test_all_filtered_names_the_chief_reason():
    with pytest.raises(DataError, match=r"no rows left of 2: of another kind \(2 of 2; row 0"):
        cleaning.clean(table(text=["a", "b"], kind=["x", "x"]), text="text", keep={"kind": ["y"]})


@given(st.lists(st.integers(0, 40), min_size=60, max_size=120), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_no_group_stands_on_two_sides_and_no_row_is_lost(groups, seed):
    rows = table(g=[f"g{n}" for n in groups], i=list(range(len(groups))))
    try:
        sides, _ = cleaning.split(rows, group="g", fractions=FRACTIONS, seed=seed)
    except DataError as error:
        assert "side of the split is empty" in str(error)
        return
    names = [set(side["g"]) for side in sides.values()]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    assert sorted(i for side in sides.values() for i in side["i"]) == list(range(len(groups)))


def test_more_rows_never_move_a_group_and_the_seed_does():
    many = [f"g{n}" for n in range(200)]
    few, _ = cleaning.split(table(g=many[:100]), group="g", fractions=FRACTIONS, seed=1)
    more, _ = cleaning.split(table(g=many), group="g", fractions=FRACTIONS, seed=1)
    other, _ = cleaning.split(table(g=many), group="g", fractions=FRACTIONS, seed=2)
    assert all(set(few[side]["g"]) <= set(more[side]["g"]) for side in FRACTIONS)
    assert set(more["test"]["g"]) != set(other["test"]["g"])
    assert abs(len(more["train"]) - 120) < 25


def test_without_groups_equal_rows_stay_together():
    rows = table(text=[f"t{n % 50}" for n in range(100)])
    sides, _ = cleaning.split(rows, group=None, fractions=FRACTIONS, seed=0)
    texts = [set(side["text"]) for side in sides.values()]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_without_groups_equal_prompts_stay_together_whatever_else_a_row_holds():
    rows = table(id=list(range(200)), prompt=[f"p{n % 20}" for n in range(200)])
    sides, _ = cleaning.split(rows, group=None, same="prompt", fractions={"train": 0.5, "test": 0.5}, seed=0)
    assert not set(sides["train"]["prompt"]) & set(sides["test"]["prompt"])
    assert len(sides["train"]) + len(sides["test"]) == 200


@given(st.lists(st.one_of(st.none(), st.text(max_size=6)), min_size=1, max_size=40), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_cleaning_keeps_one_of_each_text_in_order_and_counts_the_rest(texts, low):
    rows = Dataset.from_dict({"i": list(range(len(texts))), "text": [None if t is None else f"x{t}" for t in texts]})
    try:
        kept, account = cleaning.clean(rows, text="text", min_chars=low, max_chars=5)
    except DataError as error:
        assert f"no rows left of {len(texts)}" in str(error)
        return
    folded = [" ".join(t.casefold().split()) for t in kept["text"]]
    assert len(set(folded)) == len(folded) and list(kept["i"]) == sorted(kept["i"])
    assert all(low <= len(t) <= 5 for t in kept["text"])
    assert account.kept == len(kept) and account.kept + sum(account.dropped.values()) == account.read == len(texts)


def test_c4_c49_eos_is_learned_and_prompts_are_not(tokenizer):
    (example,), _ = prepare.text_examples(table(t=["a film"]), tokenizer, text="t", max_tokens=50)
    assert example.ids[-1] == tokenizer.eos_id and all(example.trained)
    rows = table(p=["a film: "], c=["fine"])
    (example,), _ = prepare.completion_examples(rows, tokenizer, prompt="p", completion="c", max_tokens=50)
    learned = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    assert tokenizer.decode(learned, skip_special=False) == "fine<|im_end|>"


def test_c49_chat_trains_what_the_assistant_says_with_its_end(tokenizer):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "no"},
    ]
    (example,), _ = prepare.chat_examples(table(m=[turns]), tokenizer, messages="m", max_tokens=500)
    learned = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    assert tokenizer.decode(learned, skip_special=False) == "yes<|im_end|>no<|im_end|>"
    assert example.ids[: len(tokenizer.chat(turns, generation_prompt=False))] == tokenizer.chat(
        turns, generation_prompt=False
    )


def test_c49_c53_an_answer_that_opens_with_a_line_break_is_learned_as_it_is_sampled(tokenizer, tmp_path):
    """The prompt's ids are the very ones that the engine is given, whatever the answer starts with."""
    tokenizer.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    described["model"]["vocab"]["ĊĊ"] = tokenizer.vocab_size  # two line breaks as one token, as real ones have
    described["model"]["merges"].append(["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nyes"}]
    (example,), _ = prepare.chat_examples(table(m=[turns]), tokenizer, messages="m", max_tokens=500)
    asked = tokenizer.chat(turns[:1])
    assert example.ids[: len(asked)] == asked and not any(example.trained[: len(asked)])
    learned = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    assert tokenizer.decode(learned, skip_special=False) == "\n\nyes<|im_end|>"


def test_malformed_conversations_and_prompts_are_dropped_with_a_count(tokenizer):
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for make in (prepare.chat_examples, prepare.prompts):
        made, account = make(table(m=[good, None, []]), tokenizer, messages="m", max_tokens=500)
        assert len(made) == 1 and sum(account.dropped.values()) == 2
        with pytest.raises(DataError, match="left of 1"):
            make(table(m=[[{"from": "user", "value": "hi"}]]), tokenizer, messages="m", max_tokens=500)
    with pytest.raises(DataError, match=r"no prompts left of 2: that are no text \(2 of 2; row 0"):
        prepare.prompts(table(p=[1, 2]), tokenizer, prompt="p", max_tokens=9)


def test_too_long_is_dropped_never_cut(tokenizer):
    rows = table(t=["a", "a fine film, full of life and of death and of all that lies between"])
    kept, account = prepare.text_examples(rows, tokenizer, text="t", max_tokens=10)
    assert (
        len(kept) == 1
        and account.dropped == {"longer than 10 tokens": 1}
        and account.first == {"longer than 10 tokens": 1}
    )


def test_pairs_stay_in_their_group_and_prefer_comes_first():
    rows = table(t=list("abcdefg"), l=["+", "-", "-", "+", "-", "+", "+"], g=[1, 1, 1, 2, 2, 3, 3])
    found, account = prepare.pairs(rows, text="t", label="l", prefer="+", group="g", per_group=5, seed=0)
    for better, other in found:
        assert rows[better]["l"] == "+" and rows[other]["l"] == "-" and rows[better]["g"] == rows[other]["g"]
    assert len(found) == 3 and account.dropped == {"without both '+' and another label": 1}
    again, _ = prepare.pairs(rows, text="t", label="l", prefer="+", group="g", per_group=5, seed=0)
    assert found == again


def test_without_groups_the_shorter_side_is_used_up():
    rows = table(t=[str(n) for n in range(30)], l=["+"] * 10 + ["-"] * 20)
    found, account = prepare.pairs(rows, text="t", label="l", prefer="+", group=None, per_group=3, seed=0)
    assert len(found) == 10 == len({b for b, _ in found}) == len({o for _, o in found})
    assert "10 pairs" in str(account)


def test_a_row_without_a_label_is_neither_better_nor_worse():
    rows = table(t=list("abcd"), l=["+", None, "", "-"])
    found, account = prepare.pairs(rows, text="t", label="l", prefer="+", group=None, per_group=8, seed=0)
    assert found == [(0, 3)] and "2 rows without a label left out" in str(account)


def test_c48_pairs_with_equal_sides_are_dropped_and_counted(tokenizer):
    rows = table(c=["a", "b"], r=["a", "c"])
    found, account = prepare.pair_examples(rows, tokenizer, chosen="c", rejected="r", prompt=None, max_tokens=9)
    assert len(found) == 1 and account.dropped == {"with two equal sides": 1}


def test_c48_pairs_from_labels_with_equal_tokens_are_dropped_and_counted(tokenizer):
    rows = table(t=["a film", "a film", "a dull film", "a film of all films that there are"])
    found, account = prepare.label_pairs([(0, 1), (0, 2), (0, 3)], rows, tokenizer, text="t", max_tokens=9)
    assert list(found) == [prepare.Pair([*tokenizer.encode("a film"), 2], [*tokenizer.encode("a dull film"), 2])]
    assert account.dropped == {"with two equal sides": 1, "longer than 9 tokens": 1}


def test_pairs_know_their_prompt_and_their_margin(tokenizer):
    rows = table(p=["a film: ", None, "b"], c=["fine", "x", None], r=["dull", "y", "b"], m=["0.5", "2", " 1e-1 "])
    columns = {"chosen": "c", "rejected": "r", "prompt": "p", "margin": "m"}
    found, account = prepare.pair_examples(rows, tokenizer, max_tokens=30, **columns)
    assert [p.margin for p in found] == [0.5, 2.0] and account.dropped == {"that are no text": 1}
    for pair, prompt in zip(found, ("a film: ", ""), strict=True):
        ids = tokenizer.encode(prompt)
        assert pair.prompt_length == len(ids) and pair.chosen[: len(ids)] == pair.rejected[: len(ids)] == ids
    assert tokenizer.decode(found[0].chosen[found[0].prompt_length :], skip_special=False) == "fine<|im_end|>"


def test_a_whole_text_of_an_eos_alone_has_nothing_to_learn_and_an_empty_answer_has_its_end(tokenizer):
    rows = table(p=["b", "b"], c=["a", "a"], r=["", "b"])
    made, account = prepare.pair_examples(rows, tokenizer, chosen="c", rejected="r", prompt=None, max_tokens=9)
    assert len(made) == 1 and account.dropped == {"with nothing to learn in one side": 1}
    made, _ = prepare.pair_examples(rows, tokenizer, chosen="c", rejected="r", prompt="p", max_tokens=9)
    assert made[0].rejected == [*tokenizer.encode("b"), tokenizer.eos_id]


@pytest.mark.parametrize("margin", ["two", None, "nan", "inf"])
def test_margins_that_are_no_number_are_dropped_and_counted(tokenizer, margin):
    rows = table(c=["a", "b"], r=["b", "c"], m=["1", margin])
    columns = {"chosen": "c", "rejected": "r", "prompt": None, "margin": "m"}
    found, account = prepare.pair_examples(rows, tokenizer, max_tokens=9, **columns)
    assert [p.margin for p in found] == [1.0] and account.dropped == {"whose m is no number": 1}


def test_prompts_are_first_words_and_draw_their_number_by_the_text_alone(tokenizer):
    texts = ["a fine film, full of life", "short", "the best of them all"]
    made, account = prepare.prompts(table(t=texts), tokenizer, text="t", words=(2, 3), max_tokens=50)
    assert account.dropped and len(made) == 2
    assert all(p.row["t"].startswith(p.text) and 2 <= len(p.text.split()) <= 3 for p in made)
    alone, _ = prepare.prompts(table(t=texts[2:]), tokenizer, text="t", words=(2, 3), max_tokens=50)
    assert alone[0] == made[1]


def test_c7_prompts_too_long_are_dropped_with_a_count(tokenizer):
    with pytest.raises(DataError, match=r"no prompts left of 1: longer than 2 tokens \(1 of 1; row 0"):
        prepare.prompts(table(p=["a very long prompt"]), tokenizer, prompt="p", max_tokens=2)


def test_what_is_missing_or_no_text_is_dropped_and_counted(tokenizer):
    rows = Dataset.from_list([{"q": "a", "n": 1, "e": "b"}, {"q": None, "n": 2, "e": "b"}, {"q": "c", "n": 3, "e": ""}])
    made, account = prepare.completion_examples(rows, tokenizer, prompt="q", completion="e", max_tokens=20)
    assert [e.row for e in made] == [0]
    assert (
        account.dropped == {"without a prompt": 1, "without a completion": 1} and account.first["without a prompt"] == 1
    )
    with pytest.raises(DataError, match=r"no examples left of 3: that are no text"):
        prepare.completion_examples(rows, tokenizer, prompt="n", completion="e", max_tokens=20)
    made, account = prepare.prompts(rows, tokenizer, prompt="q", max_tokens=20)
    assert [p.number for p in made] == [0, 2] and account.dropped == {"without a prompt": 1}


def test_conversations_that_are_none_or_teach_nothing_are_told_apart(tokenizer):
    ask, answer = {"role": "user", "content": "a film?"}, {"role": "assistant", "content": "a fine film"}
    rows = Dataset.from_list(
        [{"m": [ask, answer]}, {"m": [ask]}, {"m": [{"role": "user", "content": None}]}, {"m": []}]
    )
    made, account = prepare.chat_examples(rows, tokenizer, messages="m", max_tokens=90)
    assert [e.row for e in made] == [0]
    assert account.dropped == {"without a turn of the assistant": 1, "without turns of role and content": 2}
