"""What upslope.algo promises: every public name is listed, typed by shape, and refuses tensors of other shapes."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import upslope.algo as algo

PAGE = Path(__file__).parent.parent.parent / "docs" / "algorithms.md"
FUNCTIONS = [name for name in algo.__all__ if inspect.isfunction(getattr(algo, name))]
STABLE = {
    "AdaptiveKL",
    "AdaptivePenalty",
    "RunningMoments",
    "best_of_group",
    "bradley_terry_loss",
    "cispo_loss",
    "clipped_policy_loss",
    "conjugate_gradient",
    "cut_logprobs",
    "discounted_returns",
    "dpo_loss",
    "explained_variance",
    "gae",
    "group_advantages",
    "group_deviation",
    "importance_weights",
    "ipo_loss",
    "kept_tokens",
    "kl_estimate",
    "kto_loss",
    "kto_reference_point",
    "orpo_loss",
    "policy_gradient_loss",
    "reduce",
    "sequence_clipped_loss",
    "simpo_loss",
    "surrogate_loss",
    "token_kl",
    "token_logprobs",
    "token_weights",
    "trust_region_step",
    "value_loss",
    "whiten",
}


def test_the_public_names_are_these_and_none_goes_away_unnoticed():
    assert set(algo.__all__) == STABLE
    assert all(hasattr(algo, name) for name in STABLE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_typed_by_shape_and_says_its_rule(name):
    function = inspect.unwrap(getattr(algo, name))
    annotations = {k: str(v) for k, v in inspect.get_annotations(function).items()}
    parameters = inspect.signature(function).parameters
    tensors = [k for k in parameters if re.search(r"_(A|B|N|ND|NV|VD|B1)$", k) or k == "starts"]
    for key in tensors:
        if (name, key) != ("reduce", "x_A"):  # of any shape
            assert re.search(r"Float|Int|Bool", annotations[key]), f"{name}({key}) has no shape"
    text = inspect.getdoc(function)
    assert text and text.splitlines()[0].endswith("."), f"{name} has no first sentence"


@pytest.mark.parametrize(
    "call",
    [
        lambda: algo.policy_gradient_loss(torch.zeros(3), torch.zeros(4)),
        lambda: algo.clipped_policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1)),
        lambda: algo.surrogate_loss(torch.zeros(3), torch.zeros(2), torch.zeros(3)),
        lambda: algo.cispo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(2)),
        lambda: algo.gae(torch.zeros(3), torch.zeros(2), torch.tensor([0, 3]), gamma=1.0, lam=1.0),
        lambda: algo.group_advantages(torch.zeros(3), torch.zeros(3)),
        lambda: algo.token_kl(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, 3), torch.zeros(5, 3)),
        lambda: algo.token_logprobs(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)),
        lambda: algo.value_loss(torch.zeros(3), torch.zeros(1)),
        lambda: algo.kl_estimate(torch.zeros(3), torch.zeros(3, 1)),
        lambda: algo.dpo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(2)),
        lambda: algo.token_weights(torch.zeros(3)),
        lambda: algo.importance_weights(torch.zeros(3), torch.zeros(4)),
        lambda: algo.whiten(torch.zeros(3, 3)),
    ],
)
def test_tensors_of_other_shapes_are_refused_in_tests(call):
    with pytest.raises(TypeCheckError):
        call()


def test_outside_of_tests_the_checks_cost_nothing():
    code = "import sys, upslope.algo as a; print(a.whiten.__module__, hasattr(a.whiten, '__wrapped__'), *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    module, wrapped, *imported = done.stdout.split()
    assert (module, wrapped) == ("upslope.algo.stats", "False")
    assert "torch" in imported and ("triton" not in imported or torch.version.cuda or torch.version.hip)
