"""Cases of tests/cases.py on the host: their arrays, their plans, and runs judged by the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from natcore.planning import Config, DeviceFacts, Plan, plan_for
from natcore.problem import OPERANDS, RESULTS, Direction, call_of, problem_of
from natcore.views import Device, View
from tests import host
from tests.cases import Case, check, expected, inputs, numpy_dtype

Arrays = dict[str, np.ndarray]


def view(x: np.ndarray) -> View:
    return View(x.ctypes.data, x.shape, tuple(s // x.itemsize for s in x.strides), x.dtype.name, Device("cpu"))


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that 16-byte loads take."""
    copy = host.aligned_bytes(x.nbytes).view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def poisoned(shape: tuple[int, ...], dtype: np.dtype, strided: bool) -> np.ndarray:
    """NaN everywhere; with ``strided``, a view with gaps on every axis but the last, which runs backwards on one."""
    if not strided or 0 in shape:
        return np.full(shape, np.nan, dtype)
    wide = np.full((*(2 * n + 1 for n in shape[:-1]), shape[-1] + 8), np.nan, dtype)
    step = tuple(slice(1, 1 + 2 * n, 2) for n in shape[:-1])
    x = wide[(*step, slice(0, shape[-1]))]
    return np.flip(x, axis=1)


def spread(x: np.ndarray) -> np.ndarray:
    """The same numbers, strided as `poisoned` has them."""
    strided = poisoned(x.shape, x.dtype, True)
    strided[...] = x
    return strided


def plan_of(direction: Direction, case: Case, arrays: Arrays, config: Config, facts: DeviceFacts) -> Plan:
    """The plan on these arrays; absent operands have no entry."""
    views = {n: view(x) for n, x in arrays.items() if n in OPERANDS[direction]}
    call = call_of(direction, problem_of(case.window, views), views)
    return plan_for(call, facts, config)


def prepared(direction: Direction, case: Case, dtype: str, absent: tuple[str, ...] = ()) -> tuple[Arrays, Arrays]:
    """Operands of a direction, aligned, and its results but those ``absent``, all NaN.

    The backward has out and lse of the reference. An absent d_lse is 0, which is what its absence means.
    """
    # Parts of one packed array, as they are; its rows are whole 16-byte chunks.
    arrays = {n: x if case.packed and n in "qkv" else aligned(x) for n, x in inputs(case, dtype).items()}
    if "d_lse" in absent:
        arrays["d_lse"][...] = 0
    if direction == "backward":
        forward = expected(case, arrays)
        arrays |= {"out": aligned(forward["out"].astype(numpy_dtype(dtype)))}
        arrays |= {"lse": aligned(forward["lse"].astype(np.float32))}
    problem = problem_of(case.window, {n: view(arrays[n]) for n in ("q", "k", "v", "rpb") if n in arrays})
    wanted = [n for n in RESULTS[direction] if problem.has(n) and n not in absent]
    kinds = {n: (problem.shapes[n], numpy_dtype(problem.dtype_of(n))) for n in wanted}
    return arrays, {n: aligned(poisoned(*kind, False)) for n, kind in kinds.items()}


def judge_of(direction: Direction, kernel: str, facts: DeviceFacts) -> Callable[..., Arrays]:
    """`run_and_check` of one kernel: of a case, a dtype and a folder, with options and facts other than these."""

    def judge(
        case: Case, dtype: str, folder: Path, options: dict[str, int] | None = None, facts: DeviceFacts = facts, **how
    ) -> Arrays:
        config = Config(kernel, tuple((options or {}).items()))
        return run_and_check(direction, case, dtype, folder, config, facts, saved_out=direction == "backward", **how)

    return judge


def with_launch(plan: Plan, of: int, **fields: Any) -> Plan:
    """The plan, with other fields of launch ``of``."""
    launches = [*plan.launches]
    launches[of] = replace(launches[of], **fields)
    return replace(plan, launches=tuple(launches))


def doctored(of: int, **defines: int | str) -> Callable[[Plan], Plan]:
    """Gives launch ``of`` of a plan other defines, and all the memory that they may want."""

    def change(plan: Plan) -> Plan:
        launch = plan.launches[of]
        others = dict(launch.kernel.defines) | {name: str(value) for name, value in defines.items()}
        kernel = replace(launch.kernel, defines=tuple(sorted(others.items())))
        return with_launch(plan, of, kernel=kernel, shared_bytes=max(launch.shared_bytes, 200 << 10))

    return change


def less_memory(of: int) -> Callable[[Plan], Plan]:
    """Takes 16 bytes of shared memory from launch ``of`` of a plan."""
    return lambda plan: with_launch(plan, of, shared_bytes=plan.launches[of].shared_bytes - 16)


def run_and_check(
    direction: Direction,
    case: Case,
    dtype: str,
    folder: Path,
    config: Config,
    facts: DeviceFacts,
    absent: tuple[str, ...] = (),
    saved_out: bool = False,
    change: Callable[[Plan], Plan] = lambda plan: plan,
    **how,
) -> Arrays:
    """Runs the plan of a case under a config, as ``change`` makes it, checks its results and returns them.

    ``absent`` names results and d_lse that the call does without, ``saved_out`` is of `tests.cases.bounds`, and
    ``how`` is for `run_blocks`.
    """
    arrays, results = prepared(direction, case, dtype, absent)
    present = {n: x for n, x in (arrays | results).items() if n not in absent}
    plan = change(plan_of(direction, case, present, config, facts))
    host.run_on(plan, direction, present, case.its_scale, folder, **how)
    check(case, dtype, arrays, results, saved_out)
    return results


def check_images_apart(direction: Direction, case: Case, folder: Path, config: Config, facts: DeviceFacts) -> Plan:
    """That NaN in every second image of a batch stays in these: what is read outside windows gets a weight of 0, and 0
    times NaN is NaN. drpb is of all images. Returns the plan."""
    arrays, results = prepared(direction, case, "float16")
    for name in arrays.keys() - {"rpb"}:
        arrays[name][1::2] = np.nan
    plan = plan_of(direction, case, arrays | results, config, facts)
    for order in (host.Order.EAGER, host.Order.LATE):
        host.run_on(plan, direction, arrays | results, case.its_scale, folder, order=order)
        for name in results.keys() - {"drpb"}:
            is_nan = np.isnan(results[name].astype(np.float32))
            assert not is_nan[::2].any() and is_nan[1::2].all(), name
    return plan
