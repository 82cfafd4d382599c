"""A checkpoint that an earlier version wrote (tests/fixtures/make_checkpoint.py) is read by this one."""

import shutil

import torch

from tests.fixtures.make_checkpoint import FOLDER, as_run, batch, new_state
from upslope.training.pending import FIELDS, batch_from_tensors


def test_a_checkpoint_of_format_1_is_restored_whole(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "rl")
    state = new_state()
    start = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    assert state.restore(as_run(tmp_path / "rl"))
    assert (state.step, state.rollout) == (17, 4) and state.seconds >= 60
    assert state.extra["minibatch"] == 1 and state.extra["updates"] == [{"loss/total": 0.5}]
    for name, tensor in state.model.state_dict().items():
        assert torch.allclose(tensor, start[name] - 1e-5, atol=1e-6), (
            name
        )  # one step of AdamW under a constant gradient
    for parameter in state.model.parameters():
        found = state.optimizer.state[parameter]
        assert found["step"] == 1 and bool((found["exp_avg"] > 0.0124).all())
    assert state.pending is not None
    episodes, prepared, metrics = batch_from_tensors(state.pending, state.extra["pending"])
    expected_episodes, expected = batch()
    assert metrics == {"reward/mean": 1.5} and episodes == expected_episodes and prepared.episodes == expected.episodes
    for name in FIELDS:
        assert torch.equal(getattr(prepared, name), getattr(expected, name)), name
