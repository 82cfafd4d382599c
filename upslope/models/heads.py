"""What stands on a trunk of any kind: a scalar head, a reward model, and a policy with its critic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upslope.algo import cut_logprobs, token_logprobs
from upslope.errors import ModelError
from upslope.models.trunk import Trunk
from upslope.ragged import Ragged, send

CRITICS = ("none", "shared", "detached", "separate")


class ScalarHead(nn.Module):
    """One number from a hidden state, in fp32: 0 everywhere before it is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        return hidden_ND.to(wide) @ self.weight.to(wide) + self.bias.to(wide)


class RewardModel(nn.Module):
    """A trunk with a scalar head at the last token of each sequence: score_B = (head(hidden) - mean) / std.

    Lengths say which token is last. mean and std are 0 and 1 until `set_scale` fixes them.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ScalarHead(trunk.config.width)
        self.register_buffer("scale_mean", torch.zeros(()))
        self.register_buffer("scale_std", torch.ones(()))

    def score(self, batch: Ragged) -> Tensor:
        """score_B of whole sequences, fp32."""
        raw_B = self.head(self.trunk.hidden(batch)[send(batch.last, self.trunk.device)])
        scaled: Tensor = (raw_B - self.scale_mean) / self.scale_std
        return scaled

    def set_scale(self, *, mean: float, std: float) -> None:
        """Shift and scale all scores from now on. Raises ModelError for a deviation of 0."""
        if not std > 0:
            raise ModelError(f"the reward model gives every text the same score (deviation {std})", "train it longer")
        self.scale_mean.fill_(mean)  # type: ignore[operator]
        self.scale_std.fill_(std)  # type: ignore[operator]


@dataclass(frozen=True)
class TokenScores:
    """Of A action tokens: log-probability, entropy of the distribution each was drawn from, value of the state (None
    without a critic), and the policy's hidden state there."""

    logp_A: Tensor
    entropy_A: Tensor
    value_A: Tensor | None
    hidden_AD: Tensor


@dataclass(frozen=True)
class Cut:
    """What a sampler's distribution is cut by: the top_k and top_p of a frozen model's own distribution."""

    model: Trunk
    top_k: int
    top_p: float


class ActorCritic(nn.Module):
    """A policy and its critic: none, a head on the policy's trunk (shared), the same without gradients into the
    trunk (detached), or a head on a trunk of its own (separate)."""

    def __init__(self, policy: Trunk, critic: str, critic_trunk: Trunk | None = None) -> None:
        super().__init__()
        if critic not in CRITICS or (critic == "separate") != (critic_trunk is not None):
            raise ModelError(
                f"critic {critic!r} with{'' if critic_trunk else 'out'} a trunk of its own cannot be", "mend it"
            )
        self.policy = policy
        self.kind = critic
        self.value_head = ScalarHead(policy.config.width) if critic != "none" else None
        self.critic_trunk = critic_trunk

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critic has of its own."""
        return [p for name, p in self.named_parameters() if not name.startswith("policy.")]

    @torch.no_grad()
    def begin_values(self, mean: float) -> None:
        """Let a critic that has learned nothing yet expect the mean score everywhere, so that it need not first climb
        there through weights that tell one state from another."""
        head = self.value_head
        if head is not None and not bool(head.weight.any()) and not bool(head.bias.any()):
            head.bias.fill_(mean)

    def evaluate(
        self, batch: Ragged, action_A: Tensor, *, temperature: float = 1.0, cut: Cut | None = None
    ) -> TokenScores:
        """Scores of the actions at places action_A of the batch, each read in the state before it.

        With a cut, the policy's distribution is what is left of it among the tokens that the cut keeps.
        Raises ValueError for an action that is the first token of its sequence: nothing has predicted it.
        """
        state_A = batch.previous[action_A]
        if bool((state_A < 0).any()):
            raise ValueError("an action is the first token of its sequence: no state came before it")
        state_A, target_A = send(state_A, self.policy.device), batch.ids_N[send(action_A, batch.ids_N.device)]
        hidden_ND = self.policy.hidden(batch)
        hidden_AD = hidden_ND[state_A]
        weight_VD = self.policy.output_weight
        if cut is None:
            logp_A, entropy_A = token_logprobs(hidden_AD, weight_VD, target_A, temperature=temperature)
        else:
            with torch.no_grad():
                cut_AD = cut.model.hidden(batch)[state_A]
            logp_A, entropy_A = cut_logprobs(
                hidden_AD,
                weight_VD,
                target_A,
                cut_AD,
                cut.model.output_weight,
                top_k=cut.top_k,
                top_p=cut.top_p,
                temperature=temperature,
            )
        if self.value_head is None:
            return TokenScores(logp_A, entropy_A, None, hidden_AD)
        value_A = self.value_head(self._critic_hidden(batch, hidden_ND)[state_A])
        return TokenScores(logp_A, entropy_A, value_A, hidden_AD)

    def values(self, batch: Ragged, action_A: Tensor) -> Tensor:
        """value_A of the state in which each action was chosen; gradients reach the critic alone.

        Raises ModelError without a critic.
        """
        state_A = send(batch.previous[action_A], self.policy.device)
        return self._values_at(batch, state_A, grad_to_policy=False)

    def value_after(self, batch: Ragged, place_B: Tensor) -> Tensor:
        """The value of the state after the token at each place. Raises ModelError without a critic."""
        return self._values_at(batch, send(place_B, self.policy.device), grad_to_policy=True)

    def _values_at(self, batch: Ragged, place_B: Tensor, *, grad_to_policy: bool) -> Tensor:
        if self.value_head is None:
            raise ModelError("there is no critic to ask for a value", "choose critic = shared, detached or separate")
        hidden_ND = batch.ids_N.new_zeros(())
        if self.critic_trunk is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and grad_to_policy):
                hidden_ND = self.policy.hidden(batch)
        value: Tensor = self.value_head(self._critic_hidden(batch, hidden_ND)[place_B])
        return value

    def _critic_hidden(self, batch: Ragged, hidden_ND: Tensor) -> Tensor:
        if self.critic_trunk is not None:
            return self.critic_trunk.hidden(batch)
        return hidden_ND.detach() if self.kind == "detached" else hidden_ND
