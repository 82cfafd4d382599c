import pytest

from upslope.ragged import Ragged


def test_offsets_positions_and_what_came_before():
    batch = Ragged.of([[5, 6, 7], [8], [9, 10]], [-1, 0, -1])
    assert batch.starts == (0, 3, 4, 6)
    assert batch.lengths == (3, 1, 2) and batch.prefix_lengths == (0, 3, 0)
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.previous.tolist() == [-1, 0, 1, 2, -1, 4]
    assert batch.last.tolist() == [2, 3, 5]
    assert batch.sequence(1) == [5, 6, 7, 8]


def test_a_child_without_tokens_ends_where_its_parent_does():
    assert Ragged.of([[1, 2], []], [-1, 0]).last.tolist() == [1, 1]


def test_c3_the_last_token_is_found_by_length_and_an_empty_sequence_has_none():
    with pytest.raises(ValueError, match="sequence 1 of the batch is empty"):
        _ = Ragged.of([[1], []]).last


@pytest.mark.parametrize("parents", [[-1, 5], [1, 0], [0, -1], [-1]])
def test_parents_that_cannot_be(parents):
    with pytest.raises(ValueError, match="parent"):
        Ragged.of([[1], [2]], parents)
