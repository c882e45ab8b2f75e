"""jax_nat on a GPU: values, gradients, command buffers, threads, caches of fresh processes, whole models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_nat
from natcore.problem import GRADIENTS
from tests.cases import CASES, check, inputs
from tests.family import OF_EVERY_LAYOUT
from tests.jax.test_functional import CASE, _packed, function, operands, results
from tests.jax.test_programs import python, run_exported

pytestmark = pytest.mark.gpu
SOME = ["nat_block", "gqa", "mqa", "causal_mix", "video", "additional_keys", "empty_batch"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case):
    arrays = inputs(case, "float32")
    check(case, "float32", arrays, results(case, arrays, jax.jit))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SOME)
def test_16_bit(name, dtype):
    arrays = inputs(CASE[name], dtype)
    check(CASE[name], dtype, arrays, results(CASE[name], arrays))


def test_float64():
    with jax.enable_x64(True):
        arrays = inputs(CASE["nat_block"], "float64")
        check(CASE["nat_block"], "float64", arrays, results(CASE["nat_block"], arrays))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["nat_packed", "causal_stride", "video", "single_token", "empty_batch"])
def test_packed(name, dtype):
    case = CASE[name]
    arrays = inputs(case, dtype)
    qkv, optional, attend = _packed(case, arrays)
    (out, lse), pullback = jax.vjp(lambda qkv, optional: attend(qkv, **optional), qkv, optional)
    d_qkv, gradients = pullback((jnp.asarray(arrays["d_out"]), jnp.asarray(arrays["d_lse"])))
    actual = {"out": out, "lse": lse} | {GRADIENTS[n]: g for n, g in gradients.items()}
    check(case, dtype, arrays, actual | {f"d{n}": d_qkv[..., i, :, :] for i, n in enumerate("qkv")})


def test_vmap_with_a_bias_table_each():
    case = CASE["nat_block"]
    many = [operands(inputs(case, "float32", seed)) for seed in range(3)]
    stacked = {name: jnp.stack([x[name] for x in many]) for name in many[0]}
    gradient = jax.grad(lambda a: jnp.sum(jnp.sin(function(case)(a)[0])))
    actual = jax.jit(jax.vmap(gradient))(stacked)
    for i, single in enumerate(many):
        for name, wanted in gradient(single).items():
            np.testing.assert_allclose(actual[name][i], wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


#: A chain long enough for XLA to capture it as a command buffer (a CUDA graph), run on changing inputs.
_CHAIN = """
import sys
import jax, jax.numpy as jnp, numpy as np, jax_nat
from tests.cases import Case, check, inputs
case = Case("chain", (16, 16), 5, heads=2, heads_kv=2, head_dim=32, head_dim_v=32, rpb="float32", batch=2)
arrays = inputs(case, "float32")
q, k, v, rpb = (jnp.asarray(arrays[n]) for n in ("q", "k", "v", "rpb"))
def chain(q, k, v, rpb):
    for _ in range(8):
        q = 0.5 * q + jax_nat.na2d(q, k, v, 5, rpb=rpb)
    return q
step = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(chain(*x))), argnums=(0, 1, 2, 3)))
results = []
for turn in range(4):
    results.append(jax.tree.map(np.asarray, step(q + turn, k, v, rpb)))
again = jax.tree.map(np.asarray, step(q + 1, k, v, rpb))
for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(results[1])):
    np.testing.assert_array_equal(a, b)
donating = jax.jit(chain, donate_argnums=0)
for turn in range(3):
    np.testing.assert_array_equal(np.asarray(donating(jnp.array(q), k, v, rpb)), np.asarray(chain(q, k, v, rpb)))
