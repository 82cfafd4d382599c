"""Learning from pairs: what no cut of the batch may change, what the reference is, and that every loss learns."""

import json
import math

import pytest
import torch

import upslope
from tests.conftest import tiny_decoder
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.config import load_recipe
from upslope.errors import DataError, Interrupted, RecipeError
from upslope.models.decoder import Decoder
from upslope.models.heads import RewardModel
from upslope.observe.events import read_events
from upslope.ragged import Ragged
from upslope.text.examples import Example, Pair
from upslope.training import preference
from upslope.training.pairs import OBJECTIVES, PolicyLearner, RewardLearner, lay_out_pairs, pair_logprobs, score_texts
from upslope.training.preference import pair_step
from upslope.training.reference import mismatched, remember
from upslope.training.state import RunState
from upslope.training.supervised import example_logprobs
from upslope.training.update import StopAsked

PROMPTS = [[3, 1], [6], [9, 7, 9, 2], [], [4, 4, 4]]
SIDES = [([4, 1, 5], [9, 2]), ([5, 3, 5, 8], [1]), ([3], [8, 8]), ([2, 7, 1], [5, 6]), ([1, 2], [3, 4])]
PAIRS = [Pair(p + c, p + r, len(p), 0.1 * i) for i, (p, (c, r)) in enumerate(zip(PROMPTS, SIDES, strict=True))]
LOSSES = [*OBJECTIVES, "dpo, smoothed and with sft", "bt"]


class FakeRun:
    class recipe:
        seed = 0
        checkpoint_minutes = 1e9

    @staticmethod
    def should_stop():
        return False

    @staticmethod
    def progress(*args):
        pass


def config(loss, **changes):
    stage = "reward" if loss == "bt" else "preference"
    table = {"steps": 4, "batch": 5, **changes}
    if loss != "bt":
        table |= {"loss": loss.partition(",")[0]}
    if "smoothed" in loss:
        table |= {"label_smoothing": 0.1, "sft_weight": 0.3}
    data = {"rows": "r", "chosen": "c", "rejected": "r"}
    return getattr(load_recipe({"model": "m", "data": data, stage: table}), stage)


def learner_of(loss, cfg, seed=0):
    torch.manual_seed(seed)
    if loss != "bt":
        return PolicyLearner(tiny_decoder(scale=3.0), cfg)
    model = RewardModel(tiny_decoder(scale=3.0))
    torch.nn.init.normal_(model.head.weight)
    return RewardLearner(model)


def stepped(loss, micro_tokens=10_000, items=(0, 1, 2, 3, 4), pairs=PAIRS, steps=2):
    """Two SGD steps on the same pairs: the second one has left the reference behind."""
    cfg = config(loss, optim={"lr": 0.05, "micro_tokens": micro_tokens, "clip_norm": 1e9})
    learner = learner_of(loss, cfg)
    state = RunState(learner.stage, learner.model, torch.optim.SGD(learner.model.parameters(), lr=0.05))
    remember(FakeRun, state, cfg, learner, pairs, pairs[:2])
    if state.pending and "mismatched" in state.pending:  # the steps below take `items`, not an order of their own
        others = mismatched([pairs[i] for i in items])
        logp = torch.stack(pair_logprobs(learner.trunk, others)).detach()
        state.pending["mismatched"] = logp.repeat(1, cfg.steps)
    metrics = []
    for _ in range(steps):
        metrics.append(pair_step(FakeRun, state, cfg, learner, pairs, items))
        state.step += 1
    return learner.model, metrics


