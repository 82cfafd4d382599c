"""The one reduction: weights that sum a per-token loss to a mean of the whole optimizer batch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def reduce(x_A: Tensor, denominator: int | float) -> Tensor:
    """sum(x) / denominator, where the denominator counts the elements of the whole optimizer batch.

    Summed over any cut of the batch into micro-batches or ranks it is the same mean. Raises ValueError for a
    denominator that is not positive.
    """
    if not denominator > 0:
        raise ValueError(f"denominator {denominator}: a mean over nothing")
    return x_A.sum() / denominator


def token_weights(starts: Int[Tensor, " B1"], kind: str = "token", *, limit: int | None = None) -> Float[Tensor, " A"]:
    """weight_A of each action token of an optimizer batch, so that its loss is sum over A of weight times loss.

        token:     1 / A               every token counts alike (DAPO, PPO)
        sequence:  1 / (B length)      every episode counts alike, the longer its tokens the less each (GRPO, GSPO)
        constant:  1 / (B limit)       the unbiased policy gradient, up to the constant limit (Dr.GRPO, REINFORCE)

    starts: B + 1 offsets of the whole optimizer batch; limit: of the length of an episode, for `constant`. Episodes
    without actions count in no denominator but `constant`'s. They are made before the first micro-batch, which takes
    its rows of them: any cut of the batch gives the same gradient. Raises ValueError.
    """
    counts = starts[1:] - starts[:-1]
    tokens = int(counts.sum())
    if kind == "token":
        return torch.full((tokens,), 1.0 / max(tokens, 1), device=starts.device)
    if kind == "sequence":
        weight_B = 1.0 / (counts.clamp_min(1) * (counts > 0).sum().clamp_min(1)).float()
        return weight_B.repeat_interleave(counts)
    if kind == "constant":
        if limit is None or limit < 1:
            raise ValueError(f"constant needs a limit of at least 1, not {limit}")
        return torch.full((tokens,), 1.0 / (max(len(counts), 1) * limit), device=starts.device)
    raise ValueError(f"no reduction {kind!r}: token, sequence or constant")
