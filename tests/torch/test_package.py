"""What importing torch_nat needs and brings, in fresh processes."""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_without_torch_the_error_names_the_extra():
    result = run("import sys; sys.modules['torch'] = None\nimport torch_nat")
    assert result.returncode == 1
    assert "ImportError: torch_nat needs PyTorch: pip install 'natcore[torch]'" in result.stderr


def test_nothing_else_is_imported():
    code = (
        "import sys, torch; before = set(sys.modules); import torch_nat;"
        "names = {'jax', 'numba', 'cuda', 'triton', 'torch._dynamo', 'safetensors'};"
        "print(sorted(names & (set(sys.modules) - before)))"
    )
    result = run(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_public_names():
    import torch_nat

    names = {f"na{r}d{suffix}" for r in (1, 2, 3) for suffix in ("", "_qkvpacked")}
    names |= {f"NeighborhoodAttention{r}D" for r in (1, 2, 3)} | {"NAT", "create_model", "save", "load"}
    names |= {"published_state_dict", "merge_attentions"} | {
        f"na{r}d_{step}" for r in (1, 2, 3) for step in ("qk", "av")
    }
    assert set(torch_nat.__all__) == names
    assert all(callable(getattr(torch_nat, name)) for name in names)
