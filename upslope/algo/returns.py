"""Returns and advantages over flat tensors of action tokens.

`starts` holds B + 1 offsets: episode b owns the action tokens starts[b] to starts[b + 1]. Time is counted in action
tokens, whatever stood between them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upslope.kernels import cpu


def discounted_returns(
    reward_A: Float[Tensor, " A"],
    starts: Int[Tensor, " B1"],
    *,
    gamma: float,
    bootstrap_B: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " A"]:
    """The discounted sum of what is still to come, from each action on.

        G_t = r_t + gamma G_{t+1},   G_T = bootstrap

    bootstrap_B: what follows the last action: 0 when it was terminal, the critic's value when it was truncated.
    Sutton and Barto 2018, "Reinforcement Learning: An Introduction", eq. 3.9. Raises ValueError for starts that do
    not cover the tokens.
    """
    _check(starts, len(reward_A), bootstrap_B)
    return _discounted_sums(reward_A, starts, gamma, bootstrap_B)


def gae(
    reward_A: Float[Tensor, " A"],
    value_A: Float[Tensor, " A"],
    starts: Int[Tensor, " B1"],
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
    """Generalized advantage estimation: (advantage_A, return_A), both detached.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lam A_{t+1}
        R_t     = A_t + V(s_t)

    value_A is the value of the state in which each action was chosen; bootstrap_B that of the state after the last
    one: 0 when terminal, the critic's when truncated. lam = 1 gives G_t - V(s_t), lam = 0 the TD error.
    Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16
    (arXiv 1506.02438). Raises ValueError for starts that do not cover the tokens.
    """
    _check(starts, len(reward_A), bootstrap_B)
    reward_A, value_A = reward_A.detach(), value_A.detach()
    next_A = torch.zeros_like(value_A)
    next_A[:-1] = value_A[1:]
    counts = starts[1:] - starts[:-1]
    last = (starts[1:] - 1)[counts > 0]
    next_A[last] = 0.0 if bootstrap_B is None else bootstrap_B.detach()[counts > 0].to(next_A.dtype)
    advantage_A = _discounted_sums(reward_A + gamma * next_A - value_A, starts, gamma * lam, None)
    return advantage_A, advantage_A + value_A


def group_advantages(
    score_B: Float[Tensor, " B"],
    group_B: Int[Tensor, " B"],
    *,
    baseline: str = "mean",
    scale: str = "none",
) -> Float[Tensor, " B"]:
    """A score against those of its group: one advantage per episode.

        A_i = (s_i - b_i) / c,   b: 0, the group's mean, or the mean of its others;   c: 1 or the group's deviation

    baseline: "mean", "leave_one_out", "none"; scale: "std" (population) or "none". A group whose scores are all equal
    gets exactly 0 unless the baseline is "none"; "leave_one_out" needs groups of two or more. A failed score has no
    place in a group: leave its episode out. Raises ValueError.
    GRPO (arXiv 2402.03300): mean and std; Dr.GRPO (arXiv 2503.20783): mean; RLOO (arXiv 2402.14740): leave_one_out.
    """
    if baseline not in ("mean", "leave_one_out", "none") or scale not in ("std", "none"):
        raise ValueError(f"no baseline {baseline!r} or scale {scale!r}")
    group = _Groups(score_B, group_B)
    if baseline == "leave_one_out" and bool((group.size_B < 2).any()):
        raise ValueError("a leave-one-out baseline needs at least two samples in every group")
    advantage_B = score_B if baseline == "none" else group.centred_B
    if baseline == "leave_one_out":
        advantage_B = advantage_B * group.size_B / (group.size_B - 1)
    if scale == "std":
        unit_B, relative_B = group.deviation()
        advantage_B = advantage_B / unit_B / relative_B
    return advantage_B


def group_deviation(score_B: Float[Tensor, " B"], group_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The population deviation of each score's group; 1 where all its scores are equal: nothing to scale by.

    Raises ValueError for a score that is not finite.
    """
    unit_B, relative_B = _Groups(score_B, group_B).deviation()
    return unit_B * relative_B


