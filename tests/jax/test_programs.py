"""Programs that outlive a process, or meet another platform: caches, exports, meshes, missing packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nat
from jax_nat import handler

ROOT = Path(__file__).resolve().parents[2]
SAFE = [jax.export.DisabledSafetyCheck.custom_call(jax_nat.TARGET)]


def python(code: str, *arguments: object, **environment: str) -> str:
    """The output of a fresh interpreter that can import this project."""
    paths = [str(ROOT), str(ROOT / "frontends"), os.environ.get("PYTHONPATH", "")]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


_CACHED = """
import sys, numpy as np, jax, jax.numpy as jnp, jax_nat
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 9, 2, 8)), jnp.float32)
@jax.jit
def gradient(q):
    return jax.grad(lambda q: jnp.sum(jnp.sin(jax_nat.na2d(q, q, q, 3))))(q)
print(len(hits), np.asarray(gradient(q)).tobytes().hex())
"""


def test_a_hit_in_the_persistent_cache_runs_in_a_fresh_process(tmp_path):
    environment = {"JAX_PLATFORMS": "cpu"}
    (first_hits, first), (second_hits, second) = (python(_CACHED, tmp_path, **environment).split() for _ in range(2))
    assert int(second_hits) > int(first_hits)
    assert second == first


_EXPORTED = """
import sys, numpy as np, jax, jax.export, jax_nat
with open(sys.argv[1], "rb") as file:
    exported = jax.export.deserialize(file.read())
with np.load(sys.argv[2]) as arrays:
    np.save(sys.argv[3], exported.call(arrays["q"], arrays["rpb"]))
"""


def run_exported(tmp_path: Path, checks: str = "", **how) -> None:
    """Exports a program, says ``how`` to jax.export, and runs it with ``checks`` in a fresh process."""
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    rng = np.random.default_rng(0)
    q, rpb = (rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 9, 2, 8), (2, 5, 5)))

    def f(q, rpb):
        return jax_nat.na2d(q, q, q, 3, rpb=rpb, scale=0.3)

    exported = jax.export.export(jax.jit(f), **how, disabled_checks=SAFE)(q, rpb)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays.npz", q=q, rpb=rpb)
    python(_EXPORTED + checks, tmp_path / "program", tmp_path / "arrays.npz", tmp_path / "out.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), f(q, rpb))


def test_an_exported_program_runs_in_a_fresh_process(tmp_path):
    run_exported(tmp_path)


def test_a_program_for_cuda_is_made_without_a_gpu():
    q = jnp.zeros((2, 9, 9, 3, 2, 8), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda q: jax_nat.na2d_qkvpacked(q, 3).sum().astype("float32")))
    exported = jax.export.export(gradient, platforms=["cpu", "cuda"], disabled_checks=SAFE)(q)
    assert exported.platforms == ("cpu", "cuda")
    assert exported.mlir_module().count(jax_nat.TARGET) == 4  # forward and backward, on each platform


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jax_nat
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((4, 9, 9, 2, 8)), jnp.float32) for _ in range(3))
rpb = jnp.asarray(rng.standard_normal((2, 5, 5)), jnp.float32)
attend = lambda q, k, v, rpb: jax_nat.na2d(q, k, v, 3, rpb=rpb)
sharded = jax.shard_map(attend, mesh=mesh, in_specs=(P("data"),) * 3 + (P(),), out_specs=P("data"))
loss = lambda f: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2, 3)))
for a, b in zip(jax.tree.leaves(loss(sharded)(q, k, v, rpb)), jax.tree.leaves(loss(attend)(q, k, v, rpb))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
batch = jax.NamedSharding(mesh, P("data"))
placed = [jax.device_put(x, batch) for x in (q, k, v)]
np.testing.assert_allclose(jax.jit(attend)(*placed, rpb), attend(q, k, v, rpb), rtol=1e-5, atol=1e-5)
print(len(jax.devices()), jax.typeof(rpb).shape)
"""


def test_shard_map_over_the_batch():
    flags = "--xla_force_host_platform_device_count=2"
    assert python(_SHARDED, JAX_PLATFORMS="cpu", XLA_FLAGS=flags).startswith("2 ")


_EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np, jax_nat
from jax.sharding import PartitionSpec as P
q = jnp.asarray(np.random.default_rng(0).standard_normal((4, 9, 9, 2, 8)), jnp.float32)
value_and_grad = jax.jit(jax.value_and_grad(lambda q: jnp.sum(jnp.sin(jax_nat.na2d(q, q, q, 3)))))
value, gradient = value_and_grad(q)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
with jax.set_mesh(mesh):
    sharded = jax.device_put(q, jax.NamedSharding(mesh, P("data")))
    sharded_value, sharded_gradient = value_and_grad(sharded)
assert jax.typeof(sharded_gradient).sharding.spec[0] == "data"
np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-5, atol=1e-5)
"""


def test_a_mesh_with_explicit_axes():
    python(_EXPLICIT, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")


_LEAVING = """
import jax, jax.numpy as jnp, jax_nat
q = jnp.ones((8, 56, 56, 2, 32))
f = jax.jit(lambda q: sum(jax_nat.na2d(q, q, q, k) for k in (7, 11, 13)))
f(q).block_until_ready()
for _ in range(4):
    f(q)
print("leaving")
"""


def test_the_interpreter_ends_while_work_is_in_flight():
    """XLA's threads, which call into Python, must not wait for an interpreter that is going away."""
    for _ in range(3):
        assert python(_LEAVING, JAX_PLATFORMS="cpu") == "leaving\n"


@pytest.mark.parametrize("missing", ["jax", "flax"])
def test_without_jax_the_import_names_the_extra(missing):
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\ntry:\n    import jax_nat\nexcept ImportError as e:\n    print(e)"
    )
    assert "pip install 'natcore[jax]'" in python(code)


def test_failures_while_running_become_xla_errors():
    out = jax.ShapeDtypeStruct((1,), jnp.float32)
    call = jax.ffi.ffi_call(handler.TARGET, out)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"natcore: .*compiled by another version"):
        jax.jit(lambda: call(key=np.int64(1), spec='{"schema": 0}'))()


def test_the_key_is_the_first_attribute():
    """Native code takes it by position; XLA sorts attributes by name."""
    assert sorted(["spec", "key"]).index("key") == handler._KEY
