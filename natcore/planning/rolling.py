"""Plans for the backward of maps that a block marches down in one pass (cuda_src/kernels/rolling_backward.cu).

How tokens are grouped is compiled in (see `rolling_geometry`), with the window, the columns of a dilation group and the
head dimensions; rows, batch, heads and strides are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from natcore.planning import listed
from natcore.planning.partials import SUM_DRPB
from natcore.planning.plan import Candidate, DeviceFacts, KernelInfo, Plan
from natcore.planning.resident import backward_of, refusal_of_backward
from natcore.planning.resident_geometry import refusal_of_tokens
from natcore.planning.rolling_geometry import AHEAD, choose_geometry, refusal_of_window
from natcore.problem import Call, Problem, Window

OPTIONS = ("ahead", "blocks_per_sm")
#: Clocks of both launches and the first rows' way, of each band of a map on a multiprocessor, and of each unit of it;
#: and how many times as much a band takes where there is room for fewer bands on their way. Fitted to 14 measured times
#: on an H200, with errors of at most 10 %.
_LAUNCH, _BAND, _UNIT, _CLOSE = 24_800, 1_590, 46, 1.17


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    g = choose_geometry(call.problem, facts, options)
    if g is None:
        raise ValueError(
            f"config: the options {dict(options)} need more shared memory than {facts} has, for {call.problem}, or"
            " less than 2 bands ahead."
        )
    return backward_of("rolling_backward", call, facts, g, g.slices(facts))


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the rolling kernel cannot run a call, or None."""
    p = call.problem
    reason = refusal_of_tokens(call, facts, "rolling") or refusal_of_window(p)
    return reason or refusal_of_backward(p, facts, choose_geometry)


def clocks(call: Call, facts: DeviceFacts) -> float:
    """By the cost model: bands and units of the maps of the busiest multiprocessor."""
    g = choose_geometry(call.problem, facts, {})
    assert g is not None  # refused
    band = (_BAND + _UNIT * g.split.units) * (_CLOSE if g.ahead < AHEAD[0] else 1)
    return _LAUNCH + g.maps_in_turn(facts) * g.bands * g.blocks_per_sm * band


def _listed() -> tuple[Call, ...]:
    """Small windows, NAT-Tiny's second stage in other dtypes, and rows that fit GPUs with little shared memory."""
    nat = Problem(Window.of(2, 7), 128, (28, 28), 4, 4, 32, 32, 0, "bfloat16", "bfloat16")
    more = (nat, replace(nat, rpb_dtype=None), replace(nat, spatial=(28, 16), window=Window.of(2, 5)))
    return listed.small_windows("backward") + tuple(listed.contiguous_call("backward", p) for p in more)


_KERNEL = KernelInfo("rolling_backward", ("sm_80+",), max_registers=255, max_shared_bytes=0)
CANDIDATE = Candidate(
    "rolling",
    (_KERNEL, SUM_DRPB),
    OPTIONS,
    refusal,
    plan,
    _listed,
    directions=("backward",),
    clocks=clocks,
)
