"""Models by transformers' own classes: numbers equal theirs, what cannot be right is refused, and a whole run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, RobertaConfig

import upslope
from tests.conftest import make_recipe
from tests.models.kinds import COMMON, FALLBACK, fallback, tiny
from upslope.errors import ModelError
from upslope.models.fallback import REMARK, Fallback
from upslope.models.open import load_model, save_model
from upslope.observe.events import read_events
from upslope.ragged import Ragged

SEQUENCES = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


def saved(config, folder, **changes):
    model = fallback(config, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
            else:
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    save_model(model, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


@pytest.mark.parametrize("name", FALLBACK)
def test_logits_equal_those_of_the_class(name, tmp_path):
    ours = load_model(saved(FALLBACK[name], tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    hidden = ours.hidden(Ragged.of(SEQUENCES)).split([len(s) for s in SEQUENCES])
    for sequence, rows in zip(SEQUENCES, hidden, strict=True):
        expected = theirs(torch.tensor([sequence])).logits[0]
        torch.testing.assert_close(rows @ ours.output_weight.t(), expected, atol=1e-4, rtol=1e-4)


def test_a_constant_scale_of_the_logits_is_found(tmp_path):
    config = GraniteConfig(**COMMON, num_key_value_heads=2, intermediate_size=24, logits_scaling=3.0)
    ours = load_model(saved(config, tmp_path))
    assert ours.scale == pytest.approx(1 / 3, rel=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(torch.tensor([SEQUENCES[0]])).logits[0]
    found = ours.hidden(Ragged.of(SEQUENCES[:1])) @ ours.output_weight.t()
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)


def test_logits_that_are_no_product_are_refused(tmp_path):
    shape = dict(num_key_value_heads=2, intermediate_size=24, head_dim=4, final_logit_softcapping=0.1)
    config = Gemma2Config(**COMMON, **shape)
    with pytest.raises(ModelError, match="the logits of Gemma2ForCausalLM are no product of states and weights"):
        load_model(saved(config, tmp_path))


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    config = RobertaConfig(**COMMON | {"pad_token_id": 0}, intermediate_size=24, is_decoder=False)
    with pytest.raises(ModelError, match="RobertaForCausalLM looks at later tokens"):
        load_model(saved(config, tmp_path))


def test_a_model_that_sees_pads_is_refused(tmp_path, monkeypatch):
    inner = Fallback._states
    monkeypatch.setattr(Fallback, "_states", lambda self, ids, real: inner(self, ids, real) * ids.shape[1])
    with pytest.raises(ModelError, match="OPTForCausalLM sees the pads behind a text"):
        load_model(saved(FALLBACK["fallback-opt"], tmp_path))


def test_weights_that_transformers_would_draw_at_random_are_refused(tmp_path):
    saved(FALLBACK["fallback-opt"], tmp_path, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"missing keys, the first model\.decoder\.layers\.2"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    saved(FALLBACK["fallback-opt"], tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_by_a_class_of_transformers_says_so_once(tokenizer, rows, tmp_path):
    config = FALLBACK["fallback-opt"]
    config = type(config)(**{**config.to_dict(), "vocab_size": tokenizer.vocab_size})
    model = tmp_path / "model"
    save_model(fallback(config, 1), model)
    tokenizer.save(model)
    recipe = make_recipe(model)
    del recipe["reward"]
    recipe["rl"] |= {"reward": "tests.scores:count_lower", "critic": "separate", "freeze_layers": 1, "steps": 2}
    run = upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    said = [e["text"] for e in read_events(run / "events.jsonl") if e["kind"] == "account" and REMARK in e["text"]]
    assert said == [f"the model: {REMARK}"]
    start, end = load_file(model / "model.safetensors"), load_file(run / "rl" / "model" / "model.safetensors")
    assert start.keys() == end.keys() and any(not torch.equal(start[key], end[key]) for key in start)
    with pytest.warns(UserWarning, match=REMARK):
        loaded = upslope.load(run, dtype="fp32")
    assert len(loaded.generate(["a fine film"], max_tokens=3)) == 1


def test_hidden_rows_of_a_prompt_come_from_the_pass_of_its_answer():
    model = tiny("fallback-gpt-neox")
    shared = model.hidden(Ragged.of([[7, 8, 9], [1, 2], [], [3]], [-1, 0, 0, 0]))
    torch.testing.assert_close(shared[:3], model.hidden(Ragged.of([[7, 8, 9]])), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared[3:5], model.hidden(Ragged.of([[7, 8, 9, 1, 2]]))[3:], atol=1e-5, rtol=1e-5)
