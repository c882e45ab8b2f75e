"""What is compiled ahead for a model is what its blocks then ask for."""

from dataclasses import replace

import pytest
import torch

import natcore.backends.cuda
from natcore import backends
from natcore.models import NATConfig
from torch_nat import NAT, eager, launch, ops
from torch_nat.ahead import _prepare

NAT_ = NATConfig(16, (2, 1), (1, 2), mlp_ratio=1, kernel_size=3, dilations=((1, 3), (1,)), num_classes=3)
CONFIGS = {
    "nat": NAT_,
    "no bias, no padding": replace(NAT_, kernel_size=5, dilations=None, rel_pos_bias=False),
    "dinat_s": replace(NAT_, layout="dinat_s", num_heads=(2, 2)),
    "isotropic": replace(NAT_, depths=(2,), num_heads=(2,), dilations=None, layout="isotropic"),
}
REMEMBERED = (launch.prepare_forward, launch.prepare_backward, eager._recent, ops._recent, ops._recent_backward)
SIZES = {"isotropic": (64, 50)}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_calls_ahead_are_those_of_the_model(name: str, autocast: bool, trained: bool, monkeypatch):
    calls, prepare = set(), backends.prepare
    monkeypatch.setattr(backends, "prepare", lambda call, *rest: (calls.add(call), prepare(call, *rest))[1])
    for remembered in REMEMBERED:
        remembered.cache_clear()
    config = CONFIGS[name]
    model, images = NAT(config).train(trained), torch.randn(2, 3, *SIZES.get(name, (50, 29)))
    with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(images)
    if trained:
        out.float().sum().backward()
    assert calls
    loaded = set()
    monkeypatch.setattr(natcore.backends.cuda, "load_plan", lambda call, index, config: loaded.add(call))
    dtypes = (torch.bfloat16 if autocast else torch.float32, torch.float32)
    _prepare.__wrapped__(config, images.shape, dtypes, 0, trained or autocast, trained)
    assert loaded == calls


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
def test_a_forward_pass_finds_its_kernels_loaded(trained: bool):
    model = NAT(NAT_).cuda().train(trained)
    images = torch.randn(3, 3, 50, 29, device="cuda")
    problems = NAT_.attentions(3, 50, 29, "float32", "float32")
    before = natcore.backends.cuda.load_plan.cache_info().misses
    with torch.set_grad_enabled(trained):
        out = model(images)
    if trained:
        out.sum().backward()
    assert natcore.backends.cuda.load_plan.cache_info().misses - before == len(problems) * (2 if trained else 1)
