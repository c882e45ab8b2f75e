"""The definition of attention dropout: which weights a seed keeps.

The weight of a query, head and place (see `natcore.unfused`) becomes 0 with probability p, and is
divided by 1 - p otherwise; the log-sum-exp is that of all keys. What decides is the first word of
Philox-2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the
seed, at the number of the weight in `[batch, *spatial, heads, places]`: the same on every device,
forward and backward.
"""

from __future__ import annotations

from math import prod

import numpy as np

from natcore.problem import Window, dropout_threshold
from natcore.reference_unfused import _to_dense

MULTIPLIER, WEYL, ROUNDS = 0xD256D193, 0x9E3779B9, 10
_WORD = (1 << 32) - 1


def philox(counter: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """The two words of Philox-2x32-10 at 64-bit counters (low word first), under a 32-bit key."""
    counter = np.asarray(counter, np.uint64)
    low, high = counter & np.uint64(_WORD), counter >> np.uint64(32)
    for _ in range(ROUNDS):
        product = low * np.uint64(MULTIPLIER)
        low, high = (product >> np.uint64(32)) ^ np.uint64(key) ^ high, product & np.uint64(_WORD)
        key = (key + WEYL) & _WORD
    return low, high


def threshold(p: float) -> int:
    """A weight is kept where its word is at least this."""
    return min(round(p * (1 << 32)), _WORD)


def factors(window: Window, batch: int, spatial: tuple[int, ...], heads: int, extra: int, p: float, seed: int):
    """[batch, heads, queries, keys + extra]: 0 or 1 / (1 - p); 0 outside the windows too."""
    shape = (batch, *spatial, heads, prod(window.kernel_size) + extra)
    word, _ = philox(np.arange(prod(shape), dtype=np.uint64).reshape(shape), seed)
    return _to_dense((word >= dropout_threshold(p)) / (1 - p), window, np.float64)
