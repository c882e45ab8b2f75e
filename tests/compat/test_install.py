"""`install`: what `import natten` then finds, and what it leaves alone. In processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_nat.compat.natten.versions import RELEASES, release_of

#: Per version: names that it has and names that it has not, by which old code tells versions apart.
NAMES = {
    "0.14.4": (
        "NeighborhoodAttention functional.natten2dqkrpb functional.natten1dav natten2d.NeighborhoodAttention",
        "functional.natten2dqk NeighborhoodAttention3D has_cuda",
    ),
    "0.14.5": ("NeighborhoodAttention1D functional.natten2dav flops.get_flops", "functional.natten2dqk natten3d"),
    "0.14": (
        "NeighborhoodAttention1D NeighborhoodAttention2D functional.natten2dqkrpb functional.natten1dav "
        "flops.add_natten_handle natten2d.NeighborhoodAttention2D",
        "NeighborhoodAttention3D context has_cuda functional.na2d_qk functional.natten3dqk functional.na2d utils",
    ),
    "0.15": (
        "NeighborhoodAttention3D has_cuda enable_tf32 functional.na2d_qk_with_bias functional.natten3dqkrpb "
        "functional.na3d_av flops.get_flops utils.make_attn_tensor_from_input natten3d.NeighborhoodAttention3D "
        "utils.tensor.check_additional_keys utils.typing.NoneType natten1d.NeighborhoodAttention1D",
        "context use_fused_na functional.na2d libnatten types na2d",
    ),
    "0.17": (
        "context use_fused_na has_fused_na functional.na2d functional.na2d_qk functional.natten2dqkrpb na2d natten2d "
        "types.CausalArg2DType utils.get_num_na_weights experimental.na2d flops.fna_flop_count "
        "natten1d.NeighborhoodAttention1D natten3d.NeighborhoodAttention3D types.FnaBackwardConfigType",
        "use_flex_attention flex functional.na2d_qk_with_bias attention HAS_LIBNATTEN modules functional.attention",
    ),
    "0.17.5": (
        "context use_fused_na use_flex_attention functional.na3d_qk context.should_use_flex_attention na1d "
        "flops.get_flops flex.flex_na2d",
        "functional.natten2dqkrpb functional.natten2dav attention modules",
    ),
    "0.20.0": (
        "na1d attention merge_attentions HAS_LIBNATTEN modules.NeighborhoodAttention3D context.NattenContext "
        "types.KernelSchedule backends.choose_backend functional.neighborhood_attention_generic utils.checks",
        "functional.na2d_qk use_fused_na has_cuda natten2d flops utils.varlen attn_merge token_permute "
        "backends.can_run_cutlass_fna get_bwd_configs_for_cutlass_hopper_fna",
    ),
    "0.20": (
        "na1d attention modules.NeighborhoodAttentionGeneric backends.can_run_cutlass_fna utils.testing",
        "functional.na2d_qk use_fused_na utils.varlen utils.dtype get_bwd_configs_for_cutlass_hopper_fna",
    ),
    "0.21.1": (
        "na1d attention get_bwd_configs_for_cutlass_hopper_fna backends.can_run_flex_attention utils.dtype.is_fp8",
        "functional.na2d_qk use_fused_na utils.varlen token_permute",
    ),
    "0.21": (
        "na1d attention HAS_LIBNATTEN _environment.HAS_LIBNATTEN modules.NeighborhoodAttentionGeneric attn_merge "
        "utils.varlen.generate_varlen_parameters get_bwd_configs_for_cutlass_hopper_fna "
        "backends.configs.checks.can_run_cutlass_fna utils.testing.supports_bfloat16 attn_merge.merge_attentions "
        "backends.na2d_flex backends.reference.na3d_reference token_permute.token_permute_operation utils.tensor",
        "functional.natten2dqkrpb functional.na2d_qk has_cuda use_fused_na natten2d flops libnatten profiler",
    ),
}

PRELUDE = """
import importlib, importlib.metadata, importlib.util, sys

def has(name):
    *modules, last = name.split(".")
    try:
        module = importlib.import_module(".".join(["natten", *modules]))
    except ImportError:
        return False
    if hasattr(module, last):
        return True
    try:
        importlib.import_module(".".join(["natten", name]))
    except ImportError:
        return False
    return True
"""


def run(code: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_import_natten_finds_it():
    done = run("""
