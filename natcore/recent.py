"""Calls that were prepared, looked up by what a library itself can tell of its arrays in one step.

A front door keeps a `Recent` for each key of what is cheap to hash: the arguments, the types of all operands (so also
which are absent), the shape of the first. In it, the calls prepared so far are told apart by the library's own test
whether arrays are like those of the call, which costs less than asking each for its description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

#: Calls that were prepared, the latest first: whether arrays are like those of the call, and what was prepared.
Recent = list[tuple[Callable[..., bool], Any]]

#: From arrays, the test whether others are like them; None where it could not tell.
Likeness = Callable[[Sequence[Any]], Callable[..., bool] | None]

_MOST = 8  # calls that differ in layouts alone


def recents() -> Callable[..., Recent]:
    """A place to keep prepared calls: a `Recent` for each key. Arguments of other types are other keys."""
    return lru_cache(maxsize=4096, typed=True)(lambda *key: [])


def find(recent: Recent, arrays: Sequence[Any]) -> Any:
    """What was prepared for arrays like these (None where absent), or None."""
    given = [a for a in arrays if a is not None]
    for is_like, prepared in recent:
        if is_like(*given):
            return prepared
    return None


def remember(recent: Recent, is_like: Callable[..., bool] | None, prepared: Any) -> None:
    """``prepared`` will be found for arrays that are like; None: there is no such test."""
    if is_like is not None:
        recent.insert(0, (is_like, prepared))
        del recent[_MOST:]


def torch_likeness(torch: Any) -> Likeness | None:
    """Whether tensors are of the same types, dispatch keys (their own and the thread's: autocast,
    transforms, inference mode), dtypes, devices, shapes and strides, and require grad where these do.

    It is what guards compiled code. None in a version of torch that has no such thing.
    """
    guards = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
    if guards is None:
        return None

    def likeness(tensors: Sequence[Any]) -> Callable[..., bool] | None:
        if len(set(map(id, tensors))) < len(tensors):
            return None  # a tensor in two places is like none
        return guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # None: all as they are

    return likeness
