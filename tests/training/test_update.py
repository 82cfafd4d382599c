import math

import pytest
import torch

from tests.conftest import tiny_decoder
from upslope.config import Optim
from upslope.models.heads import ActorCritic
from upslope.text.examples import Example
from upslope.training.batches import micro_batches
from upslope.training.supervised import example_logprobs
from upslope.training.update import StopAsked, learning_rate, make_optimizer, optimizer_step

LENGTHS = [3, 9, 2, 7, 5, 4, 8, 6]
EXAMPLES = [
    Example([(3 * i + k) % 31 for k in range(n)], [k > i % 3 for k in range(n)], i) for i, n in enumerate(LENGTHS)
]


def stepped(parts, examples=EXAMPLES, lr=0.01, stop=lambda: False, poison=False):
    model = tiny_decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trained = sum(sum(e.trained) for e in examples)

    def loss_of(part):
        loss = -example_logprobs(model, [examples[i] for i in part]).sum() / trained
        return loss * (math.nan if poison else 1.0), {"count": torch.tensor(float(len(part)))}

    metrics = optimizer_step(model, optimizer, parts, loss_of, lr=lr, clip_norm=1e9, should_stop=stop)
    return model, metrics


@pytest.mark.parametrize("budget", [1, 12, 25])
def test_c27_any_micro_batches_give_the_same_step(budget):
    whole, one = stepped([list(range(8))])
    cut, many = stepped(micro_batches(LENGTHS, budget))
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for name in ("loss/total", "count", "optim/grad_norm"):
        assert one[name] == pytest.approx(many[name], rel=1e-5)
    assert one["count"] == 8


def test_c11_the_order_of_examples_changes_nothing():
    straight, _ = stepped([list(range(8))])
    turned, _ = stepped([[5, 2, 7, 0], [1, 6, 3, 4]])
    for a, b in zip(straight.parameters(), turned.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_c42_the_norm_is_logged_before_the_clip_and_clipped_over_all():
    model = tiny_decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of = lambda part: (-example_logprobs(model, EXAMPLES).sum(), {})
    metrics = optimizer_step(model, optimizer, [0], loss_of, lr=1.0, clip_norm=0.5, should_stop=lambda: False)
    moved = math.sqrt(
        sum(float(((a - b.detach()) ** 2).sum()) for a, b in zip(before, model.parameters(), strict=True))
    )
    assert metrics["optim/grad_norm"] > 0.5 and moved == pytest.approx(0.5, rel=1e-3)


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted():
    model, metrics = stepped([list(range(8))], poison=True)
    assert metrics["optim/skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_decoder().parameters(), strict=True))


def test_a_stop_between_micro_batches_changes_nothing():
    asked = iter([False, True])
    with pytest.raises(StopAsked):
        stepped([[0, 1], [2, 3]], stop=lambda: next(asked))


def test_c41_schedules_count_optimizer_steps():
    optim = Optim(lr=1.0, warmup=4, schedule="linear")
    assert [learning_rate(optim, s, 12) for s in (0, 3, 4, 8, 11)] == [0.25, 1.0, 1.0, 0.5, 0.125]
    cosine = Optim(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate(Optim(lr=0.3), 99, 100) == 0.3


def test_c41_adamw_is_torchs_own_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    optimizer = make_optimizer(model, Optim(lr=0.1, weight_decay=0.5, eps=1e-8))
    model.weight.grad = torch.tensor([[2.0]])
    optimizer.step()
    assert model.weight.item() == pytest.approx(1.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)  # m / sqrt(v) is 1 at first


@pytest.mark.parametrize("kind", ["shared", "detached", "separate"])
def test_the_critics_own_weights_have_a_rate_of_their_own_on_the_same_schedule(kind):
    model = ActorCritic(tiny_decoder(), kind, tiny_decoder(3) if kind == "separate" else None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, Optim(lr=0.01), model.critic_parameters(), 0.04)
    loss_of = lambda part: (sum((p * (1.0 + p.detach())).sum() for p in model.parameters()), {})
    optimizer_step(model, optimizer, [0], loss_of, lr=0.005, clip_norm=1e9, should_stop=lambda: False)
    for name, p in model.named_parameters():  # Adam's first step is the rate, whatever the gradient
        moved = (p.detach() - before[name]).abs()
        rate = 0.005 if name.startswith("policy.") else 0.02
        torch.testing.assert_close(moved, torch.full_like(moved, rate), atol=1e-4, rtol=1e-3)
