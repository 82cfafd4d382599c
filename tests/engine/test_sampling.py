import pytest
import torch

from upslope.engine.sampling import choose, log_distribution


def distribution(logits, temperature=1.0, k=0, p=1.0, valid=None):
    rows = len(logits)
    return log_distribution(logits.clone(), torch.full((rows,), temperature), [k] * rows, [p] * rows, valid)


@pytest.mark.parametrize("vocabulary", [5, 256, 700])
def test_the_two_level_search_equals_one_cumulative_sum(vocabulary):
    torch.manual_seed(0)
    logp = torch.log_softmax(torch.randn(200, vocabulary) * 3, -1)
    u = torch.rand(200, dtype=torch.float64)
    ids, chosen = choose(logp, u, torch.zeros(200, dtype=torch.bool))
    cdf = logp.double().exp().cumsum(-1)
    expected = torch.searchsorted(cdf / cdf[:, -1:], u[:, None], right=True).squeeze(1)
    assert (ids == expected).float().mean() > 0.99  # rounding at an edge may move one
    assert torch.equal(chosen, logp.gather(1, ids[:, None]).squeeze(1))


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_chosen(u):
    logp = torch.full((3, 600), float("-inf"))
    logp[0, 300], logp[1, 0], logp[2, 599] = 0.0, 0.0, 0.0
    ids, chosen = choose(logp, torch.full((3,), u, dtype=torch.float64), torch.zeros(3, dtype=torch.bool))
    assert ids.tolist() == [300, 0, 599] and chosen.tolist() == [0.0] * 3


def test_frequencies_follow_the_distribution():
    logp = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0, -1.0]]), -1)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    ids, _ = choose(logp.expand(10_000, -1), u, torch.zeros(10_000, dtype=torch.bool))
    share = torch.bincount(ids, minlength=4) / 10_000
    torch.testing.assert_close(share, logp[0].exp(), atol=2e-4, rtol=0)


def test_c18_top_k_and_top_p_renormalise():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    two = distribution(logits, k=2).exp()[0]
    torch.testing.assert_close(two, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    nucleus = distribution(logits, p=0.75).exp()[0]
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert distribution(logits, p=0.01).exp()[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    ties = distribution(torch.zeros(1, 4), k=2).exp()[0]
    torch.testing.assert_close(ties, torch.tensor([0.5, 0.5, 0.0, 0.0]))


def test_c17_temperature_and_padding_of_the_vocabulary():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    torch.testing.assert_close(distribution(logits, 0.5), torch.log_softmax(logits * 2, -1))
    assert distribution(logits, valid=2)[0, 2] == float("-inf")
    assert distribution(logits, valid=2).exp().sum() == pytest.approx(1.0)


def test_greedy_takes_the_most_probable_beside_rows_that_are_drawn():
    logp = torch.log_softmax(torch.tensor([[0.0, 5.0, 1.0]] * 2), -1)
    ids, _ = choose(logp, torch.tensor([0.001, 0.001], dtype=torch.float64), torch.tensor([True, False]))
    assert ids.tolist() == [1, 0]
