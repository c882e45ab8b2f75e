"""jax_nat's functions on the CPU: values and gradients against the definition, and JAX's transformations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jax_nat
from natcore.problem import GRADIENTS
from tests.cases import CASES, Case, check, expected, inputs, random_case

OPERANDS = ("q", "k", "v", "rpb", "additional_keys", "additional_values")
CASE = {case.name: case for case in CASES}


def function(case: Case, return_lse: bool = True):
    """f(arrays: dict) -> out, lse for a case."""
    attend = getattr(jax_nat, f"na{case.rank}d")

    def f(arrays):
        rest = {name: x for name, x in arrays.items() if name not in "qkv"}
        return attend(*(arrays[n] for n in "qkv"), **rest, **case.call_arguments, return_lse=return_lse)

    return f


def operands(arrays: dict) -> dict:
    return {name: jnp.asarray(arrays[name]) for name in OPERANDS if name in arrays}


def results(case: Case, arrays: dict, transform=lambda f: f) -> dict[str, np.ndarray]:
    """out, lse and every gradient."""
    value, pullback = jax.vjp(transform(function(case)), operands(arrays))
    (gradients,) = pullback((jnp.asarray(arrays["d_out"]), jnp.asarray(arrays["d_lse"])))
    named = {"out": value[0], "lse": value[1]} | {GRADIENTS[name]: g for name, g in gradients.items()}
    return {name: np.asarray(x) for name, x in named.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case):
    arrays = inputs(case, "float32")
    actual = results(case, arrays, jax.jit)
    assert actual.keys() == expected(case, arrays).keys()
    check(case, "float32", arrays, actual)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["nat_block", "gqa", "mqa", "causal_mix", "additional_keys", "empty_batch"])
def test_16_bit(name, dtype):
    arrays = inputs(CASE[name], dtype)
    actual = results(CASE[name], arrays)
    assert actual["out"].dtype == arrays["q"].dtype
    check(CASE[name], dtype, arrays, actual)


@pytest.mark.parametrize("name", ["nat_block", "ragged_dilation", "video", "additional_keys"])
def test_float64(name):
    with jax.enable_x64(True):
        arrays = inputs(CASE[name], "float64")
        check(CASE[name], "float64", arrays, results(CASE[name], arrays))


@settings(max_examples=15, deadline=None)
@given(case=random_case())
def test_any_problem(case):
    arrays = inputs(case, "float32")
    check(case, "float32", arrays, results(case, arrays))


def test_without_lse_the_gradients_are_those_of_out_alone():
    case = CASE["nat_block"]
    arrays = inputs(case, "float32") | {"d_lse": np.zeros((2, 14, 14, 2), np.float32)}
    out, pullback = jax.vjp(function(case, return_lse=False), operands(arrays))
    (gradients,) = pullback(jnp.asarray(arrays["d_out"]))
    check(case, "float32", arrays, {"out": out} | {GRADIENTS[n]: g for n, g in gradients.items()})


def test_a_loss_of_the_lse_alone_has_gradients():
    case = CASE["additional_keys"]
    arrays = inputs(case, "float32")
    arrays["d_out"] = np.zeros_like(arrays["d_out"])
    gradients = jax.grad(lambda a: jnp.vdot(function(case)(a)[1], arrays["d_lse"]))(operands(arrays))
    assert float(jnp.abs(gradients["q"]).max()) > 1e-2
    check(case, "float32", arrays, {GRADIENTS[n]: g for n, g in gradients.items()})


def _packed(case: Case, arrays: dict):
    qkv = jnp.stack([jnp.asarray(arrays[n]) for n in "qkv"], axis=-3)
    attend = partial(getattr(jax_nat, f"na{case.rank}d_qkvpacked"), **case.call_arguments, return_lse=True)
    optional = {n: x for n, x in operands(arrays).items() if n not in "qkv"}
    return qkv, optional, attend


@pytest.mark.parametrize(
    "name", ["nat_packed", "causal_stride", "video", "additional_keys", "single_token", "empty_batch"]
)
def test_packed(name):
    case = CASE[name]
    arrays = inputs(case, "float32")
    qkv, optional, attend = _packed(case, arrays)
    (out, lse), pullback = jax.vjp(lambda qkv, optional: attend(qkv, **optional), qkv, optional)
    d_qkv, gradients = pullback((jnp.asarray(arrays["d_out"]), jnp.asarray(arrays["d_lse"])))
    assert d_qkv.shape == qkv.shape
    actual = {"out": out, "lse": lse} | {GRADIENTS[n]: g for n, g in gradients.items()}
    check(case, "float32", arrays, actual | {f"d{n}": d_qkv[..., i, :, :] for i, n in enumerate("qkv")})


def test_packed_copies_nothing():
    case = CASE["nat_packed"]
    qkv, optional, attend = _packed(case, inputs(case, "float32"))
    text = jax.jit(partial(attend, **optional)).lower(qkv).compile().as_text() or ""
    assert text.count("custom-call(") == 1
    assert " copy(" not in text
    assert " slice(" not in text


def _stacked(case: Case, count: int, seed: int = 0):
    many = [operands(inputs(case, "float32", seed + i)) for i in range(count)]
    return many, {name: jnp.stack([x[name] for x in many]) for name in many[0]}


def _compare(actual, wanted):
    """vmap against a loop: the same arithmetic, so nearly the same numbers."""
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.shape == w.shape
        np.testing.assert_allclose(a, w, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(w).max())))


@pytest.mark.parametrize("mapped", [("q", "k", "v"), ("rpb",), ("q",), ("k", "additional_keys"), OPERANDS])
@pytest.mark.parametrize("name", ["additional_keys", "gqa"])
def test_vmap_of_value_and_gradient(name, mapped):
    case = CASE[name]
    many, stacked = _stacked(case, 3)
    mapped = [n for n in mapped if n in stacked]
    given = {n: stacked[n] if n in mapped else many[0][n] for n in stacked}

    def loss(arrays):
        out, lse = function(case)(arrays)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse)), (out, lse)

    transformed = jax.grad(loss, has_aux=True)
    axes = {n: 0 if n in mapped else None for n in given}
    actual = jax.jit(jax.vmap(transformed, in_axes=(axes,)))(given)
    singles = [transformed({n: x[i] if n in mapped else x for n, x in given.items()}) for i in range(3)]
    _compare(actual, jax.tree.map(lambda *x: jnp.stack(x), *singles))


def test_nested_vmap_with_inner_axes():
    case = CASE["nat_block"]
    _, stacked = _stacked(case, 6)
    f = function(case)
    tables = stacked["rpb"].reshape(2, 3, *stacked["rpb"].shape[1:])
    q = jnp.moveaxis(stacked["q"].reshape(2, 3, *stacked["q"].shape[1:]), 1, -1)  # the inner axis last
    k, v = stacked["k"][0], stacked["v"][0]
    inner = jax.vmap(lambda q, rpb: f({"q": q, "k": k, "v": v, "rpb": rpb})[0], in_axes=(-1, 0))
    actual = jax.vmap(inner)(q, tables)
    wanted = [[f({"q": q[i, ..., j], "k": k, "v": v, "rpb": tables[i, j]})[0] for j in range(3)] for i in range(2)]
    _compare(actual, jnp.stack([jnp.stack(row) for row in wanted]))


@pytest.mark.parametrize("table_mapped", [False, True])
def test_vmap_of_packed(table_mapped):
    case = CASE["nat_packed"]
    pairs = [_packed(case, inputs(case, "float32", seed)) for seed in range(2)]
    attend = pairs[0][2]
    qkv = jnp.stack([p[0] for p in pairs])
    rpb = jnp.stack([p[1]["rpb"] for p in pairs]) if table_mapped else pairs[0][1]["rpb"]
    gradient = jax.grad(lambda qkv, rpb: jnp.sum(jnp.cos(attend(qkv, rpb=rpb)[0])), argnums=(0, 1))
    actual = jax.vmap(gradient, in_axes=(0, 0 if table_mapped else None))(qkv, rpb)
    wanted = [gradient(qkv[i], rpb[i] if table_mapped else rpb) for i in range(2)]
    _compare(actual, jax.tree.map(lambda *x: jnp.stack(x), *wanted))


def test_scan_while_and_cond():
    case = CASE["causal"]
    arrays = operands(inputs(case, "float32"))
    f = function(case, return_lse=False)

    def step(q):
        return q + f(arrays | {"q": q})

    unrolled = step(step(step(arrays["q"])))
    scanned = jax.jit(lambda q: jax.lax.scan(lambda q, _: (step(q), None), q, length=3)[0])(arrays["q"])
    _compare(scanned, unrolled)
    looped = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, step(c[1])), (0, arrays["q"]))[1]
    _compare(looped, unrolled)
    chosen = jax.jit(lambda p, q: jax.lax.cond(p, step, lambda q: q, q))(True, arrays["q"])
    _compare(chosen, step(arrays["q"]))
    gradient = jax.grad(lambda q: jax.lax.scan(lambda q, _: (step(q), None), q, length=3)[0].sum())(arrays["q"])
    _compare(gradient, jax.grad(lambda q: step(step(step(q))).sum())(arrays["q"]))


def test_remat():
    case = CASE["nat_block"]
    arrays = operands(inputs(case, "float32"))
    f = function(case, return_lse=False)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(jax.checkpoint(f)(a) ** 2)))(arrays)
    _compare(gradient, jax.grad(lambda a: jnp.sum(f(a) ** 2))(arrays))


def test_donated_buffers():
    case = CASE["nat_block"]
    arrays = inputs(case, "float32")
    rest = {n: x for n, x in operands(arrays).items() if n != "q"}
    donating = jax.jit(lambda q: function(case)(rest | {"q": q})[0], donate_argnums=0)
    for _ in range(3):
        q = jnp.array(arrays["q"])
        out = donating(q)
        assert q.is_deleted()
        check(case, "float32", arrays, {"out": np.asarray(out)})


def test_many_threads():
    case = CASE["nat_block"]
    compiled = jax.jit(function(case))
    problems = [inputs(case, "float32", seed) for seed in range(8)]

    def work(arrays):
        return [compiled(operands(arrays)) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for arrays, answers in zip(problems, pool.map(work, problems), strict=True):
            for out, lse in answers:
                check(case, "float32", arrays, {"out": np.asarray(out), "lse": np.asarray(lse)})


def test_a_new_batch_size_is_a_new_program_with_the_same_answers():
    compiled = jax.jit(lambda a: jax_nat.na1d(a["q"], a["k"], a["v"], 3))
    for batch in (1, 4, 2):
        case = Case("batches", (9,), 3, batch=batch)
        arrays = inputs(case, "float32")
        check(case, "float32", arrays, {"out": np.asarray(compiled(operands(arrays)))})


def _arrays(**changes):
    arrays = {n: jnp.zeros((1, 8, 8, 2, 16)) for n in "qkv"} | changes
    return [arrays.pop(n) for n in "qkv"], arrays


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"kernel_size": 9}, r"kernel_size 9 \* dilation 1 = 9 > extent 8 on axis 0"),
        ({}, {"kernel_size": (3, 4), "dilation": (1, 3)}, r"= 12 > extent 8 on axis 1"),
        ({}, {"kernel_size": 3, "stride": 4}, "stride 4 > kernel_size 3 on axis 0"),
        ({}, {"kernel_size": 0}, "kernel_size on axis 0 is 0"),
        ({}, {"kernel_size": (3, 3, 3)}, "kernel_size has 3 entries"),
        ({}, {"kernel_size": 3.0}, "must be int"),
        ({"q": jnp.zeros((8, 8, 2, 16))}, {"kernel_size": 3}, "q has 4 axes"),
        ({"k": jnp.zeros((1, 8, 8, 2, 8))}, {"kernel_size": 3}, r"k has shape \(1, 8, 8, 2, 8\), expected"),
        ({"k": jnp.zeros((1, 8, 8, 3, 16))}, {"kernel_size": 3}, "2 heads and k has 3"),
        ({"v": jnp.zeros((1, 8, 8, 2, 16), jnp.bfloat16)}, {"kernel_size": 3}, "v has dtype bfloat16"),
        ({n: jnp.zeros((1, 8, 8, 2, 16), jnp.int32) for n in "qkv"}, {"kernel_size": 3}, "q has dtype int32"),
        ({"rpb": jnp.zeros((2, 5, 7))}, {"kernel_size": 3}, r"rpb has shape \(2, 5, 7\), expected \(2, 5, 5\)"),
        ({"additional_keys": jnp.zeros((1, 2, 2, 16))}, {"kernel_size": 3}, "additional_keys and additional_values"),
    ],
)
def test_bad_arguments_are_refused_when_traced(changes, arguments, message):
    arrays, optional = _arrays(**changes)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda q, k, v, optional: jax_nat.na2d(q, k, v, **optional, **arguments), *arrays, optional)


def test_a_bad_packed_shape_is_refused():
    with pytest.raises(ValueError, match="na2d_qkvpacked takes 6 axes"):
        jax_nat.na2d_qkvpacked(jnp.zeros((1, 8, 8, 2, 2, 16)), 3)


def test_a_traced_scale_is_refused():
    arrays, _ = _arrays()
    with pytest.raises(ValueError, match="multiply q by it"):
        jax.jit(lambda scale: jax_nat.na2d(*arrays, 3, scale=scale))(0.5)


def test_second_derivatives_are_refused_by_jax():
    arrays, _ = _arrays()
    first = jax.grad(lambda q: jax_nat.na2d(q, *arrays[1:], 3).sum())
    with pytest.raises(NotImplementedError, match="neighborhood_attention"):
        jax.grad(lambda q: first(q).sum())(arrays[0])
