"""The problems that every implementation is tested on, and the rule by which it is judged.

`CASES` holds the ugly ones by hand; `random_case` draws more, as a hypothesis strategy. A case is a
frozen description; `inputs` makes its arrays from a seed, `expected` runs the float64 reference,
and `check` applies the tolerance rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np
from hypothesis import strategies as st

from natcore import reference
from natcore.problem import Problem, Window
from natcore.reference_dropout import factors

ATOL = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
#: What many cases have in common: heads and the bias of the published models, and short heads.
WIDE = {"head_dim": 32, "head_dim_v": 32, "rpb": "float32"}
PLAIN = {"head_dim": 16, "head_dim_v": 16}


@dataclass(frozen=True)
class Case:
    """One problem in words. ``extra`` counts additional keys; ``rpb`` is None, "float32" or "same" (q's dtype)."""

    name: str
    spatial: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    batch: int = 1
    heads: int = 1
    heads_kv: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    rpb: str | None = None
    extra: int = 0
    scale: float | None = None
    packed: bool = False  # q, k, v are views of one [batch, *spatial, 3, heads, head_dim]
    outliers: bool = False  # N(0, 100) at rate 0.001
    dropout_p: float = 0.0
    dropout_seed: int = 0

    @property
    def its_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def rank(self) -> int:
        return len(self.spatial)

    @property
    def window(self) -> Window:
        return Window.of(self.rank, self.kernel_size, self.stride, self.dilation, self.is_causal)

    @property
    def call_arguments(self) -> dict:
        """The keyword arguments of na1d / na2d / na3d that are not arrays."""
        names = ("kernel_size", "stride", "dilation", "is_causal", "scale")
        return {name: getattr(self, name) for name in names}


CASES = [
    Case("nat_block", (14, 14), 7, heads=2, heads_kv=2, head_dim=32, head_dim_v=32, rpb="float32", batch=2),
    Case("nat_packed", (9, 11), 7, heads=2, heads_kv=2, head_dim=32, head_dim_v=32, rpb="same", packed=True, batch=2),
    Case("kernel_is_extent", (7, 7), 7, heads=2, heads_kv=2, head_dim=16, head_dim_v=16, rpb="float32"),
    Case("kernel_is_extent_dilated", (14, 6), (7, 3), dilation=2, rpb="float32"),
    Case("ragged_dilation", (17, 13), (3, 4), dilation=(5, 3), rpb="float32", batch=2),
    Case("even_kernel", (12, 9), (4, 2), rpb="same"),
    Case("kernel_one", (5, 6), 1, rpb="float32"),
    Case("axial", (9, 8), (1, 5)),
    Case("size_one_axes", (1, 9), (1, 3), rpb="float32"),
    Case("single_token", (1,), 1),
    Case("stride", (13, 10), (5, 4), stride=(3, 2), rpb="float32"),
    Case("blocked_stride_is_kernel", (12, 14), 4, stride=4),
    Case("causal", (19,), 6, is_causal=True, rpb="float32"),
    Case("causal_stride", (23,), 7, stride=3, is_causal=True, rpb="float32"),
    Case("causal_mix", (7, 11), (4, 5), stride=(1, 2), dilation=(1, 2), is_causal=(True, False), head_dim=16),
    Case("long_1d", (257,), 127, head_dim=24, head_dim_v=24),
    Case("video", (5, 7, 8), (3, 5, 3), dilation=(1, 1, 2), rpb="float32", head_dim=16, head_dim_v=16),
    Case("video_causal", (6, 5, 5), (4, 3, 3), stride=(2, 1, 1), is_causal=(True, False, False)),
    Case("gqa", (8, 9), 3, heads=6, heads_kv=2, head_dim=16, head_dim_v=24, rpb="float32", batch=2),
    Case("mqa", (11,), 5, heads=4, heads_kv=1, head_dim=40, head_dim_v=8, extra=3),
    Case("additional_keys", (7, 6), 3, heads=2, heads_kv=2, extra=5, rpb="float32", batch=2),
    Case("odd_head_dim", (6, 7), 3, head_dim=5, head_dim_v=3),
    Case("head_dim_one", (6,), 3, head_dim=1, head_dim_v=1),
    Case("wide_heads", (6, 6), 3, head_dim=256, head_dim_v=256),
    Case("head_dim_80_v_48", (8, 8), 5, head_dim=80, head_dim_v=48, heads=2, heads_kv=2),
    Case("scale_zero", (8, 8), 3, scale=0.0, rpb="float32"),
    Case("scale_negative", (8, 8), 3, scale=-0.7, rpb="float32"),
    Case("scale_tiny", (8, 8), 3, scale=1e-6, rpb="float32"),
    Case("outliers", (15, 15), 5, head_dim=32, head_dim_v=32, heads=2, heads_kv=2, outliers=True, rpb="float32"),
    Case("empty_batch", (6, 6), 3, batch=0, rpb="float32", extra=2),
]

#: For what need not be tried on all.
SOME = [c for c in CASES if c.name in ("nat_packed", "mqa", "gqa", "causal_mix", "video", "empty_batch")]

#: What dropout must get right: the number of a weight under GQA, causality, several tiles, chunks and key sets.
DROPOUT_CASES = [
    Case("dropout", (14, 9), 7, heads=2, heads_kv=2, rpb="float32", batch=2, dropout_p=0.3, dropout_seed=12345),
    Case("dropout_gqa", (8, 9), 3, heads=6, heads_kv=2, head_dim_v=24, batch=2, dropout_p=0.5, dropout_seed=2**32 - 1),
    Case("dropout_additional", (7, 6), 3, heads=2, heads_kv=1, extra=5, batch=2, dropout_p=0.2, dropout_seed=7),
    Case("dropout_causal_mix", (7, 11), (4, 5), stride=(1, 2), dilation=(1, 2), is_causal=(True, False), dropout_p=0.4),
    Case("dropout_video", (5, 7, 8), (3, 5, 3), dilation=(1, 1, 2), rpb="same", batch=2, dropout_p=0.1, dropout_seed=1),
    Case("dropout_long_1d", (257,), 127, head_dim=24, head_dim_v=24, dropout_p=0.9, dropout_seed=99),
]


@st.composite
def random_case(draw: st.DrawFn, max_tokens: int = 200) -> Case:
    """Any valid problem of up to ``max_tokens`` tokens."""
    rank = draw(st.integers(1, 3))
    limit = {1: 64, 2: 14, 3: 6}[rank]
    spatial, kernel, stride, dilation, causal = [], [], [], [], []
    for _ in range(rank):
        k = draw(st.integers(1, min(limit, 9)))
        d = draw(st.integers(1, max(1, limit // k)))
        spatial.append(draw(st.integers(k * d, limit)) if k * d < limit else k * d)
        kernel.append(k)
        dilation.append(d)
        stride.append(draw(st.integers(1, k)))
        causal.append(draw(st.booleans()))
    heads_kv = draw(st.integers(1, 2))
    dims = st.sampled_from([1, 4, 5, 8, 16, 24, 32])
    return Case(
        "random",
        tuple(spatial),
        tuple(kernel),
        tuple(stride),
        tuple(dilation),
        tuple(causal),
        batch=draw(st.integers(1, 2)) if prod(spatial) <= max_tokens else 1,
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        head_dim=draw(dims),
        head_dim_v=draw(dims),
        rpb=draw(st.sampled_from([None, "float32", "same"])),
        extra=draw(st.sampled_from([0, 0, 1, 3])),
        scale=draw(st.sampled_from([None, None, 0.0, -0.5, 1e-6, 2.0])),
    )


def fitting(case: Case) -> Case:
    """The case with head dimensions rounded up to multiples of 8."""
    return replace(case, head_dim=ceil(case.head_dim / 8) * 8, head_dim_v=ceil(case.head_dim_v / 8) * 8)


def problem_for(case: Case, dtype: str) -> Problem:
    """The problem of a case whose q, k and v are of ``dtype``."""
    rpb = dtype if case.rpb == "same" else case.rpb
    dims = case.head_dim, case.head_dim_v
    return Problem(case.window, case.batch, case.spatial, case.heads, case.heads_kv, *dims, case.extra, dtype, rpb)


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a natcore dtype name (bfloat16 from ml_dtypes)."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def inputs(case: Case, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """q, k, v, d_out, d_lse and, where the case has them, rpb and additional keys / values."""
    rng = np.random.default_rng(seed)
    lead, kind = (case.batch, *case.spatial), numpy_dtype(dtype)

    def draw(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape)
        if case.outliers:
            x = np.where(rng.random(shape) < 1e-3, 10 * rng.standard_normal(shape), x)
        return x.astype(kind)

    arrays = {
        "q": draw(*lead, case.heads, case.head_dim),
        "k": draw(*lead, case.heads_kv, case.head_dim),
        "v": draw(*lead, case.heads_kv, case.head_dim_v),
        "d_out": draw(*lead, case.heads, case.head_dim_v),
    }
    if case.packed:
        arrays |= dict(zip("qkv", np.moveaxis(np.stack([arrays[n] for n in "qkv"], axis=-3), -3, 0), strict=True))
    lse_kind = kind if dtype == "float64" else np.dtype("float32")
    arrays["d_lse"] = rng.standard_normal((*lead, case.heads)).astype(lse_kind)
    if case.rpb is not None:
        table = rng.standard_normal((case.heads, *case.window.rpb_shape))
        arrays["rpb"] = table.astype(kind if case.rpb == "same" or dtype == "float64" else np.float32)
    if case.extra:
        arrays["additional_keys"] = draw(case.batch, case.extra, case.heads_kv, case.head_dim)
        arrays["additional_values"] = draw(case.batch, case.extra, case.heads_kv, case.head_dim_v)
    if case.dropout_p:
        arrays["dropout_seed"] = np.array([case.dropout_seed], np.uint32)
    return arrays


def expected(case: Case, arrays: dict[str, np.ndarray], dtype: type = np.float64) -> dict[str, np.ndarray]:
    """out, lse and every gradient, by the reference, in arithmetic of ``dtype``."""
    options = {n: arrays.get(n) for n in ("rpb", "additional_keys", "additional_values")}
    options |= {"scale": case.scale, "dtype": dtype}
    if case.dropout_p:
        shape = (case.batch, case.spatial, case.heads, case.extra)
        options["factors"] = factors(case.window, *shape, case.dropout_p, case.dropout_seed)
    q, k, v = (arrays[n] for n in "qkv")
    out, lse = reference.forward(q, k, v, case.window, **options)
    grads = reference.backward(arrays["d_out"], q, k, v, case.window, d_lse=arrays["d_lse"], **options)
    return {"out": out, "lse": lse} | {n: g for n, g in grads._asdict().items() if g is not None}


#: Of each result, its exact value and the greatest error that it may have.
Bounds = dict[str, tuple[np.ndarray, float]]


def bounds(case: Case, dtype: str, arrays: dict[str, np.ndarray], saved_out: bool = False) -> Bounds:
    """The tolerance rule, for every result (see `expected` for the names).

    max|actual - ref| <= 2 * max|plain - ref| + atol * max|ref|, where plain is dense attention from
    the same inputs with float32 accumulation, its results rounded to ``dtype``. With ``saved_out`` its
    backward takes sum(P * dP) for d_out . out, of the out that it has rounded, as FlashAttention's does.
    """
    ref = expected(case, arrays)
    kind = np.float64 if dtype == "float64" else np.float32
    plain = expected(case, arrays, kind)
    if saved_out:
        error = plain["out"].astype(numpy_dtype(dtype)).astype(kind) - plain["out"]
        shifted = arrays["d_lse"] - (error * arrays["d_out"].astype(kind)).sum(-1)
        plain = expected(case, arrays | {"d_lse": shifted}, kind)
    found = {}
    for name, exact in ref.items():
        rounded = plain[name] if name == "lse" else plain[name].astype(numpy_dtype(dtype))
        of_plain = np.abs(rounded.astype(np.float64) - exact).max(initial=0)
        found[name] = exact, 2 * of_plain + ATOL[dtype] * np.abs(exact).max(initial=0)
    return found


def check(
    case: Case, dtype: str, arrays: dict[str, np.ndarray], actual: dict[str, np.ndarray], saved_out: bool = False
) -> None:
    """That every result in ``actual`` keeps its bound (see `bounds`)."""
    check_bounds(case, dtype, bounds(case, dtype, arrays, saved_out), actual)


def check_bounds(case: Case, dtype: str, found: Bounds, actual: dict[str, np.ndarray]) -> None:
    """As `check`, of bounds that are already there."""
    for name, value in actual.items():
        exact, bound = found[name]
        assert value.shape == exact.shape, f"{case.name} {name}: shape {value.shape}, expected {exact.shape}"
        if value.size == 0:
            continue
        value = np.asarray(value, np.float64)
        assert np.isfinite(value).all(), f"{case.name} {name}: {np.sum(~np.isfinite(value))} values are not finite"
        error = np.abs(value - exact).max()
        assert error <= bound, f"{case.name} {dtype} {name}: error {error:.3g} > {bound:.3g}"


def check_same_bits(first: dict[str, np.ndarray], again: dict[str, np.ndarray]) -> None:
    """That two runs have the same results, to the bit."""
    assert again.keys() == first.keys()
    for name, result in first.items():
        bits, wanted = (np.ascontiguousarray(x).view(np.uint8) for x in (again[name], result))
        np.testing.assert_array_equal(bits, wanted, err_msg=name)
