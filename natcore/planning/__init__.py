"""Choosing how to run a call: pure functions from (call, device facts) to a plan. No GPU needed.

`plan_for` is the door. A `Candidate` is one way to run calls; to add one, write its module beside
`general`, with a cost model if it is to be preferred to others, and put its CANDIDATE into `CANDIDATES`.
"""

from __future__ import annotations

from math import inf

from natcore.planning import general, marching, resident, resident_forward, rolling, tiled, tiled_backward, whole
from natcore.planning.plan import (
    Candidate,
    Config,
    Constant,
    DeviceFacts,
    KernelInfo,
    KernelSpec,
    Launch,
    Operand,
    Param,
    Plan,
    Scale,
    Workspace,
    facts_for_arch,
)
from natcore.problem import Call

__all__ = [
    "CANDIDATES",
    "Candidate",
    "Config",
    "Constant",
    "DeviceFacts",
    "KernelInfo",
    "KernelSpec",
    "Launch",
    "Operand",
    "Param",
    "Plan",
    "Scale",
    "Workspace",
    "candidates",
    "choose",
    "facts_for_arch",
    "kernel_info",
    "plan_for",
    "refusal",
]

#: Every way to run a call. The general kernels, last, take every valid problem.
CANDIDATES: tuple[Candidate, ...] = (
    whole.CANDIDATE,
    resident.CANDIDATE,
    resident_forward.CANDIDATE,
    marching.CANDIDATE,
    tiled.CANDIDATE,
    tiled_backward.CANDIDATE,
    rolling.CANDIDATE,
    general.CANDIDATE,
)


def candidates(call: Call, facts: DeviceFacts) -> tuple[Candidate, ...]:
    """The candidates that can run the call on the GPU, the preferred first.

    They are in the order of their clocks; those without a cost model come last.
    """
    able = (c for c in CANDIDATES if refusal(c, call, facts) is None)
    return tuple(sorted(able, key=lambda c: inf if c.clocks is None else c.clocks(call, facts)))


def refusal(candidate: Candidate, call: Call, facts: DeviceFacts) -> str | None:
    """Why a candidate cannot run the call; None if it can."""
    if call.direction not in candidate.directions:
        return f"there is no {candidate.name} kernel for {call.direction}."
    if call.problem.dropout_p > 0 and not candidate.dropout:
        return f"dropout_p {call.problem.dropout_p}: attention dropout is for the general kernels."
    return candidate.refusal(call, facts)


def choose(call: Call, facts: DeviceFacts, config: Config | None = None) -> Candidate:
    """The candidate named by ``config``, or else the preferred one.

    Raises ValueError for an unknown name and NotImplementedError, with the reason, where the named
    candidate (or, without a config, every candidate) cannot run the call.
    """
    if config is None:
        able = candidates(call, facts)
        if not able:
            raise NotImplementedError(refusal(CANDIDATES[-1], call, facts))
        return able[0]
    named = {c.name: c for c in CANDIDATES}
    if config.kernel not in named:
        raise ValueError(f"config names the kernel {config.kernel!r}; there are {', '.join(named)}.")
    reason = refusal(named[config.kernel], call, facts)
    if reason is not None:
        raise NotImplementedError(f"kernel {config.kernel!r} cannot run this call: {reason}")
    return named[config.kernel]


def plan_for(call: Call, facts: DeviceFacts, config: Config | None = None) -> Plan:
    """How to run the call on the GPU. Raises as `choose` does, and ValueError for an unknown option."""
    candidate = choose(call, facts, config)
    options = dict(config.options) if config is not None else {}
    unknown = sorted(set(options) - set(candidate.options))
    if unknown:
        raise ValueError(
            f"config for {candidate.name!r} has the unknown options {unknown}; it takes {sorted(candidate.options)}."
        )
    return candidate.plan(call, facts, options)


def kernel_info(name: str) -> KernelInfo:
    """What the kernel of this name declares about itself."""
    return {info.name: info for candidate in CANDIDATES for info in candidate.kernels}[name]