np.savez(sys.argv[1], *jax.tree.leaves(results))
"""


def test_command_buffers_change_nothing(tmp_path):
    dump = tmp_path / "dump"
    with_graphs = (
        f"--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=2 --xla_dump_to={dump}"
    )
    python(_CHAIN, tmp_path / "on.npz", XLA_FLAGS=with_graphs)
    python(_CHAIN, tmp_path / "off.npz", XLA_FLAGS="--xla_gpu_enable_command_buffer=")
    with np.load(tmp_path / "on.npz") as on, np.load(tmp_path / "off.npz") as off:
        assert len(on.files) == 20
        for name in on.files:
            np.testing.assert_allclose(on[name], off[name], rtol=1e-5, atol=1e-5, err_msg=name)
    thunks = [path.read_text() for path in dump.glob("*jit_chain.thunk_sequence_after_thunk_passes.txt")]
    assert thunks
    assert all("commandbuffer" in text.lower().replace("_", "") for text in thunks), thunks


def test_many_threads_with_streams_of_their_own():
    case = CASE["nat_block"]
    compiled = jax.jit(function(case))
    problems = [inputs(case, "float32", seed) for seed in range(8)]

    def work(arrays):
        return [compiled(operands(arrays)) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for arrays, answers in zip(problems, pool.map(work, problems), strict=True):
            for out, lse in answers[::7]:
                check(case, "float32", arrays, {"out": np.asarray(out), "lse": np.asarray(lse)})


_CACHED = """
import sys, numpy as np, jax, jax.numpy as jnp, jax_nat
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
from jax_nat import native
calls = []
prepare = native._add
native._add = lambda spec, device: (calls.append(spec), prepare(spec, device))
q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 9, 2, 8)), jnp.float32)
@jax.jit
def gradient(q):
    return jax.grad(lambda q: sum(jnp.sum(jnp.sin(jax_nat.na2d(q, q, q, k))) for k in (3, 5, 7, 9)))(q)
first = np.asarray(gradient(q))
assert (np.asarray(gradient(q)) == first).all()
assert jax.devices()[0].platform == "gpu"
print(len(hits), len(calls), first.tobytes().hex())
"""


@pytest.mark.parametrize("flags", ["", "--xla_gpu_enable_command_buffer="], ids=["graphs", "no_graphs"])
def test_a_hit_in_the_persistent_cache_runs_in_a_fresh_process(tmp_path, flags):
    """There XLA never instantiates the calls: the first execution, maybe inside a capture, must prepare them."""
    (first_hits, _, first), (second_hits, calls, second) = (
        python(_CACHED, tmp_path, XLA_FLAGS=flags).split() for _ in range(2)
    )
    assert int(second_hits) > int(first_hits)
    assert int(calls) > 0
    assert second == first


def test_an_exported_program_runs_in_a_fresh_process(tmp_path):
    run_exported(tmp_path, "assert jax.devices()[0].platform == 'gpu'", platforms=["cpu", "cuda"])


def test_the_execute_stage_is_native():
    from jax_nat import native, numba_handler

    native.execute_stage()
    assert [handler.address for handler in numba_handler._forever].count(native.execute_stage()) == 1


@pytest.mark.parametrize("name", OF_EVERY_LAYOUT)
def test_logits_equal_torch(name, tmp_path):
    torch = pytest.importorskip("torch")
    import torch_nat
    from tests.jax.test_models import agree, forward, images, randomise

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = randomise(torch_nat.create_model(name))
    torch_nat.save(model, tmp_path / "model")
    x = images((224, 224), batch=2)
    with torch.no_grad():
        wanted = model.cuda()(torch.from_numpy(x).cuda().permute(0, 3, 1, 2)).cpu()
    loaded = jax_nat.load(tmp_path / "model")
    with jax.default_matmul_precision("highest"):
        agree(forward(loaded, x), wanted)


def test_a_training_step_in_bfloat16(tmp_path):
    pytest.importorskip("torch")
    import torch_nat
    from tests.jax.test_models import SMALL, agree, images, randomise

    torch_nat.save(randomise(torch_nat.NAT(SMALL)), tmp_path / "model")
    loss = nnx.jit(nnx.value_and_grad(lambda m, x: jnp.mean(m(x).astype(jnp.float32) ** 2)))
    x = images((64, 64), batch=4)
    mixed, exact = (loss(jax_nat.load(tmp_path / "model", dtype=dtype), x) for dtype in (jnp.bfloat16, None))
    agree(mixed[0], exact[0], 0.1)
    pairs = zip(nnx.to_flat_state(mixed[1]), nnx.to_flat_state(exact[1]), strict=True)
    tables = [(a[...], b[...]) for (place, a), (_, b) in pairs if "rpb" in place]
    assert len(tables) == sum(SMALL.depths)
    for actual, wanted in tables:
        agree(actual, wanted, 0.1)
