"""Arrays of tests/cases.py as tensors and back, and one run through the public functions."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import torch_nat
from natcore.models import NATConfig
from tests.cases import Case

FUNCTIONS = {1: torch_nat.na1d, 2: torch_nat.na2d, 3: torch_nat.na3d}
PACKED = {1: torch_nat.na1d_qkvpacked, 2: torch_nat.na2d_qkvpacked, 3: torch_nat.na3d_qkvpacked}
OPTIONAL = ("rpb", "additional_keys", "additional_values")
INPUTS = ("q", "k", "v", *OPTIONAL)


def to_torch(x: np.ndarray, device: str = "cpu") -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(x).to(device)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()


def tensors_of(arrays: dict[str, np.ndarray], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Every array as a tensor of the same layout; the inputs require gradients."""
    tensors = {name: to_torch(x, device) for name, x in arrays.items()}
    return {name: t.requires_grad_() if name in INPUTS else t for name, t in tensors.items()}


@contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """torch.cuda.graph, while which nothing is destroyed that earlier tests left in reference cycles: what destroys a
    graph or unloads a module, in any thread, ends the capture. Since torch 2.9 torch.cuda.graph collects no garbage."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        if was_enabled:
            gc.enable()


class Looking(TorchFunctionMode):
    """Does nothing but look on, which sends a call through the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def randomized(config: NATConfig) -> torch_nat.NAT:
    """Every parameter drawn, so that none hides behind its initial 0 or 1."""
    torch.manual_seed(0)
    model = torch_nat.NAT(config).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def gradient_name(name: str) -> str:
    return "d_" + name if name.startswith("additional") else "d" + name


def run(case: Case, tensors: dict[str, torch.Tensor], function: Any = None) -> dict[str, np.ndarray]:
    """out, lse and every gradient, by the names of `tests.cases.expected`."""
    function = function or FUNCTIONS[case.rank]
    optional = {name: tensors[name] for name in OPTIONAL if name in tensors}
    q, k, v = (tensors[name] for name in "qkv")
    out, lse = function(q, k, v, **case.call_arguments, **optional, return_lse=True)
    given = {name: tensors[name] for name in INPUTS if name in tensors}
    gradients = torch.autograd.grad((out, lse), tuple(given.values()), (tensors["d_out"], tensors["d_lse"]))
    named = zip(map(gradient_name, given), gradients, strict=True)
    return {name: to_numpy(t) for name, t in [("out", out), ("lse", lse), *named]}
