"""The peers that natcore is measured beside. Each is given its own favourite layout.

- sdpa: full self attention through torch's scaled_dot_product_attention. Same tensors, more keys.
- swin: blocked attention, windows of the row's kernel size. Same bytes, a cheaper pattern: windows do not overlap and
  are contiguous already. Through SDPA without a bias; with the relative position bias as Swin's own code writes it
  (products, softmax and sum one by one); and with that bias as SDPA's mask, which is slower.
- flex: compiled FlexAttention with the neighbourhood as its block mask. Same semantics, no bias.
- natten: NATTEN's fused kernels, the fastest of its backends. Same semantics, no bias.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import Axes, Row
from natcore.problem import Window
from natcore.reference import rpb_index


class Inputs(NamedTuple):
    """q, k, v and d_out of one row, heads last, and the bias table (None where the row has none)."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    rpb: Tensor | None

    @classmethod
    def random(cls, row: Row, dtype: str, device: torch.device, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        problem = row.problem(dtype)

        def draw(name: str) -> Tensor:
            kind = getattr(torch, problem.dtype_of(name))
            return torch.randn(problem.shapes[name], generator=generator, device=device, dtype=kind)

        rpb = draw("rpb") if row.rpb else None
        return cls(draw("q"), draw("k"), draw("v"), draw("d_out"), rpb)


class Bound(NamedTuple):
    """One implementation on one row's memory.

    ``forward`` returns out, ``both`` (forward, then backward) the gradients in the order of ``Inputs`` less d_out;
    ``heads_last`` brings out or the gradient of q, k or v back to the row's layout; ``kernel`` names what was chosen
    to run the forward, where that is known.
    """

    forward: Callable[[], Tensor]
    both: Callable[[], tuple[Tensor, ...]]
    heads_last: Callable[[Tensor], Tensor]
    kernel: str = ""


class Implementation(NamedTuple):
    """``applies`` says whether it can run a row at all; ``bind`` makes the callables."""

    name: str
    applies: Callable[[Row], bool]
    bind: Callable[[Row, Inputs], Bound]


def differentiable(
    attention: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """``attention(*inputs)`` without and with all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    plain = [x.detach() for x in inputs]

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(*plain)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*leaves), leaves, d_out)

    return forward, both


def _heads_first(x: Tensor) -> Tensor:
    """[batch, *spatial, heads, d] -> contiguous [batch, heads, tokens, d]."""
    return x.flatten(1, -3).transpose(1, 2).contiguous()


def _undo_heads_first(spatial: Axes) -> Callable[[Tensor], Tensor]:
    return lambda x: x.transpose(1, 2).unflatten(1, spatial)


def bind_sdpa(row: Row, inputs: Inputs) -> Bound:
    gqa, causal = bool(row.heads_kv), all(row.window.is_causal)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    tensors = [_heads_first(x) for x in inputs[:3]]
    return Bound(
        *differentiable(attention, tensors, _heads_first(inputs.d_out)),
        _undo_heads_first(row.spatial),
    )


def windows_of(x: Tensor, size: Axes) -> Tensor:
    """[batch, *spatial, heads, d] -> contiguous [batch * windows, heads, tokens of a window, d]."""
    rank = len(size)
    split = chain.from_iterable((n // w, w) for n, w in zip(x.shape[1:-2], size, strict=True))
    x = x.reshape(x.shape[0], *split, *x.shape[-2:])
    outer, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    x = x.permute(0, *outer, 2 * rank + 1, *inner, 2 * rank + 2)
    return x.reshape(-1, x.shape[rank + 1], prod(size), x.shape[-1]).contiguous()


def map_of(x: Tensor, size: Axes, spatial: Axes) -> Tensor:
    """Inverse of `windows_of`."""
    rank, counts = len(size), [n // w for n, w in zip(spatial, size, strict=True)]
    x = x.reshape(-1, *counts, x.shape[1], *size, x.shape[-1])
    axes = chain.from_iterable((1 + a, 2 + rank + a) for a in range(rank))
    return x.permute(0, *axes, rank + 1, 2 * rank + 2).reshape(-1, *spatial, x.shape[rank + 1], x.shape[-1])


def bind_swin(row: Row, inputs: Inputs, kind: str) -> Bound:
    """``kind``: "plain" (SDPA, no bias), "mask" (SDPA, the bias as its mask) or "written" (no SDPA, as Swin's code)."""
    size, gqa = row.window.kernel_size, bool(row.heads_kv)
    tensors = [windows_of(x, size) for x in inputs[:3]]
    index = torch.from_numpy(rpb_index(Window.of(row.rank, size), size)).to(inputs.q.device)

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        if table is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
        bias = table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()[None]
        if kind == "mask":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
        scores = (q * row.head_dim**-0.5) @ k.transpose(-2, -1)
        return (scores + bias).softmax(-1) @ v

    if kind != "plain":  # Swin keeps its table as [entries, heads] in the model's dtype
        table = inputs.q.new_zeros(row.heads, *row.window.rpb_shape) if inputs.rpb is None else inputs.rpb
        tensors.append(table.flatten(1).T.to(inputs.q.dtype).contiguous())
    return Bound(
        *differentiable(attention, tensors, windows_of(inputs.d_out, size)),
        lambda x: map_of(x, size, row.spatial),
    )


def _blocks_exactly(row: Row) -> bool:
    """Whether windows of the kernel's size tile the map, more than one of them."""
    sizes = zip(row.spatial, row.window.kernel_size, strict=True)
    plain = set(row.window.dilation) == {1} and not any(row.window.is_causal)
    return plain and all(n % k == 0 for n, k in sizes) and prod(row.window.kernel_size) < row.tokens


@dataclass(frozen=True)
class NeighborhoodMask:
    """FlexAttention's mask_mod for a window on a map, tokens in row-major order."""

    window: Window
    spatial: Axes

    def __call__(self, batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        visible, inner = None, prod(self.spatial)
        for axis, extent in enumerate(self.spatial):
            inner //= extent
            i, j = query // inner % extent, key // inner % extent
            on_axis = self._visible(axis, i, j, extent)
            visible = on_axis if visible is None else visible & on_axis
        assert visible is not None
        return visible

    def _visible(self, axis: int, i: Tensor, j: Tensor, extent: int) -> Tensor:
        w = self.window
        k, s, d, causal = w.kernel_size[axis], w.stride[axis], w.dilation[axis], w.is_causal[axis]
        length = extent if d == 1 else (extent - i % d + d - 1) // d
        p, n = i // d, j // d
        leader = _least(p // s * s + (s - 1 if causal else s // 2), length - 1)
        if causal:
            inside = (n > leader - k) & (n <= p)
        else:
            start = _least((leader - k // 2).clamp(min=0), length - k)
            inside = (n >= start) & (n < start + k)
        return inside if d == 1 else inside & (i % d == j % d)


def _least(x: Tensor, bound: int | Tensor) -> Tensor:
    return x.clamp(max=bound) if isinstance(bound, int) else torch.minimum(x, bound)


def block_mask(row: Row, device: torch.device, block: int = 128):
    """The BlockMask of a row, one row of blocks at a time: memory linear in the map, unlike create_block_mask."""
    from torch.nn.attention.flex_attention import BlockMask

    mask, tokens = NeighborhoodMask(row.window, row.spatial), row.tokens
    count = -(-tokens // block)
    keys = torch.arange(tokens, device=device)
    pairs = torch.zeros(count, count, dtype=torch.int32, device=device)
    for b in range(count):
        visible = mask(None, None, keys[b * block : (b + 1) * block, None], keys[None])
        visible = F.pad(visible.sum(0, dtype=torch.int32), (0, count * block - tokens))
        pairs[b] = visible.view(count, block).sum(1)
    full = pairs == block * block

    def compact(dense: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(dense.int(), dim=-1, descending=True, stable=True)
        return dense.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    partial = compact((pairs > 0) & ~full)
    return BlockMask.from_kv_blocks(
        *partial, *compact(full), BLOCK_SIZE=block, mask_mod=mask, seq_lengths=(tokens, tokens)
    )


def bind_flex(row: Row, inputs: Inputs) -> Bound:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # one specialisation per row, however many rows
    compiled = torch.compile(flex_attention, dynamic=False) if inputs.q.is_cuda else flex_attention
    mask, gqa = block_mask(row, inputs.q.device), bool(row.heads_kv)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=gqa)  # type: ignore[return-value]

    tensors = [_heads_first(x) for x in inputs[:3]]
    return Bound(
        *differentiable(attention, tensors, _heads_first(inputs.d_out)),
        _undo_heads_first(row.spatial),
    )


def bind_natten(row: Row, inputs: Inputs, backend: str) -> Bound:
    import natten  # type: ignore[import-not-found]

    na, w = getattr(natten, f"na{row.rank}d"), row.window
    window = {n: getattr(w, n) for n in ("kernel_size", "stride", "dilation", "is_causal")}
    attention = differentiable(lambda q, k, v: na(q, k, v, backend=backend, **window), list(inputs[:3]), inputs.d_out)
    return Bound(*attention, lambda x: x)


def _peers() -> dict[str, list[Implementation]]:
    """By the name that the command line knows; natten stands for its backends."""
    backends = ("cutlass-fna", "hopper-fna", "blackwell-fna")
    return {
        "sdpa": [Implementation("full self attention (SDPA)", lambda row: True, bind_sdpa)],
        "swin": [
            Implementation(name, applies, lambda row, inputs, kind=kind: bind_swin(row, inputs, kind))
            for name, applies, kind in (
                ("Swin windows through SDPA, no bias", _blocks_exactly, "plain"),
                (
                    "Swin windows as Swin is written, with bias",
                    lambda row: _blocks_exactly(row) and not row.heads_kv,
                    "written",
                ),
                ("Swin windows through SDPA, bias as its mask", _blocks_exactly, "mask"),
            )
        ],
        "natten": [
            Implementation(
                f"NATTEN {backend}", lambda row: True, lambda row, inputs, b=backend: bind_natten(row, inputs, b)
            )
            for backend in backends
        ],
        "flex": [Implementation("FlexAttention, compiled", lambda row: True, bind_flex)],
    }


PEERS = _peers()


def missing(peer: str) -> str | None:
    """Why a peer cannot run here at all."""
    return "natten is not importable" if peer == "natten" and importlib.util.find_spec("natten") is None else None