def close(one, other):
    (model, metrics), (other_model, other_metrics) = one, other
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    work = ("tokens/read", "compute/tflop")  # a common parent is read once
    for m, o in zip(metrics, other_metrics, strict=True):
        assert {k: v for k, v in m.items() if k not in work} == pytest.approx(
            {k: v for k, v in o.items() if k not in work}, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_c27_c28_micro_batches_change_no_term_of_any_preference_loss(loss):
    whole = stepped(loss)
    assert whole[1][0]["optim/grad_norm"] > 1e-3
    for budget in (1, 12, 20):
        close(whole, stepped(loss, budget))


@pytest.mark.parametrize("loss", LOSSES)
def test_c11_the_order_of_the_pairs_changes_nothing(loss):
    if loss == "kto":  # z0 is of each pair with the next, so that it is the cycle that must stay
        close(stepped(loss), stepped(loss, items=(2, 3, 4, 0, 1)))
    else:
        close(stepped(loss), stepped(loss, items=(4, 2, 0, 3, 1)))


def test_c12_a_reward_models_pairs_with_and_without_a_common_parent_are_one():
    apart = [Pair(p.chosen, p.rejected, 0, p.margin) for p in PAIRS]
    close(stepped("bt"), stepped("bt", pairs=apart))


def test_a_shared_prompt_is_laid_out_once():
    batch, sides = lay_out_pairs(PAIRS)
    assert batch.tokens == sum(len(p.chosen) + len(p.rejected) - p.prompt_length for p in PAIRS)
    assert [batch.sequence(s) for s in sides] == [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS]


def test_for_a_kind_that_needs_a_source_every_side_has_a_parent():
    pairs = [*PAIRS, Pair([1, 2, 3], [1, 4]), Pair([5, 6], [7, 8, 9])]
    batch, sides = lay_out_pairs(pairs, needs_source=True)
    assert [batch.sequence(s) for s in sides] == [p.chosen for p in pairs] + [p.rejected for p in pairs]
    assert all(batch.parent[s] >= 0 for s in sides)
    last = [batch.sequence(batch.parent[s]) for s in (sides[len(pairs) - 1], sides[-1])]
    assert last == [[5], [7]]  # no prompt, other first tokens
    assert batch.parent[sides[len(pairs) - 2]] == batch.parent[sides[-2]]  # no prompt, the same first token


def test_a_prompt_as_a_parent_changes_no_loss_where_a_model_reads_both_ways_alike():
    class Apart(Decoder):
        needs_source = True

    examples = [Example([3, 1, 4, 1, 5], [False, False, True, True, True], 0), Example([9, 2, 6], [True] * 3, 1)]
    plain = tiny_decoder(scale=3.0)
    apart = Apart(plain.config)
    apart.load_state_dict(plain.state_dict())
    found = [
        torch.cat((example_logprobs(model, examples), *pair_logprobs(model, [*PAIRS, Pair([5, 6], [7, 8, 9])])))
        for model in (plain, apart)
    ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    texts, prompts = [e.ids for e in examples], [2, 0]
    judges = [RewardModel(plain), RewardModel(apart)]
    for judge in judges:
        judge.head.weight.data.fill_(1.0)
    scores = [score_texts(judge, texts, prompts, 64, lambda: False) for judge in judges]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and scores[0].std() > 0.1


def test_c1_c2_c12_c48_log_probabilities_and_gradients_are_of_completions_alone_by_brute_force():
    """Each side alone, its prompt written out, every logit computed: what shared prompts and packing must equal."""
    model, plain = tiny_decoder(scale=3.0), tiny_decoder(scale=3.0)
    weights = torch.linspace(-1.0, 1.0, 2 * len(PAIRS))
    expected = []
    for ids, prompt in [(getattr(p, side), p.prompt_length) for side in ("chosen", "rejected") for p in PAIRS]:
        logp = torch.log_softmax(plain.hidden(Ragged.of([ids])) @ plain.output_weight.t(), dim=-1)
        expected.append(sum(logp[n - 1, ids[n]] for n in range(max(prompt, 1), len(ids))))
    found = torch.cat(pair_logprobs(model, PAIRS))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-5)
    (found @ weights).backward()
    (torch.stack(expected) @ weights).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_c48_the_reference_is_the_start_in_the_same_precision_to_the_bit(loss, dtype):
    cfg = config(loss, batch=3, steps=2, optim={"micro_tokens": 9, "lr": 0.5})
    learner = learner_of(loss, cfg)
    learner.model.compute_dtype = dtype
    state = RunState("preference", learner.model, torch.optim.SGD(learner.model.parameters(), lr=0.1))
    pairs = [Pair(p.chosen, p.rejected, p.prompt_length) for p in PAIRS]
    remember(FakeRun, state, cfg, learner, pairs, pairs[:2])
    items = preference.batch_indices(len(pairs), 3, 0, 0, "preference")
    first = pair_step(FakeRun, state, cfg, learner, pairs, items)
    assert first["preference/margin"] == 0.0 and first["preference/pair_accuracy"] == 0.5
    assert first.get("preference/z0", 0.0) == 0.0
    expected = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}[loss]
    assert first["loss/total"] == pytest.approx(expected, rel=1e-6)
    state.step = 1
    second = pair_step(FakeRun, state, cfg, learner, pairs, items)
    assert second["preference/margin"] != 0.0


