"""What a step costs, counted from its tokens: nothing is timed, so that a resumed run counts as an unbroken one does.

    forward   2 W N + 2 U A             W weights of the trunk's matrices, U of the projection to logits,
    backward  4 W_learned N + 4 U A     N tokens that pass through, A tokens that are predicted

(2 U A where the projection is frozen). Attention between tokens is left out: of T tokens it adds T / (6 D) and less to
a block of width D. What a kernel pads or computes again is no work of the algorithm's. Kaplan et al. 2020, section 2.1
(arXiv 2001.08361).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from upslope.models.encoder import Encoder
from upslope.models.heads import ActorCritic
from upslope.models.trunk import Trunk
from upslope.training.episode import Episode

# looked up, met once a text, or counted as the projection
OUTSIDE = ("embed.", "position.", "types.", "head.", "label_head.", "pooler.", "pair.", "masked.")
OF_SOURCES = ("encoder.", ".across.k.", ".across.v.")  # what a token of an encoder-decoder's source meets


@dataclass(frozen=True)
class Tokens:
    """Of some texts: tokens of their prompts (one that several share once), those behind them, and those predicted."""

    prompt: int
    rest: int
    predicted: int

    @property
    def read(self) -> int:
        return self.prompt + self.rest

    def times(self, passes: float) -> Tokens:
        return Tokens(*(round(passes * n) for n in (self.prompt, self.rest, self.predicted)))


@dataclass(frozen=True)
class Meter:
    """The weights that a token meets in a trunk: of a prompt, of what follows it, and those of both that learn."""

    prompt: int
    rest: int
    prompt_learned: int
    rest_learned: int
    output: int
    output_learned: bool

    @classmethod
    def of(cls, model: Trunk, *, projects: bool = True) -> Meter:
        """Count a model's weights, with what is frozen now. projects: to logits; a reward model makes one number.

        An encoder reads all but the label, its one action; one without labels yet reads everything, and projects what
        is masked, through the head for that, to the vocabulary.
        """
        counts = {"prompt": 0, "rest": 0, "prompt_learned": 0, "rest_learned": 0}
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or name.startswith(OUTSIDE):
                continue
            of_source = any(part in name for part in OF_SOURCES)
            met = {"prompt": of_source or not model.needs_source, "rest": not of_source or not model.needs_source}
            if isinstance(model, Encoder):
                met = {"prompt": True, "rest": not model.labels}
            for side in (side for side in met if met[side]):
                counts[side] += parameter.numel()
                counts[f"{side}_learned"] += parameter.numel() * parameter.requires_grad
        if isinstance(model, Encoder) and not model.labels:
            output = [model.embed.weight, *([] if model.masked is None else [model.masked.dense.weight])]
        else:
            output = [model.output_weight]
        numbers = sum(weight.numel() for weight in output)
        return cls(**counts, output=numbers * projects, output_learned=output[0].requires_grad)

    def forward(self, tokens: Tokens) -> float:
        """Operations of one pass."""
        return 2.0 * (self.prompt * tokens.prompt + self.rest * tokens.rest + self.output * tokens.predicted)

    def step(self, tokens: Tokens) -> float:
        """Operations of one pass and of its gradient."""
        learned = self.prompt_learned * tokens.prompt + self.rest_learned * tokens.rest
        output = (4.0 if self.output_learned else 2.0) * self.output * tokens.predicted
        return self.forward(tokens) + 4.0 * learned + output


def text_tokens(texts: Iterable[Sequence[bool]]) -> Tokens:
    """Of examples, each a mark a token: whether it is learned. A token that nothing stands before is not predicted."""
    prompt = rest = predicted = 0
    for trained in texts:
        first = next((n for n, marked in enumerate(trained) if marked), len(trained))
        prompt += first
        rest += len(trained) - first
        predicted += sum(trained[1:])
    return Tokens(prompt, rest, predicted)


def episode_tokens(episodes: Sequence[Episode]) -> Tokens:
    """Of a rollout."""
    prompts = {e.group: e.prompt_length for e in episodes}
    rest = sum(len(e.ids) - e.prompt_length for e in episodes)
    return Tokens(sum(prompts.values()), rest, sum(len(e.actions) for e in episodes))


def work(tokens: Tokens, operations: float) -> dict[str, float]:
    """The two metrics of a step."""
    return {"tokens/read": float(tokens.read), "compute/tflop": operations / 1e12}


def rollout_work(
    model: ActorCritic,
    sampled: Sequence[Episode],
    learned: Sequence[Episode],
    *,
    passes: float,
    scored: bool,
    reference: Trunk | None,
    judges: Sequence[Trunk],
) -> dict[str, float]:
    """A rollout: sampled and judged once, scored once by policy, critic and reference, learned from `passes` times.

    scored: whether log-probabilities are computed before the updates (they are not where one step does both).
    """
    policy, whole, used = Meter.of(model.policy), episode_tokens(sampled), episode_tokens(learned)
    operations = policy.forward(whole) + policy.step(used.times(passes))
    operations += sum(Meter.of(judge, projects=False).forward(whole) for judge in judges)
    if scored:
        operations += policy.forward(used)
    if reference is not None:
        operations += Meter.of(reference).forward(used)
    if model.critic_trunk is not None:
        critic = Meter.of(model.critic_trunk, projects=False)
        operations += critic.step(used.times(passes)) + (critic.forward(used) if scored else 0.0)
    return work(whole, operations)