def best_of_group(score_B: Float[Tensor, " B"], group_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 for the first of each group's highest scores, 0 for the others; 0 for all where all scores are equal.

    As an advantage with the score-function loss it makes the best samples the data of a likelihood fit. Dong et al.
    2023, "RAFT" (arXiv 2304.06767); there a group of equal scores gives one sample too, though none of them is better.
    Raises ValueError for a score that is not finite.
    """
    group = _Groups(score_B, group_B)
    top_B = (score_B == group.high[group.member_B]) & group.varied_B
    place_B = torch.arange(len(score_B), device=score_B.device)
    first = torch.full_like(group.high, len(score_B), dtype=torch.int64)
    first = first.scatter_reduce(0, group.member_B[top_B], place_B[top_B], "amin")
    return (top_B & (first[group.member_B] == place_B)).to(score_B.dtype)


class _Groups:
    """Statistics of groups, spread over their members."""

    def __init__(self, score_B: Tensor, group_B: Tensor) -> None:
        if not bool(torch.isfinite(score_B).all()):
            bad = int((~torch.isfinite(score_B)).sum())
            raise ValueError(
                f"{bad} of {len(score_B)} scores are not finite: leave failed episodes out of their groups"
            )
        _, self.member_B = torch.unique(group_B, return_inverse=True)
        groups = int(self.member_B.max()) + 1 if len(self.member_B) else 0
        self.count = torch.bincount(self.member_B, minlength=groups)
        low = score_B.new_full((groups,), torch.inf).scatter_reduce(0, self.member_B, score_B, "amin")
        self.high = score_B.new_full((groups,), -torch.inf).scatter_reduce(0, self.member_B, score_B, "amax")
        self.varied_B = (self.high > low)[self.member_B]
        self.spread_B = (self.high - low)[self.member_B]
        self.size_B = self.count[self.member_B].to(score_B.dtype)
        # measured from the lowest, so that a large common offset costs no digits and equal scores leave no residue
        above_B = score_B - low[self.member_B]
        mean = score_B.new_zeros(groups).index_add(0, self.member_B, above_B) / self.count
        self.centred_B = torch.where(self.varied_B, above_B - mean[self.member_B], torch.zeros_like(score_B))

    def deviation(self) -> tuple[Tensor, Tensor]:
        """Two factors of the deviation, the spread and the rest: squares of tiny differences would underflow."""
        unit_B = torch.where(self.varied_B, self.spread_B, 1.0)
        squares = torch.zeros_like(self.high).index_add(0, self.member_B, (self.centred_B / unit_B) ** 2)
        return unit_B, torch.where(self.varied_B, (squares / self.count).sqrt()[self.member_B], 1.0)


def _check(starts: Tensor, tokens: int, bootstrap_B: Tensor | None) -> None:
    """Refuse offsets that leave a token out, own one twice or point past the end."""
    if len(starts) == 0 or int(starts[0]) != 0 or int(starts[-1]) != tokens or bool((starts[1:] < starts[:-1]).any()):
        ends = f"{int(starts[0])} to {int(starts[-1])}" if len(starts) else "none"
        raise ValueError(f"starts must rise from 0 to the {tokens} tokens given, seen: {ends}")
    if bootstrap_B is not None and len(bootstrap_B) != len(starts) - 1:
        raise ValueError(f"{len(bootstrap_B)} bootstrap values for {len(starts) - 1} episodes")


def _discounted_sums(x_A: Tensor, starts: Tensor, decay: float, tail_B: Tensor | None) -> Tensor:
    """y_t = x_t + decay y_{t+1} inside each episode, from its end; y after the last is tail.

    Without the compiled kernel, episodes are laid out in time order across, longest first, so that one vector
    operation advances all of them.
    """
    if x_A.dtype == torch.float32 and cpu.serve(x_A):
        tail = None if tail_B is None else tail_B.detach().float().contiguous()
        return cpu.discounted_sums(x_A.detach().contiguous(), starts.to(torch.int64).contiguous(), decay, tail)
    counts = starts[1:] - starts[:-1]
    order = torch.argsort(counts, descending=True, stable=True)
    counts, ends = counts[order], starts[1:][order]
    tail = x_A.new_zeros(len(counts)) if tail_B is None else tail_B.detach()[order].to(x_A.dtype)
    y_A = torch.empty_like(x_A)
    longest = int(counts[0]) if len(counts) else 0
    alive = (
        torch.searchsorted(-counts, -torch.arange(longest, device=counts.device), right=False).tolist()
        if longest
        else []
    )
    for back in range(longest):
        live = alive[back]
        place = ends[:live] - 1 - back
        tail = x_A[place] + decay * tail[:live]
        y_A[place] = tail
    return y_A
