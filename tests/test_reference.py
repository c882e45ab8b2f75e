"""The definition itself, against independent statements of it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from natcore import reference
from natcore.problem import Window
from tests.cases import CASES, Case, expected, inputs, random_case

INPUTS = {"q": "dq", "k": "dk", "v": "dv", "rpb": "drpb"} | {
    name: "d_" + name for name in ("additional_keys", "additional_values")
}


def by_hand(case: Case, x: dict[str, np.ndarray]) -> np.ndarray:
    """out, one query at a time, as semantics are told in words: nearest keys, then softmax."""
    scale = case.its_scale
    out = np.zeros((case.batch, *case.spatial, case.heads, case.head_dim_v))
    window = case.window
    for b, h, query in itertools.product(
        range(case.batch), range(case.heads), itertools.product(*map(range, case.spatial))
    ):
        kv_head = h // (case.heads // case.heads_kv)
        axes = []
        for i, extent, k, s, d, causal in zip(
            query, case.spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True
        ):
            group = [j for j in range(extent) if j % d == i % d]
            p = group.index(i)
            block = group[(p // s) * s : (p // s) * s + s]  # queries that share one window
            if causal:
                seen = [j for j in group if group.index(j) > group.index(block[-1]) - k and j <= i]
            else:
                leader = (p // s) * s + s // 2
                leader = min(leader, len(group) - 1)
                first = leader - k // 2
                first = 0 if first < 0 else len(group) - k if first + k > len(group) else first
                seen = group[first : first + k]
            axes.append([(j, (group.index(j) - p) + k - 1) for j in seen])
        scores, values = [], []
        for picks in itertools.product(*axes):
            key = tuple(j for j, _ in picks)
            score = scale * x["q"][(b, *query, h)] @ x["k"][(b, *key, kv_head)]
            scores.append(score + (x["rpb"][(h, *(r for _, r in picks))] if "rpb" in x else 0.0))
            values.append(x["v"][(b, *key, kv_head)])
        for e in range(case.extra):
            scores.append(scale * x["q"][(b, *query, h)] @ x["additional_keys"][b, e, kv_head])
            values.append(x["additional_values"][b, e, kv_head])
        weights = np.exp(np.array(scores) - np.max(scores))
        out[(b, *query, h)] = (weights / weights.sum()) @ np.array(values)
    return out


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "wide_heads"], ids=lambda c: c.name)
def test_forward_is_what_the_words_say(case: Case):
    x = inputs(case, "float64")
    np.testing.assert_allclose(expected(case, x)["out"], by_hand(case, x), rtol=0, atol=1e-12 * 1e3)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(random_case(max_tokens=60))
def test_gradients_are_central_differences(case: Case):
    x = inputs(case, "float64")
    grads, rng = expected(case, x), np.random.default_rng(1)
    direction = {name: rng.standard_normal(x[name].shape) for name in INPUTS if name in x}

    def loss(step: float) -> float:
        moved = x | {name: x[name] + step * direction[name] for name in direction}
        result = expected(case, moved)
        return float((result["out"] * x["d_out"]).sum() + (result["lse"] * x["d_lse"]).sum())

    analytic = sum(float((grads[INPUTS[name]] * direction[name]).sum()) for name in direction)
    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    size = sum(np.abs(grads[INPUTS[name]] * direction[name]).sum() for name in direction)
    assert abs(analytic - numeric) <= 1e-6 * max(size, 1.0)


@pytest.mark.parametrize("causal", [False, True])
def test_every_valid_axis(causal: bool):
    """All of L <= 24: windows hold themselves, the promised number of keys, and stay in the RPB table."""
    for extent in range(1, 25):
        for k, d in itertools.product(range(1, extent + 1), range(1, 5)):
            if k * d > extent:
                continue
            for s in range(1, k + 1):
                for i in range(extent):
                    start, end = reference.neighborhood(i, extent, k, s, d, causal)
                    p, length = i // d, -(-(extent - i % d) // d)
                    assert 0 <= start < end <= length
                    assert start <= p < end
                    assert (end - start <= k) if causal else (end - start == k)
                    assert -(k - 1) <= start - p and end - 1 - p <= k - 1


def test_kernel_of_the_extent_is_self_attention():
    mask = reference.window_mask(Window.of(2, (3, 4)), (3, 4))
    assert mask.all()


def test_stride_of_the_kernel_is_blocked_attention():
    mask = reference.axis_mask(12, 4, 4, 1, False)
    np.testing.assert_array_equal(mask, np.kron(np.eye(3, dtype=bool), np.ones((4, 4), bool)))
