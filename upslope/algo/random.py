"""Random numbers that depend on what they are for, not on when or where they are drawn.

One uniform number decides one token; its counter is (prompt, sample, position), its key (seed, step). It is the same
whatever the slot, the batch, the order or the number of workers.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = int | Sequence[int] | np.ndarray

_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10: four 32-bit words from four counter words and two key words, over whole arrays.

    Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLY[0] * c0, _MULTIPLY[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, step: int, prompt: Ints, sample: Ints, position: Ints) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, one for each (prompt, sample, position); arrays broadcast."""
    wide = np.broadcast_arrays(*(np.asarray(x).astype(np.uint64) for x in (prompt, sample, position)))
    prompts, samples, positions = (np.atleast_1d(x) for x in wide)
    c = philox((prompts & _LOW, prompts >> _SHIFT, samples & _LOW, positions & _LOW), key_words(seed, step))
    drawn = ((c[0] >> np.uint64(5)) * 67108864.0 + (c[1] >> np.uint64(6))) / 9007199254740992.0
    return drawn.reshape(wide[0].shape)


def key_words(seed: int, step: int) -> tuple[int, int]:
    """The key of `uniform`'s counter: 32 bits of each."""
    return _fold(seed), _fold(step)


def stream(*key: int | str) -> np.random.Generator:
    """A generator of its own for each key; strings count by their text."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_word(part) for part in key])))


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """An order of 0 to n - 1 that depends on the key alone."""
    return stream(*key).permutation(n).astype(np.int64)


def _word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return part


def _fold(value: int) -> int:
    """Any integer as 32 bits: itself below 2^32, else the mixed halves."""
    return (value & 0xFFFFFFFF) ^ (((value >> 32) * _WEYL[0]) & 0xFFFFFFFF)
