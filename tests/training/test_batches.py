from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from upslope.training.batches import batch_indices, lay_out_texts, micro_batches


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_c37_each_item_once_an_epoch_and_none_dropped(items, batch, seed):
    epochs = 3
    steps = -(-items * epochs // batch)
    drawn = [i for step in range(steps) for i in batch_indices(items, batch, step, seed, "x")][: items * epochs]
    for epoch in range(epochs):
        assert sorted(drawn[epoch * items : (epoch + 1) * items]) == list(range(items))


def test_c14_a_step_is_known_by_its_number_alone():
    assert batch_indices(10, 4, 7, 1, "x") == batch_indices(10, 4, 7, 1, "x") != batch_indices(10, 4, 7, 2, "x")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_micro_batches_hold_everything_once_within_the_budget(lengths, budget):
    parts = micro_batches(lengths, budget)
    assert Counter(i for part in parts for i in part) == Counter(range(len(lengths)))
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in parts)


def test_groups_stay_adjacent():
    parts = micro_batches([5, 9, 5, 8], 100, groups=[1, 2, 2, 1])
    assert parts == [[0, 3, 1, 2]]


def test_texts_are_laid_out_whole_or_behind_their_sources():
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    whole, place_N = lay_out_texts(texts, [2, 0, 1], False)
    assert whole.ids_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9] and not whole.has_parents
    assert place_N.tolist() == list(range(9))
    apart, place_N = lay_out_texts(texts, [2, 0, 1], True)  # the text without a prompt: its first token
    assert apart.parent == (-1, -1, -1, 0, 1, 2)
    assert [apart.sequence(b) for b in range(6)] == [[1, 2], [5], [7], *texts]
    assert apart.ids_N[place_N].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert whole.previous.tolist() == [-1, 0, 1, 2, -1, 4, -1, 6, 7]
    before = apart.ids_N[apart.previous[place_N]]
    assert before[[1, 2, 3, 5, 7, 8]].tolist() == [1, 2, 3, 5, 7, 8]  # what stands before a token, through the parent
