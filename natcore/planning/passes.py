"""Backwards of two passes, of queries and then of keys: their options, and what the first leaves for the second."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from natcore.planning.axis import up
from natcore.problem import Problem

KEYS = "keys_"  # before the name of an option: of the pass of keys
_ALIGNMENT = 256  # of what lies in the workspace


def options_of(options: Mapping[str, int], of: str) -> dict[str, int]:
    """Those of one pass, without the prefix."""
    return {n.removeprefix(KEYS): v for n, v in options.items() if n.startswith(KEYS) == (of == "keys")}


def scalars_bytes(problem: Problem) -> int:
    """Of the workspace: two floats of each query."""
    return up(prod((problem.batch, *problem.spatial, problem.heads)) * 8, _ALIGNMENT)
