"""The one reduction: sums over explicit denominators."""

from torch import Tensor


def reduce(x_A: Tensor, denominator: int | float) -> Tensor:
    """sum(x) / denominator, where the denominator counts the elements of the whole optimizer batch.

    Summed over any cut of the batch into micro-batches or ranks it is the same mean. Raises ValueError for a
    denominator that is not positive.
    """
    if not denominator > 0:
        raise ValueError(f"denominator {denominator}: a mean over nothing")
    return x_A.sum() / denominator
