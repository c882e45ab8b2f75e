"""The public door to unfused attention, dropout and merging."""

from __future__ import annotations

import numpy as np
import pytest

import natcore
from tests.cases import CASES, DROPOUT_CASES, Case, check, inputs
from tests.unfused import unfused_check, unfused_inputs

SOME = [c for c in CASES if c.name in ("nat_packed", "mqa", "causal_mix", "video", "single_token", "empty_batch")]


def of(case: Case, name: str):
    return getattr(natcore, f"na{case.rank}d{name}")


def unfused(case: Case, x: dict, kind=lambda a: a) -> dict[str, np.ndarray]:
    """Every result, on arrays made by ``kind``."""
    x = {name: kind(a) for name, a in x.items()}
    window = {name: getattr(case, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}
    extra = {name: x.get(name) for name in ("rpb", "additional_keys")}
    values = {"additional_values": x.get("additional_values")}
    if case.scale is not None:
        extra["scale"] = case.scale
    results = {
        "scores": of(case, "_qk")(x["q"], x["k"], **window, **extra),
        "out": of(case, "_av")(x["weights"], x["v"], **window, **values),
        **of(case, "_qk_backward")(x["d_scores"], x["q"], x["k"], **window, **extra)._asdict(),
        **of(case, "_av_backward")(x["d_out"], x["weights"], x["v"], **window, **values)._asdict(),
    }
    assert all(type(r) is type(x["q"]) for r in results.values() if r is not None)
    return {name: np.asarray(r) for name, r in results.items() if r is not None}


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_unfused_on_numpy(case: Case):
    arrays = unfused_inputs(case, "float32")
    unfused_check(case, "float32", arrays, unfused(case, arrays))


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_unfused_on_other_arrays(library: str):
    case = next(c for c in CASES if c.name == "mqa")
    arrays = unfused_inputs(case, "float32")
    kind = pytest.importorskip(library)
    kind = kind.from_numpy if library == "torch" else kind.numpy.asarray
    unfused_check(case, "float32", arrays, unfused(case, arrays, kind))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda c: c.name)
def test_dropout(case: Case, packed: bool):
    if packed and (case.heads != case.heads_kv or case.head_dim != case.head_dim_v):
        pytest.skip("cannot be packed")
    x = inputs(case, "float32")
    options = {name: x.get(name) for name in ("rpb", "additional_keys", "additional_values")} | case.call_arguments
    options |= {"dropout_p": case.dropout_p, "dropout_seed": case.dropout_seed}
    q, k, v = (x[name] for name in "qkv")
    if packed:
        out, lse = of(case, "_qkvpacked")(np.stack([q, k, v], axis=-3), **options, return_lse=True)
    else:
        out, lse = of(case, "")(q, k, v, **options, return_lse=True)
    gradients = of(case, "_backward")(x["d_out"], q, k, v, out, lse, **options, d_lse=x["d_lse"])
    named = {"out": out, "lse": lse} | gradients._asdict()
    check(case, "float32", x, {name: a for name, a in named.items() if a is not None})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dropout_p": 0.5}, r"dropout_p 0.5 needs a dropout_seed in \[0, 2 \*\* 32\), not None"),
        ({"dropout_p": 0.5, "dropout_seed": -1}, "not -1"),
        ({"dropout_p": 0.5, "dropout_seed": 2**32}, "not 4294967296"),
        ({"dropout_p": 0.5, "dropout_seed": 1.5}, "not 1.5"),
        ({"dropout_p": 1.0, "dropout_seed": 0}, r"dropout_p is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_bad_dropout(options: dict, text: str):
    q = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match=text):
        natcore.na1d(q, q, q, 3, **options)


def test_missing_arrays():
    q = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match="k is None"):
        natcore.na1d_qk(q, None, 3)
    with pytest.raises(ValueError, match="weights is None"):
        natcore.na1d_av(None, q, 3)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_merging(library: str):
    """Two halves of a key set, as additional keys of one-key windows, against the whole."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 2, 4)).astype(np.float32) for _ in range(3))
    keys, values = (rng.standard_normal((2, 6, 2, 4)).astype(np.float32) for _ in range(2))

    def attend(kernel: int, keys: np.ndarray, values: np.ndarray) -> tuple:
        return natcore.na1d(q, k, v, kernel, additional_keys=keys, additional_values=values, return_lse=True)

    out, lse = attend(5, keys, values)
    scores = natcore.na1d_qk(q, q, 1, scale=0.5, additional_keys=keys)[..., 1:]  # of the additional keys alone
    lse_of_keys = np.log(np.exp(scores).sum(axis=-1))
    weights = np.concatenate([np.zeros_like(scores[..., :1]), np.exp(scores - lse_of_keys[..., None])], axis=-1)
    out_of_keys = natcore.na1d_av(weights, v, 1, additional_values=values)
    near = natcore.na1d(q, k, v, 5, return_lse=True)
    make = np.asarray if library == "numpy" else pytest.importorskip(library)
    make = make if library == "numpy" else make.from_numpy if library == "torch" else make.numpy.asarray
    arrays = [make(a) for a in (near[0], out_of_keys, near[1], lse_of_keys)]
    merged, lse_of_both = natcore.merge_attentions(arrays[:2], arrays[2:])
    assert type(merged) is type(arrays[0])
    np.testing.assert_allclose(np.asarray(merged), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(lse_of_both), lse, rtol=1e-5, atol=1e-6)


def test_merging_of_16_bits_and_of_nothing():
    out, lse = np.ones((1, 3, 2, 4), np.float16), np.zeros((1, 3, 2), np.float32)
    merged, both = natcore.merge_attentions([out, 3 * out], [lse, lse])
    assert merged.dtype == np.float16 and both.dtype == np.float32
    np.testing.assert_array_equal(merged, 2 * out)
    np.testing.assert_allclose(both, np.log(2), rtol=1e-6)
    merged, both = natcore.merge_attentions([out, out], [lse - np.inf, lse - np.inf])
    assert (merged == 0).all() and (both == -np.inf).all()
    with pytest.raises(ValueError, match=r"outs\[1\] has dtype float32"):
        natcore.merge_attentions([out, out.astype(np.float32)], [lse, lse])
