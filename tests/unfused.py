"""Inputs, expected results and the tolerance rule for unfused attention, on the cases of tests/cases.py."""

from __future__ import annotations

from math import prod

import numpy as np

from natcore import reference_unfused as reference
from natcore.problem import OPERANDS, Direction
from natcore.reference import window_mask
from tests.cases import ATOL, Case, inputs, numpy_dtype

DIRECTIONS: tuple[Direction, ...] = ("qk", "qk_backward", "av", "av_backward")


def seen(case: Case) -> np.ndarray:
    """bool [*spatial, 1, places]: where a query has a key."""
    dense = np.concatenate([window_mask(case.window, case.spatial), np.ones((prod(case.spatial), case.extra))], axis=1)
    return reference._to_places(dense[None, None], case.window, case.spatial, 0.0)[0].astype(bool)


def unfused_inputs(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Those of `inputs`, with weights and d_scores; they are NaN where a query has no key, which nobody may read."""
    arrays, rng = inputs(case, dtype), np.random.default_rng(1)
    shape = (case.batch, *case.spatial, case.heads, prod(case.window.kernel_size) + case.extra)
    for name in ("weights", "d_scores"):
        arrays[name] = np.where(seen(case), rng.standard_normal(shape), np.nan).astype(numpy_dtype(dtype))
    return arrays


def unfused_expected(case: Case, arrays: dict[str, np.ndarray], dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Every result, by the names of RESULTS; out is that of av."""
    x = {name: arrays.get(name) for names in OPERANDS.values() for name in names}
    scale = 1.0 if case.scale is None else case.scale
    options = {"scale": scale, "rpb": x["rpb"], "additional_keys": x["additional_keys"], "dtype": dtype}
    values = {"additional_values": x["additional_values"], "dtype": dtype}
    weights, d_scores = (np.where(seen(case), x[name], 0) for name in ("weights", "d_scores"))
    results = {
        "scores": reference.qk(x["q"], x["k"], case.window, **options),
        "out": reference.av(weights, x["v"], case.window, **values),
        **reference.qk_backward(d_scores, x["q"], x["k"], case.window, **options)._asdict(),
        **reference.av_backward(x["d_out"], weights, x["v"], case.window, **values)._asdict(),
    }
    return {name: value for name, value in results.items() if value is not None}


def unfused_check(case: Case, dtype: str, arrays: dict[str, np.ndarray], actual: dict[str, np.ndarray]) -> None:
    """The rule of `tests.cases.check`; scores are -infinity, and their weights' gradients 0, where there is no key."""
    ref = unfused_expected(case, arrays)
    plain = unfused_expected(case, arrays, np.float64 if dtype == "float64" else np.float32)
    for name, value in actual.items():
        assert value.shape == ref[name].shape, f"{case.name} {name}: shape {value.shape}, expected {ref[name].shape}"
        if value.size == 0:
            continue
        value, exact = np.asarray(value, np.float64), ref[name]
        if name in ("scores", "d_weights"):
            nowhere = np.broadcast_to(~seen(case), value.shape)
            np.testing.assert_array_equal(value[nowhere], exact[nowhere])
            value, exact, rounded = (x[~nowhere] for x in (value, exact, plain[name]))
        else:
            rounded = plain[name]
        assert np.isfinite(value).all(), f"{case.name} {name}: {np.sum(~np.isfinite(value))} values are not finite"
        rounded = rounded.astype(numpy_dtype(dtype)).astype(np.float64)
        bound = 2 * np.abs(rounded - exact).max() + ATOL[dtype] * np.abs(exact).max()
        error = np.abs(value - exact).max()
        assert error <= bound, f"{case.name} {dtype} {name}: error {error:.3g} > {bound:.3g}"
