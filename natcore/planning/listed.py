"""The calls at which kernels are compiled ahead of time and checked."""

from __future__ import annotations

from dataclasses import replace

from natcore.problem import OPERANDS, Call, Direction, Problem, Window
from natcore.views import contiguous_strides

_DTYPES = (  # of q, of the bias
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "float32"),
    ("float64", "float64"),
)


def contiguous_call(direction: Direction, problem: Problem) -> Call:
    """The call on contiguous arrays, with every operand that the problem has."""
    names = OPERANDS[direction]
    strides = (contiguous_strides(problem.shapes[name]) if problem.has(name) else None for name in names)
    return Call(direction, problem, tuple(strides))


def general() -> tuple[Call, ...]:
    """Every dtype at head_dim 32, the widest rows of each, and the odd ones."""
    plain = Problem(Window.of(2, 7), 2, (56, 56), 2, 2, 32, 32, 0, "float16", None)
    problems = [replace(plain, dtype=dtype, rpb_dtype=rpb) for dtype, rpb in _DTYPES]
    problems += [replace(plain, dtype=dtype, head_dim=128, head_dim_v=128) for dtype in ("float16", "bfloat16")]
    problems += [
        replace(plain, dtype=dtype, head_dim=256, head_dim_v=256) for dtype in ("bfloat16", "float32", "float64")
    ]
    problems += [
        replace(plain, head_dim=80, head_dim_v=48, heads_kv=1, extra=4, rpb_dtype="float32"),
        replace(plain, head_dim=5, head_dim_v=3, extra=1, rpb_dtype="float32"),
        replace(plain, dtype="float64", head_dim=255, head_dim_v=1, extra=1, rpb_dtype="float64"),
    ]
    calls = [contiguous_call(direction, problem) for problem in problems for direction in ("forward", "backward")]
    problems = [replace(plain, dtype=dtype, rpb_dtype=rpb, extra=4, dropout_p=0.1) for dtype, rpb in _DTYPES[1:]]
    calls += [contiguous_call(direction, problem) for problem in problems for direction in ("forward", "backward")]
    return (*calls, *_unfused())


def _unfused() -> tuple[Call, ...]:
    """Every dtype at head_dim 32 and at its widest rows, and an odd one."""
    plain = Problem(Window.of(2, 7), 2, (56, 56), 2, 2, 32, 32, 4, "float16", None)
    problems = [replace(plain, dtype=dtype, rpb_dtype=rpb) for dtype, rpb in _DTYPES]
    problems += [replace(plain, dtype=d, head_dim=256, head_dim_v=256) for d in ("bfloat16", "float32", "float64")]
    problems += [replace(plain, head_dim=5, head_dim_v=5)]
    scores = [contiguous_call(direction, p) for p in problems for direction in ("qk", "qk_backward")]
    problems = [replace(p, rpb_dtype=None) for p in problems]
    return (*scores, *[contiguous_call(direction, p) for p in problems for direction in ("av", "av_backward")])


def small_windows_float32(*directions: Direction) -> tuple[Call, ...]:
    """As `small_windows`, of float32."""
    return tuple(
        contiguous_call(direction, replace(call.problem, dtype="float32"))
        for direction in directions
        for call in small_windows(direction)
        if call.problem.dtype == "float16"
    )


def small_windows(*directions: Direction) -> tuple[Call, ...]:
    """16-bit elements: the stages of NAT-Tiny, other windows, ranks and head dimensions."""
    nat = Problem(Window.of(2, 7), 128, (56, 56), 2, 2, 32, 32, 0, "float16", "float32")
    problems = [nat, replace(nat, dtype="bfloat16", rpb_dtype="bfloat16"), replace(nat, rpb_dtype=None)]
    problems += [replace(nat, spatial=(e, e), heads=h, heads_kv=h) for e, h in ((28, 4), (14, 8), (7, 16))]
    problems += [
        replace(nat, spatial=(56, 56), window=Window.of(2, 7, dilation=4), batch=8),
        replace(nat, spatial=(64, 64), window=Window.of(2, 13), batch=8),
        replace(nat, spatial=(32, 32), window=Window.of(2, 5, 2), head_dim=64, head_dim_v=64),
        replace(nat, spatial=(4096,), window=Window.of(1, 63, is_causal=True), batch=4),
        replace(nat, spatial=(16, 32, 32), window=Window.of(3, (3, 5, 5)), head_dim=64, head_dim_v=64, batch=1),
    ]
    return tuple(contiguous_call(direction, problem) for direction in directions for problem in problems)
