"""The operations that a step is said to take, against those that torch counts, and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import tiny_decoder
from upslope.config import Scratch
from upslope.models.heads import ActorCritic
from upslope.models.open import new_model
from upslope.ragged import Ragged
from upslope.training.episode import Episode, lay_out
from upslope.training.state import freeze_lowest
from upslope.training.work import Meter, Tokens, episode_tokens, rollout_work, text_tokens

PROMPT, REST = 5, 3


def counted(model, batch):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.hidden(batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["decoder", "lstm", "encdec"])
def test_a_pass_through_a_trunk_is_what_torch_counts(kind):
    heads = {} if kind == "lstm" else {"heads": 4}
    model = new_model(Scratch(kind=kind, width=256, layers=2, context=64, vocab=300, **heads), 300, 1)
    text = list(range(3, 3 + PROMPT + REST))
    cut = PROMPT if model.needs_source else 0
    batch = Ragged.of([text[:cut], text[cut:]], [-1, 0]) if cut else Ragged.of([text])
    said = Meter.of(model, projects=False).forward(Tokens(PROMPT, REST, REST))
    found = counted(model, batch)
    start = 0.0  # a decoder's start token stands in no batch
    if kind == "encdec":
        start = Meter.of(model, projects=False).forward(Tokens(0, 1, 0))
    assert said > 0
    assert said + start <= found < 1.05 * (said + start), "attention between tokens is the rest"


def test_what_is_frozen_has_a_forward_pass_only():
    model = tiny_decoder()
    tokens = Tokens(PROMPT, REST, REST)
    whole = Meter.of(model)
    assert whole.step(tokens) == 3 * whole.forward(tokens)
    block = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim > 1)
    output = model.output_weight.numel()
    freeze_lowest(model, 1)
    frozen = Meter.of(model)
    projected = 2 * output * REST if not model.output_weight.requires_grad else 0
    assert whole.step(tokens) - frozen.step(tokens) == 4 * block * (PROMPT + REST) + projected


def episodes():
    return [
        Episode(
            "p", "c", list(range(3, 3 + PROMPT + n)), list(range(PROMPT, PROMPT + n)), [0.0] * n, "eos", 0, group, k
        )
        for group, k, n in ((0, 0, 2), (0, 1, 3), (1, 0, 4))
    ]


def test_a_prompt_that_samples_share_is_read_once_as_it_is_laid_out():
    tokens = episode_tokens(episodes())
    assert tokens == Tokens(2 * PROMPT, 9, 9)
    assert len(lay_out(episodes())[0].ids_N) == tokens.read


def test_a_rollout_is_sampled_scored_and_learned_from():
    policy, reference, critic = tiny_decoder(), tiny_decoder(1), tiny_decoder(2)
    tokens = episode_tokens(episodes())
    one = Meter.of(policy).forward(tokens)
    own = Meter.of(critic, projects=False).forward(tokens)

    def tflop(model, **changes):
        settings = {"passes": 2.0, "scored": True, "reference": None, "judges": []} | changes
        return rollout_work(model, episodes(), episodes(), **settings)["compute/tflop"] * 1e12

    alone = ActorCritic(policy, "none")
    assert tflop(alone) == pytest.approx(one * (1 + 1 + 2 * 3))
    assert tflop(alone, scored=False, passes=1.0) == pytest.approx(one * (1 + 3))
    assert tflop(alone, reference=reference) == pytest.approx(one * (1 + 1 + 1 + 2 * 3))
    assert tflop(alone, judges=[reference]) == pytest.approx(one * 8 + own)
    assert tflop(ActorCritic(policy, "separate", critic)) == pytest.approx(one * 8 + own * (1 + 2 * 3))


def test_the_first_token_of_a_text_is_read_and_not_predicted():
    assert text_tokens([[True, True, True], [False, False, True]]) == Tokens(2, 4, 3)


def test_an_encoder_that_is_pretrained_projects_what_is_masked_to_its_vocabulary():
    model = new_model(Scratch(kind="encoder", width=16, layers=2, heads=2, context=64, vocab=300), 300, 1)
    model.read_masks()
    trunk = sum(p.numel() for p in model.stack.parameters() if p.ndim > 1)
    assert Meter.of(model).forward(Tokens(10, 0, 2)) == 2 * trunk * 10 + 2 * (300 * 16 + 16 * 16) * 2
    model.take_labels(("a", "b"))
    assert Meter.of(model).output == 2 * 17
