"""na*d_qk, na*d_av, merge_attentions and dropout under JAX's transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_nat
from tests.cases import DROPOUT_CASES, SOME, Case, check, inputs
from tests.unfused import unfused_check, unfused_inputs

DIFFERENTIABLE = ("q", "k", "v", "weights", "rpb", "additional_keys", "additional_values")


def gradient_name(name: str) -> str:
    return "d_" + name if name[0] in "aw" else "d" + name


def unfused(case: Case, x: dict) -> dict[str, np.ndarray]:
    """Every result, by the names of natcore.problem.RESULTS."""
    window = {name: getattr(case, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}
    scale = 1.0 if case.scale is None else case.scale
    qk, av = (getattr(jax_nat, f"na{case.rank}d_{step}") for step in ("qk", "av"))

    def scores(given: dict) -> jax.Array:
        return qk(
            *(given[n] for n in "qk"),
            **window,
            scale=scale,
            **{n: given[n] for n in ("rpb", "additional_keys") if n in given},
        )

    def out(given: dict) -> jax.Array:
        return av(given["weights"], given["v"], **window, additional_values=given.get("additional_values"))

    x = {name: jnp.asarray(a) for name, a in x.items()}
    for_scores = {n: x[n] for n in ("q", "k", "rpb", "additional_keys") if n in x}
    for_out = {n: x[n] for n in ("weights", "v", "additional_values") if n in x}
    results = {}
    for name, function, given, cotangent in (
        ("scores", scores, for_scores, x["d_scores"]),
        ("out", out, for_out, x["d_out"]),
    ):
        results[name], pullback = jax.vjp(function, given)
        results |= {gradient_name(n): g for n, g in pullback(cotangent)[0].items()}
    return {name: np.asarray(r) for name, r in results.items()}


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cases(case: Case, dtype: str):
    arrays = unfused_inputs(case, dtype)
    unfused_check(case, dtype, arrays, unfused(case, arrays))


def two_steps(q, k, v, rpb):
    scores = jax_nat.na1d_qk(q, k, 3, rpb=rpb)
    return jax_nat.na1d_av(jax.nn.softmax(scores), v, 3)


@pytest.mark.parametrize("mapped", [(0, 0, 0, None), (1, None, 0, None), (0, None, None, 0), (None, None, 2, 1)])
def test_vmap_and_grad(mapped: tuple):
    shapes, rng = [(2, 7, 2, 4), (2, 7, 1, 4), (2, 7, 1, 3), (2, 5)], np.random.default_rng(0)
    given = [
        jnp.asarray(rng.standard_normal(s if d is None else (*s[:d], 3, *s[d:])), jnp.float32)
        for s, d in zip(shapes, mapped, strict=True)
    ]
    gradient = jax.grad(lambda *x: jnp.square(two_steps(*x)).sum(), argnums=(0, 1, 2, 3))
    actual = jax.jit(jax.vmap(gradient, mapped))(*given)
    for i in range(3):
        one = [x if d is None else jnp.take(x, i, axis=d) for x, d in zip(given, mapped, strict=True)]
        for a, e in zip(actual, gradient(*one), strict=True):
            np.testing.assert_allclose(a[i], e, rtol=1e-4, atol=1e-5)


def with_dropout(case: Case, x: dict, seed: object, packed: bool = False) -> dict[str, np.ndarray]:
    suffix = "_qkvpacked" if packed else ""
    function = getattr(jax_nat, f"na{case.rank}d{suffix}")
    given = {n: jnp.asarray(x[n]) for n in DIFFERENTIABLE if n in x}
    if packed:
        given = {"qkv": jnp.stack([given.pop(n) for n in "qkv"], axis=-3)} | given

    @jax.jit
    def run(given: dict, seed: object) -> tuple:
        options = {"return_lse": True, "dropout_p": case.dropout_p, "dropout_seed": seed}
        return function(**given, **case.call_arguments, **options)

    (out, lse), pullback = jax.vjp(lambda given: run(given, seed), given)
    gradients = pullback((jnp.asarray(x["d_out"]), jnp.asarray(x["d_lse"])))[0]
    if packed:
        gradients |= dict(zip("qkv", jnp.moveaxis(gradients.pop("qkv"), -3, 0), strict=True))
    named = {"out": out, "lse": lse} | {gradient_name(n): g for n, g in gradients.items()}
    return {name: np.asarray(a) for name, a in named.items()}


@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda c: c.name)
def test_dropout(case: Case):
    """The seed is traced: an int, or an array."""
    x = inputs(case, "float32")
    check(case, "float32", x, with_dropout(case, x, jnp.uint32(case.dropout_seed)))


def test_packed_dropout():
    case = DROPOUT_CASES[0]
    x = inputs(case, "float32")
    check(case, "float32", x, with_dropout(case, x, jnp.asarray(x["dropout_seed"]), packed=True))


def test_another_seed_compiles_nothing():
    q, traces = jnp.ones((1, 9, 1, 8)), []

    @jax.jit
    def run(seed):
        traces.append(seed)
        return jax_nat.na1d(q, q, q, 5, dropout_p=0.5, dropout_seed=seed)

    outs = [run(jnp.uint32(seed)) for seed in (0, 1, 0)]
    assert len(traces) == 1
    assert (outs[0] == outs[2]).all() and (outs[0] != outs[1]).any()
    np.testing.assert_array_equal(outs[1], jax_nat.na1d(q, q, q, 5, dropout_p=0.5, dropout_seed=1))


def test_vmap_with_dropout():
    """Each element is what a call on it alone is; also its gradient."""
    q = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 9, 1, 8)), jnp.float32)
    seeds = jnp.arange(3, dtype=jnp.uint32)

    def loss(x, seed):
        return jnp.square(jax_nat.na1d(x, x, x, 5, dropout_p=0.5, dropout_seed=seed)).sum()

    for axes in ((0, 0), (0, None)):
        given = seeds if axes[1] == 0 else seeds[0]
        values, gradients = jax.vmap(jax.value_and_grad(loss), axes)(q, given)
        for i in range(3):
            value, gradient = jax.value_and_grad(loss)(q[i], seeds[i] if axes[1] == 0 else given)
            np.testing.assert_allclose(values[i], value, rtol=1e-6)
            np.testing.assert_allclose(gradients[i], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dropout_p": 0.5}, "dropout_p 0.5 needs a dropout_seed"),
        ({"dropout_p": 0.5, "dropout_seed": -1}, "dropout_seed is -1"),
        ({"dropout_p": 0.5, "dropout_seed": jnp.ones(1)}, "an int or an integer array"),
        ({"dropout_p": 0.5, "dropout_seed": jnp.zeros(2, int)}, "of one element"),
        ({"dropout_p": 1.0, "dropout_seed": 0}, r"dropout_p is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_bad_dropout(options: dict, text: str):
    q = jnp.zeros((1, 4, 1, 4))
    with pytest.raises(ValueError, match=text):
        jax_nat.na1d(q, q, q, 3, **options)


def test_bad_unfused_problems():
    q = jnp.zeros((1, 6, 2, 8))
    with pytest.raises(ValueError, match=r"weights has shape \(1, 6, 2, 8\), expected \(1, 6, 2, 3\)"):
        jax_nat.na1d_av(q, q, 3)
    with pytest.raises(ValueError, match="scale is a traced value"):
        jax.jit(lambda s: jax_nat.na1d_qk(q, q, 3, scale=s))(1.0)


def test_merging():
    """A window's keys and the additional keys apart, against both together; with gradients."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((2, 5, 2, 4)), jnp.float32) for _ in range(4))
    keys, values = (jnp.asarray(rng.standard_normal((2, 6, 2, 4)), jnp.float32) for _ in range(2))

    def together(q, k, v, keys, values):
        return jax_nat.na1d(q, k, v, 3, additional_keys=keys, additional_values=values, return_lse=True)

    def apart(q, k, v, keys, values):
        near = jax_nat.na1d(q, k, v, 3, return_lse=True)
        scores = jax_nat.na1d_qk(q, k, 1, scale=0.5, additional_keys=keys).at[..., 0].set(-jnp.inf)
        far = jax_nat.na1d_av(jax.nn.softmax(scores), v, 1, additional_values=values), jax.nn.logsumexp(scores, -1)
        return jax_nat.merge_attentions([near[0], far[0]], [near[1], far[1]])

    given = (q, k, v, keys, values)
    expected, of_expected = jax.vjp(together, *given)
    actual, of_actual = jax.vjp(apart, *given)
    cotangent = (d_out, jnp.cos(expected[1]))
    for a, e in zip((*actual, *of_actual(cotangent)), (*expected, *of_expected(cotangent)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_module_with_attention_dropout():
    layer = jax_nat.NeighborhoodAttention1D(8, 2, 5, attn_drop=0.5, rngs=nnx.Rngs(0))
    again = jax_nat.NeighborhoodAttention1D(8, 2, 5, attn_drop=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8)), jnp.float32)
    first, second = layer(x), layer(x)
    assert (first != second).any(), "each call draws anew"
    np.testing.assert_array_equal(first, again(x))
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    with pytest.raises(ValueError, match=r"drop rate 1.0 must be in \[0, 1\)"):
        jax_nat.NeighborhoodAttention1D(8, 2, 3, attn_drop=1.0, rngs=nnx.Rngs(0))


@pytest.mark.gpu
def test_on_a_gpu():
    """Everything above that has a kernel, on JAX's default device."""
    assert jax.default_backend() == "gpu"
    for case in SOME:
        arrays = unfused_inputs(case, "bfloat16")
        unfused_check(case, "bfloat16", arrays, unfused(case, arrays))
    for case in DROPOUT_CASES:
        x = inputs(case, "float32")
        check(case, "float32", x, with_dropout(case, x, jnp.uint32(case.dropout_seed)))
