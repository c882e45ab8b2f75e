"""Multiply-accumulates: the published figures, closed forms, and operations of other models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import torch_nat
from tests.family import ROWS
from torch_nat import flops

#: In G at 224x224, with and without norms.
PUBLISHED = {
    "nat_mini": ("2.713", "2.697"),
    "nat_tiny": ("4.321", "4.298"),
    "nat_small": ("7.811", "7.777"),
    "nat_base": ("13.728", "13.683"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str):
    counts = flops.count_named(name)
    total = sum(counts.values())
    assert (f"{total / 1e9:.3f}", f"{(total - counts['norm']) / 1e9:.3f}") == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in ROWS if name not in PUBLISHED])
def test_figures_of_the_papers(name: str):
    """One decimal, which the papers round or cut."""
    assert abs(sum(flops.count_named(name, ROWS[name].size).values()) / 1e9 - ROWS[name].gmacs) < 0.1


@pytest.mark.parametrize(("name", "keys"), [("dinat_isotropic_small", 49), ("vit_rpb_small", 196)])
def test_closed_form_of_one_stage(name: str, keys: int):
    tokens, width, depth = 196, 384, 12
    assert flops.count_named(name) == {
        "linear": depth * tokens * (4 + 8) * width**2 + 1000 * width,
        "convolution": tokens * 3 * 16**2 * width,
        "attention": depth * tokens * 2 * keys * width,
        "rpb": depth * tokens * 12 * keys,
        "norm": 5 * tokens * width * (2 + 2 * depth),
        "pool": tokens * width,
        "resize": 0,
    }


def test_a_padded_map_counts_with_its_padding():
    """Stage 3 sees 5 x 5 tokens at 160: its linear layers before and in attention run on 7 x 7."""
    at_160 = flops.count_named("nat_mini", 160)["attention"]
    assert at_160 == 2 * 49 * 32 * (3 * 2 * 40**2 + 4 * 4 * 20**2 + 6 * 8 * 10**2 + 5 * 16 * 7**2)


def test_other_operations():
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 2, stride=2))
    empty = dict.fromkeys(flops.KINDS, 0)
    x = torch.randn(2, 4, 5, 5)
    transposed = 2 * 9 * 8 * 6 * 4
    assert flops.count(conv.eval(), x) == empty | {"convolution": 2 * 9 * 8 * 18 + transposed, "norm": 2 * 2 * 9 * 8}
    assert flops.count(conv.train(), x)["norm"] == 5 * 2 * 9 * 8
    assert flops.count(nn.GroupNorm(2, 4, affine=False), x)["norm"] == 4 * x.numel()
    assert flops.count(nn.AdaptiveAvgPool2d(2), x)["pool"] == x.numel()
    assert flops.count(nn.Upsample(scale_factor=2), x)["resize"] == 4 * x.numel()
    assert flops.count(nn.Upsample(scale_factor=3, mode="bilinear"), x)["resize"] == 4 * 9 * x.numel()
    dense = nn.MultiheadAttention(8, 2).eval()
    tokens = torch.randn(6, 3, 8)
    counts = flops.count(dense, tokens, tokens, tokens)
    assert counts["linear"] + counts["attention"] == 18 * 4 * 64 + 3 * 2 * 36 * 4 * 2


def test_unpacked_attention_with_everything():
    class Attention(nn.Module):
        def forward(self, q, k, v, rpb, keys, values):
            return torch_nat.na1d(q, k, v, 3, rpb=rpb, additional_keys=keys, additional_values=values)

    q, kv, extra = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 5, 2, 8)
    counts = flops.count(Attention(), q, kv, kv, torch.randn(4, 5), extra, extra)
    assert counts["attention"] == 2 * 9 * 4 * (3 + 5) * 16
    assert counts["rpb"] == 2 * 9 * 4 * 3


def test_the_unfused_form_counts_as_the_fused_one():
    class Attention(nn.Module):
        def forward(self, q, k, v, rpb, keys, values):
            scores = torch_nat.na2d_qk(q, k, (3, 2), rpb=rpb, additional_keys=keys)
            return torch_nat.na2d_av(scores.softmax(-1), v, (3, 2), additional_values=values)

    q, kv, extra = torch.randn(2, 9, 5, 4, 8), torch.randn(2, 9, 5, 2, 8), torch.randn(2, 5, 2, 8)
    counts = flops.count(Attention(), q, kv, kv, torch.randn(4, 5, 3), extra, extra)
    assert counts["attention"] == 2 * 45 * 4 * (6 + 5) * 16
    assert counts["rpb"] == 2 * 45 * 4 * 6


def test_an_operation_without_a_rule_is_no_zero(monkeypatch):
    monkeypatch.delitem(flops._RULES, torch.ops.natcore.attention_packed)
    with pytest.raises(NotImplementedError, match=r"no rule counts natcore\.attention_packed"):
        flops.count_named("nat_mini")


def test_command_line():
    command = [sys.executable, "-m", "torch_nat.flops", "nat_tiny", "--size", "224"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "27,901,582 parameters" in ran.stdout
    lines = {line[:20].strip(): line.split()[-2] for line in ran.stdout.splitlines()[1:]}
    assert (lines["total"], lines["total without norms"]) == PUBLISHED["nat_tiny"]
