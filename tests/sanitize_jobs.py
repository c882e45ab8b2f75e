"""What tests/sanitize.py runs: every ugly case on every tensor core kernel that takes it."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.configs import alternatives
from natcore.planning import Config, DeviceFacts, candidates, plan_for
from natcore.problem import Direction
from tests import test_fast_backward, test_fast_forward, test_marching_backward, test_rolling
from tests.sanitize_process import Job

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
LAST_STAGE = [case for case in test_fast_backward.MORE if case.name == "last_stage"]  # whole maps, several of a warp
ROLLING = [test_rolling.BY_NAME[name] for name in ("odd_extents", "ragged_groups", "causal", "no_bias")]
CASES_OF = {
    "forward": test_fast_forward.ABLE + test_fast_forward.MORE + LAST_STAGE,
    "backward": test_fast_backward.ABLE + test_fast_backward.MORE + test_marching_backward.UNEVEN + ROLLING,
}
MAX_BATCH = 5  # more are only more of the same
#: Cases that also run as planned for a GPU of one multiprocessor: blocks then take many maps, tiles or bands in turn.
IN_TURN = ("nat_block", "nat_packed", "ragged_dilation", "causal_rows_strides", "last_stage", "odd_extents")


def jobs(direction: Direction, device: DeviceFacts) -> list[Job]:
    """Every ugly case with each tensor core kernel that takes it, in turn in float16 and bfloat16; some of them once
    more, on one multiprocessor; then, of one case, other configs."""
    cases = [replace(case, batch=min(case.batch, MAX_BATCH)) for case in CASES_OF[direction] if case.batch]
    found = [Job(case, direction, ("float16", "bfloat16")[i % 2], Config("general")) for i, case in enumerate(cases)]
    found += [replace(job, multiprocessors=1) for job in found if job.case.name in IN_TURN]
    able = [
        replace(job, config=Config(candidate.name))
        for job in found
        for candidate in candidates(job.call, job.facts(device))
        if candidate.name != "general"
    ]
    base = next(job for job in able if job.case.name == "several_regions")
    base = replace(base, case=replace(base.case, batch=2))
    configs = list(test_fast_forward.CONFIGS.values()) if direction == "forward" else []
    configs += [c for c in alternatives(base.call, device, cheapest=1, drawn=3) if c.kernel != "general"]
    for config in configs:
        try:
            plan_for(base.call, device, config)
        except (ValueError, NotImplementedError):
            continue
        able.append(replace(base, config=config))
    return list(dict.fromkeys(able))