assert importlib.util.find_spec("natten") is None
from torch_nat.compat import natten as ours
assert ours.install() is True and ours.install("0.21.6", force=True) is True
assert "natten" not in sys.modules  # nothing is imported before it is asked for
spec = importlib.util.find_spec("natten")
assert spec.name == "natten" and spec.submodule_search_locations == [] and spec.origin.endswith("__init__.py")
assert importlib.metadata.version("natten") == "0.21.6"
assert "natten" in importlib.metadata.packages_distributions()

import natten
import natten.functional
from natten import NeighborhoodAttention2D, na2d
from natten.functional import neighborhood_attention_generic
from natten.utils.varlen import generate_varlen_parameters

assert natten.__version__ == "0.21.6" and natten.__spec__.name == natten.__name__ == "natten"
assert natten.__path__ == [] and natten.__file__ and natten.functional.__spec__.name == "natten.functional"
assert importlib.util.find_spec("natten.libnatten") is None
assert natten.utils.checks.check_kernel_size_arg(1, 3) == (3,)
assert natten.na2d is ours.na2d and natten.context.NattenContext is ours.context.NattenContext
assert importlib.util.find_spec("natten.functional") is not None
try:
    ours.install("0.17")
except RuntimeError as error:
    assert "0.21.6" in str(error)
else:
    raise AssertionError
import pickle, torch
layer = pickle.loads(pickle.dumps(NeighborhoodAttention2D(8, 2, 3)))
assert torch.equal(importlib.reload(natten).na2d(*[torch.ones(1, 4, 4, 1, 4)] * 3, 3), torch.ones(1, 4, 4, 1, 4))
""")
    assert done.stderr.count("`import natten` is answered by torch_nat") == 1, done.stderr


def test_each_version_has_its_names_and_no_others():
    code = (
        f"names = {NAMES!r}\n"
        + """
from torch_nat.compat.natten import install

for version, (present, absent) in names.items():
    assert install(version, force=True)
    import natten
    natten = importlib.import_module("natten")
    assert natten.__version__.startswith(version) and importlib.metadata.version("natten") == natten.__version__
    missing = [name for name in present.split() if not has(name)]
    surplus = [name for name in absent.split() if has(name)]
    assert not missing and not surplus, (version, missing, surplus)
"""
    )
    assert run(code).stderr.count("is answered by") == len(NAMES)


def test_whole_modules_pickled_under_old_natten_load():
    """Such a pickle names natten's classes and holds the attributes that natten gave them."""
    run("""
import pickle, torch
from torch_nat.compat.natten import install
install("0.15")
from natten.natten2d import NeighborhoodAttention2D

layer = NeighborhoodAttention2D(16, 2, 3).eval()
theirs = {"num_heads", "head_dim", "scale", "kernel_size", "dilation", "window_size", "training"}
assert theirs == {name for name in vars(layer) if not name.startswith("_")}, vars(layer).keys()
NeighborhoodAttention2D.__module__ = "natten.natten2d"
data = pickle.dumps(layer)
assert b"natten.natten2d" in data and b"torch_nat" not in data
x = torch.randn(1, 5, 5, 16)
assert torch.equal(pickle.loads(data)(x), layer(x))
""")


def test_a_real_natten_is_left_alone_unless_forced(tmp_path: Path):
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = 'real'\n", encoding="utf-8")
    done = run(
        """
from torch_nat.compat.natten import install
assert install() is False
import natten
assert natten.__version__ == "real"
assert install("0.20") is False and importlib.import_module("natten") is natten
assert install("0.20", force=True) is True
import natten
assert natten.__version__ == "0.20.1" and importlib.metadata.version("natten") == "0.20.1"
""",
        tmp_path,
    )
    assert "NATTEN itself is at" in done.stderr and "force=True" in done.stderr


def test_a_stand_in_in_sys_modules_counts_as_real():
    run("""
import types
sys.modules["natten"] = types.ModuleType("natten")
from torch_nat.compat.natten import install
assert install() is False and not hasattr(sys.modules["natten"], "na2d")
""")


def test_versions():
    assert {"0.14", "0.15", "0.17", "0.17.5", "0.20", "0.21"} <= set(RELEASES)
    for version in ("0.16", "0.21.2", "1"):
        with pytest.raises(ValueError, match=r"0\.20"):
            release_of(version)
