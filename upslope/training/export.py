"""Finished models, written so that upslope and transformers can load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from upslope.errors import ModelError, RunError
from upslope.models.heads import ActorCritic, RewardModel
from upslope.models.open import load_model, save_model
from upslope.models.trunk import Trunk
from upslope.text.tokenizer import Tokenizer
from upslope.training.run import Run


def export_policy(run: Run, stage: str, model: Trunk | ActorCritic, tokenizer: Tokenizer) -> Path:
    """Write STAGE/model; a critic goes beside it, as STAGE/critic.safetensors."""
    policy = model.policy if isinstance(model, ActorCritic) else model
    with writing(run.stage_folder(stage)):
        if isinstance(model, ActorCritic):
            critic = {n: t.contiguous() for n, t in model.state_dict().items() if not n.startswith("policy.")}
            if critic:
                save_file(critic, run.stage_folder(stage) / "critic.safetensors")
        return write_model(run.stage_folder(stage) / "model", policy, tokenizer)


def export_reward_model(run: Run, stage: str, model: RewardModel, tokenizer: Tokenizer) -> Path:
    """Write STAGE/model: the trunk in Hugging Face layout, the scalar head and its scale beside it."""
    head = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not name.startswith("trunk.")}
    with writing(run.stage_folder(stage)):
        folder = write_model(run.stage_folder(stage) / "model", model.trunk, tokenizer)
        save_file(head, folder / "reward_head.safetensors")
        return folder


def load_reward_model(folder: Path, *, dtype: torch.dtype) -> RewardModel:
    """Read what `export_reward_model` wrote. Raises ModelError where it is not a reward model or damaged."""
    path = folder / "reward_head.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder} is not a reward model: it has no {path.name}", "name a reward stage's model folder")
    model = RewardModel(load_model(folder, dtype=dtype))
    try:
        head = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "train the reward stage again") from None
    missing, unexpected = model.load_state_dict(head, strict=False)
    missing = [name for name in missing if not name.startswith("trunk.")]
    if missing or unexpected:
        raise ModelError(f"{path} does not fit: missing {missing}, extra {unexpected}", "train the reward stage again")
    return model


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the disk refuses is one line; the checkpoint before it still stands."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(
            f"cannot write the model under {folder}: {reason}", "free space; the same command carries on"
        ) from None


def write_model(folder: Path, model: Trunk, tokenizer: Tokenizer) -> Path:
    """Write a model's folder beside its place, then let it take it."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, partial)
    tokenizer.save(partial)
    (partial / "upslope.json").write_text(json.dumps({"tokenizer": tokenizer.fingerprint}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
