"""Whether a configuration that was read from a file can be a decoder at all, before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upslope.errors import ModelError
from upslope.models.decoder import DecoderConfig

# beyond any model there is: a damaged number must not lead to a day of building layers
LIMITS = {
    "vocab_size": 1 << 24,
    "width": 1 << 20,
    "layers": 1 << 10,
    "heads": 1 << 12,
    "kv_heads": 1 << 12,
    "head_dim": 1 << 14,
    "ffn_width": 1 << 24,
    "context": 1 << 24,
    "buckets": 1 << 12,
    "max_distance": 1 << 24,
}
ABOVE_0 = ("norm_eps", "rope_base")


def check_field(name: str, value: object, where: Path) -> None:
    """Raise ModelError for a size, a number or a bool that is none, or is beyond what can be."""
    limit = LIMITS.get(name)
    if limit is not None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise _wrong(where, name, value, f"a whole number from 1 to {limit}")
    elif name in ABOVE_0:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise _wrong(where, name, value, "a number above 0")
    elif not isinstance(value, bool):
        raise _wrong(where, name, value, "true or false")


def check_sizes(config: object, where: Path) -> None:
    """Raise ModelError for the first size or number of a configuration that cannot be."""
    for name in (*LIMITS, *ABOVE_0):
        if hasattr(config, name):
            check_field(name, getattr(config, name), where)


def check_numbers(config: DecoderConfig, where: Path) -> None:
    """Raise ModelError for the first number of a decoder that cannot be."""
    check_sizes(config, where)
    if config.heads % config.kv_heads:
        raise _wrong(where, "kv_heads", config.kv_heads, f"a divisor of the {config.heads} heads")
    if config.position == "rope" and config.head_dim % 2:
        raise _wrong(where, "head_dim", config.head_dim, "even, for rotary positions")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise _wrong(where, "sliding_window", config.sliding_window, "1 or more, or null")


@contextmanager
def reading(where: Path) -> Iterator[None]:
    """What a damaged file leads our own reading of it to is one line. Raises ModelError."""
    try:
        yield
    except ModelError:
        raise
    except KeyError as error:
        raise ModelError(f"{where}: the key {error.args[0]} is missing", "fetch it again") from None
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{where} cannot be read: {reason[:200]}", "fetch it again") from None


def _wrong(where: Path, name: str, value: object, wanted: str) -> ModelError:
    return ModelError(f"{where}: {name} is {value!r:.80}, not {wanted}", "fetch it again, or mend the file")
