"""Choosing how to run a call: pure functions from (call, device facts) to a plan. No GPU needed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """An explicit choice of kernel and its parameters, in place of the planner's own.

    ``kernel`` names a candidate of `natcore.planning`; ``options`` are its (name, value) pairs.
    """

    kernel: str
    options: tuple[tuple[str, int], ...] = ()