def test_c48_losses_without_a_reference_remember_nothing():
    for loss in ("simpo", "orpo", "bt"):
        cfg = config(loss)
        learner = learner_of(loss, cfg)
        state = RunState(learner.stage, learner.model, torch.optim.SGD(learner.model.parameters(), lr=0.1))
        remember(FakeRun, state, cfg, learner, PAIRS, PAIRS)
        assert state.pending is None


def test_ipo_and_its_kin_divide_by_the_tokens_of_the_completion_and_dpo_does_not():
    pairs = [Pair([1, 2, 3, 4, 5], [1, 2, 3], 1)]
    chosen, rejected = (x.item() for x in pair_logprobs(tiny_decoder(scale=3.0), pairs))
    metrics = stepped("simpo", pairs=pairs, items=(0,), steps=1)[1][0]
    assert metrics["preference/chosen_reward"] == pytest.approx(2.0 * chosen / 4, rel=1e-5)
    assert metrics["preference/rejected_reward"] == pytest.approx(2.0 * rejected / 2, rel=1e-5)
    odds = stepped("orpo", pairs=pairs, items=(0,), steps=1)[1][0]
    gap = odds["preference/margin"]
    assert odds["preference/chosen_nll"] == pytest.approx(-chosen / 4, rel=1e-5)
    assert odds["loss/total"] == pytest.approx(-chosen / 4 + 0.1 * math.log1p(math.exp(-gap)), rel=1e-5)


def test_ktos_mismatched_pairs_have_anothers_completions():
    found = mismatched([PAIRS[0], PAIRS[0], PAIRS[1]])
    assert [p.chosen for p in found] == [[3, 1, 5, 3, 5, 8], [3, 1, 5, 3, 5, 8], [6, 4, 1, 5]]
    assert [p.rejected for p in found] == [[3, 1, 1], [3, 1, 1], [6, 9, 2]]
    assert [p.prompt_length for p in found] == [2, 2, 1]


def test_c28_ktos_reference_point_is_that_of_the_whole_batch_in_every_micro_batch():
    cfg = config("kto", optim={"micro_tokens": 1})
    learner = learner_of("kto", cfg)
    state = RunState("preference", learner.model, torch.optim.SGD(learner.model.parameters(), lr=0.1))
    remember(FakeRun, state, cfg, learner, PAIRS, PAIRS)
    state.pending["mismatched"] -= 3.0  # as if the policy had gone 3 nats from its reference,
    state.pending["train"][0] -= 10.0  # and 10 towards what is chosen
    items = preference.batch_indices(len(PAIRS), 5, 0, 0, "preference")
    metrics = pair_step(FakeRun, state, cfg, learner, PAIRS, items)
    assert metrics["preference/z0"] == pytest.approx(3.0, abs=1e-5)
    chosen, rejected = 1 / (1 + math.exp(0.1 * (10 - 3))), 1 / (1 + math.exp(0.1 * 3))
    assert metrics["loss/total"] == pytest.approx((chosen + rejected) / 2, rel=1e-5)


