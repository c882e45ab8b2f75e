"""Which tasks a call is made of, and in which order: pure Python, fixed by the problem alone.

The results therefore do not depend on how many threads run them. A task is some batch entries of
one kv head, or, where there are few of these, a slab of the tiles of one of them. In the backward
neighbouring slabs add to the same keys: even slabs run first, then the odd ones.

    slab     0     1     2     3        phase 1: clear the sums      phase 3: slabs 1, 3
    keys  [-----[=====]-----[=====]     phase 2: slabs 0, 2          phase 4: round the sums
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

import numpy as np

from natcore.backends.cpu.geometry import Geometry

#: More tasks than this per call only cost; each should have a good number of tiles to work on.
_TASKS, _TILES_PER_TASK = 64, 16

_NO_TILES = np.zeros((0, 4), np.int32)


@dataclass(frozen=True, eq=False)
class Task:
    kv: int
    first_batch: int
    last_batch: int
    tiles: np.ndarray = field(default_factory=lambda: _NO_TILES)
    slab: int = 0
    clear: bool = False
    finish: bool = False


@dataclass(frozen=True, eq=False)
class Sharing:
    """``slabs`` of tiles, and how many batch entries a task takes."""

    slabs: list[np.ndarray]
    bundle: int
    batch: int
    heads_kv: int

    @cached_property
    def tasks(self) -> list[Task]:
        """All that the forward does; in the backward (one slab), tasks that clear and finish their own sums."""
        return [
            Task(kv, first, min(first + self.bundle, self.batch), tiles, slab, clear=True, finish=True)
            for kv in range(self.heads_kv)
            for first in range(0, self.batch, self.bundle)
            for slab, tiles in enumerate(self.slabs)
        ]

    def phases(self, planes: range) -> Iterator[list[Task]]:
        """The backward of several slabs, for some (kv head, batch entry) pairs; tasks of a phase run in any order."""
        places = [divmod(plane, self.batch) for plane in planes]
        yield [Task(kv, b, b + 1, clear=True) for kv, b in places]
        for color in (0, 1):
            yield [
                Task(kv, b, b + 1, self.slabs[slab], slab)
                for kv, b in places
                for slab in range(color, len(self.slabs), 2)
            ]
        yield [Task(kv, b, b + 1, finish=True) for kv, b in places]


def share(geometry: Geometry, batch: int, heads_kv: int, disjoint: bool) -> Sharing:
    """``disjoint``: slabs at even distance must not share keys (`Geometry.slabs`)."""
    planes = max(1, batch) * heads_kv
    tasks = min(_TASKS, max(1, planes * len(geometry.tiles) // _TILES_PER_TASK))
    slabs = geometry.slabs(1 if planes >= tasks else ceil(tasks / planes), disjoint)
    bundle = 1 if len(slabs) > 1 else max(1, ceil(batch / ceil(tasks / heads_kv)))
    return Sharing(slabs, bundle, batch, heads_kv)