def test_a_stop_while_the_reference_is_worked_out_loses_none_of_it():
    cfg = config("kto", batch=2)
    learner = learner_of("kto", cfg)
    state = RunState("preference", learner.model, torch.optim.SGD(learner.model.parameters(), lr=0.1))
    asked = iter([False] * 5 + [True])

    class Stopped(FakeRun):
        should_stop = staticmethod(lambda: next(asked))

    with pytest.raises(StopAsked):
        remember(Stopped, state, cfg, learner, PAIRS, PAIRS)
    half = {name: tensor.clone() for name, tensor in state.pending.items()}
    assert state.extra["remembered"] == 2 and half["mismatched"].isnan().any()
    remember(FakeRun, state, cfg, learner, PAIRS, PAIRS)
    for name, tensor in state.pending.items():
        kept = ~half[name].isnan()
        assert kept.any() and torch.equal(tensor[kept], half[name][kept]) and not tensor.isnan().any()


@pytest.fixture(scope="module")
def pair_rows():
    better, worse = ["fine", "the best", "full of life"], ["dull", "the worst", "of nothing"]
    rows = []
    for n in range(60):
        prompt = f"film {n}, "
        rows.append(
            {"prompt": prompt, "yes": better[n % 3], "no": worse[n // 3 % 3], "by": 0.1 * (n % 4), "words": "w"}
        )
    return rows


def pair_recipe(model_dir, stage, **table):
    return {
        "name": "pairs",
        "model": str(model_dir),
        "dtype": "fp32",
        "checkpoint_minutes": 0,
        "data": {"rows": "given", "prompt": "prompt", "chosen": "yes", "rejected": "no", "valid": 0.25, "test": 0.05},
        "optim": {"lr": 3e-3, "micro_tokens": 256},
        stage: {"steps": 3, "batch": 4, **table},
    }


@pytest.mark.parametrize("loss", [*OBJECTIVES, "bt"])
def test_every_loss_learns_a_plain_preference_of_unseen_prompts(loss, model_dir, pair_rows, tmp_path):
    table = {} if loss == "bt" else {"loss": loss}
    stage = "reward" if loss == "bt" else "preference"
    recipe = pair_recipe(model_dir, stage, **table, steps=16, batch=8) | {"checkpoint_minutes": 60}
    recipe["optim"]["lr"] = 1e-2
    folder = upslope.train(recipe, rows=pair_rows, out=tmp_path, plain=True)
    metrics = json.loads((folder / stage / "done.json").read_text())["metrics"]
    assert metrics["valid/pair_accuracy"] > 0.9 and metrics["valid/margin"] > metrics["valid/margin_before"]
    assert metrics["valid/pair_accuracy_low"] <= metrics["valid/pair_accuracy"] <= metrics["valid/pair_accuracy_high"]
    if loss == "bt" or OBJECTIVES[loss].reference:  # a head of zeros; a policy that is its own reference
        assert metrics["valid/pair_accuracy_before"] == 0.5 and metrics["valid/margin_before"] == 0.0
    table = next(e for e in read_events(folder / "events.jsonl") if e["kind"] == "table")
    assert table["columns"] == ["", "before", "after"] and len(table["rows"]) == 2
    if stage == "preference":
        assert upslope.load(folder, dtype="fp32").generate(["film 3, "], max_tokens=3)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, model_dir, pair_rows):
    recipe = pair_recipe(model_dir, "preference", loss="kto") | {"reward": {"steps": 2, "batch": 4}}
    recipe["data"]["margin"] = "by"
    folder = upslope.train(recipe, rows=pair_rows, out=tmp_path_factory.mktemp("runs") / "unbroken", plain=True)
    return recipe, outcome(folder)


# 2 to 7: reward, its steps, its unseen pairs, its scale; 9 to 15: the reference and the mismatched pairs; 16: unseen
# pairs; 17 to 22: z0 and the update of each step, then unseen pairs
@pytest.mark.parametrize("stop_at", [2, 4, 7, 9, 12, 15, 16, 17, 20, 22])
def test_c55_a_preference_stage_stopped_anywhere_ends_where_an_unbroken_one_ends(
    unbroken, pair_rows, tmp_path, monkeypatch, stop_at
):
    recipe, first = unbroken
    stop_at_ask(monkeypatch, stop_at)
    with pytest.raises(Interrupted, match="the same command carries on"):
        upslope.train(recipe, rows=pair_rows, out=tmp_path / "run", plain=True)
    monkeypatch.undo()
    same(outcome(upslope.train(recipe, rows=pair_rows, out=tmp_path / "run", plain=True)), first)


def test_c55_a_crash_in_a_preference_step_repeats_from_the_checkpoint(unbroken, pair_rows, tmp_path, monkeypatch):
    recipe, first = unbroken
    inner, calls = preference.pair_step, 0

    def crash(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError("made up")
        return inner(*args)

    monkeypatch.setattr(preference, "pair_step", crash)
    with pytest.raises(MemoryError):
        upslope.train(recipe, rows=pair_rows, out=tmp_path / "run", plain=True)
    monkeypatch.undo()
    same(outcome(upslope.train(recipe, rows=pair_rows, out=tmp_path / "run", plain=True)), first)


@pytest.mark.parametrize(
    ("over", "error", "message"),
    [
        (["preference.loss=dpoo"], RecipeError, "'dpo', 'ipo', 'kto', 'simpo' or 'orpo'"),
        (["preference.margin=0.5"], RecipeError, "margin = 0.5 has no place in dpo: it is simpo's|it is simpo's"),
        (["preference.loss=ipo", "preference.label_smoothing=0.1"], RecipeError, "label_smoothing = 0.1 is dpo's"),
        (["preference.loss=orpo", "preference.sft_weight=1"], RecipeError, "sft_weight = 1 has no place in orpo"),
        (["preference.loss=kto", "preference.batch=1"], RecipeError, "batch = 1 leaves kto no mismatched pair"),
        (["preference.loss=ipo", "data.margin=by"], RecipeError, r"data.margin is read by \[reward\] and by dpo"),
        (["data.margin=bye"], DataError, "no column 'bye'; did you mean 'by'"),
        (["data.margin=words"], DataError, "no pairs left of .*: whose words is no number"),
        (["data.rejected=yes"], DataError, "no pairs left of .*: with two equal sides"),
        (["data.max_tokens=2"], DataError, "no pairs left of .*: longer than 2 tokens"),
        (["data.chosen=by"], DataError, "no pairs left of .*: that are no text"),
        (["preference.freeze_layers=3"], RecipeError, "the model has 2 blocks"),
    ],
)
def test_bad_input_of_a_preference_stage_is_one_line(model_dir, pair_rows, tmp_path, over, error, message):
    with pytest.raises(error, match=message) as caught:
        recipe = pair_recipe(model_dir, "preference")
        upslope.train(recipe, *over, rows=pair_rows, out=tmp_path / "run", plain=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "prompt", "message"),
    [
        ("dpo", "q" * 80, "a side of a pair has .* tokens, the model's context is 64"),
        ("kto", "q" * 24, "kto joins prompts of up to .* with completions of up to"),
    ],
)
def test_pairs_beyond_the_context_are_told_before_the_first_step(model_dir, pair_rows, tmp_path, loss, prompt, message):
    rows = [r | {"yes": "xyz" * 13} for r in pair_rows]
    rows += [r | {"prompt": prompt + r["prompt"], "yes": "best", "no": "worst"} for r in pair_rows]
    recipe = pair_recipe(model_dir, "preference", loss=loss)
    with pytest.raises(DataError, match=message):
        upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
