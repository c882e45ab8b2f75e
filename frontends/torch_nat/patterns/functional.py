"""Self attention, shifted windows, stand-alone and halo attention as calls of na1d, na2d and na3d.

Shapes, as there: q ``[batch, *spatial, heads, head_dim]``, k and v alike with heads_kv heads (heads must be a
multiple of it; v may have its own head_dim), out ``[batch, *spatial, heads, head_dim_v]``. The number of
spatial axes, 1 to 3, is that of q. ``scale`` defaults to head_dim ** -0.5. Windows, shifts, blocks and halos
are an int or one per axis.

A bias is a table ``[heads, 2 * window - 1, ...]``, one entry per offset of a key from its query. What SASA and
HaloNet add in their papers, products of the query with learned embeddings of the offset, is not of that form and
not expressible here; both take the table instead, as the ablations of the NAT paper do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from natcore.window import per_axis
from torch_nat.functional import PerAxis, na1d, na2d, na3d

#: What a window that reaches over the border of the map finds there:
#: - "zeros": keys and values of zero, which take part in the softmax (zero padding after the projection);
#: - "mask": nothing: the softmax runs over the keys inside the map;
#: - "shift": the window moves inward and keeps its size: neighbourhood attention's own rule, and no copy.
Border = Literal["zeros", "mask", "shift"]

_FUNCTIONS: dict[int, Callable[..., Any]] = {1: na1d, 2: na2d, 3: na3d}
_MASK_CHANNELS = 8  # head_dim stays a multiple of 8 where it was one
_DEPTH = 2.0**15  # fits float16; a masked score is at most -8 * 2**30 * _SMALL_SCALE: its weight is 0 in float64
_SMALL_SCALE = 1e-6


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, rpb: Tensor | None = None) -> Tensor:
    """Attention of every token to every token (Vaswani et al., 2017; in vision, ViT: Dosovitskiy et al., ICLR 2021).

    The window is the whole map. A class token fits a sequence: one axis, of tokens + 1. ``rpb`` is
    ``[heads, 2 * extent - 1, ...]``.
    """
    return _attend(q, k, v, tuple(q.shape[1:-2]), 1, scale, rpb)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: PerAxis,
    shift: PerAxis = 0,
    *,
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> Tensor:
    """Swin's windows that do not overlap, W-MSA, and with a shift SW-MSA (Liu et al., ICCV 2021; 3-D: CVPR 2022).

    W-MSA is blocked attention: stride = kernel size = window. Swin computes SW-MSA by rolling the map by -shift,
    partitioning it, and masking what the roll has put side by side. What attends to what is then, on the map as it
    was: along each axis a strip of ``shift`` tokens, whole windows, and a strip of ``window - shift`` tokens.
    Each of these is blocked attention with windows of its own, read in place: neither a roll nor a mask.

    Args:
        q, k, v: as above.
        window_size: must divide the extent of each axis (`WindowAttention2D` pads).
        shift: from 0 to window - 1 on each axis; Swin's is window // 2 in every second block.
        scale: of q . k.
        rpb: ``[heads, 2 * window - 1, ...]``, key minus query; see `swin_rpb` for Swin's own tables.

    Raises:
        ValueError: for a window that does not divide the map, and for a shift outside of a window.
    """
    rank, spatial = _rank(q), q.shape[1:-2]
    window = per_axis("window_size", window_size, rank, int)
    shifts = per_axis("shift", shift, rank, int)
    for axis, (extent, size, start) in enumerate(zip(spatial, window, shifts, strict=True)):
        if size < 1 or extent % size:
            raise ValueError(
                f"window_size {size} does not divide extent {extent} on axis {axis} of the map {tuple(spatial)}: "
                "pad the map before the projection, as WindowAttention2D does, or choose another window."
            )
        if not 0 <= start < size:
            raise ValueError(f"shift {start} on axis {axis} must be at least 0 and less than window_size {size}.")
    return _blocked(q, k, v, window, shifts, (), scale, rpb)


def sasa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    border: Literal["zeros", "mask"] = "zeros",
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> Tensor:
    """Stand-alone self attention (Ramachandran et al., NeurIPS 2019): windows centred on their query everywhere.

    Query i sees the keys from i - kernel // 2 to i + (kernel - 1) // 2 of each axis, those over the border as
    ``border`` says (`Border`; the paper pads with zeros). The map is padded, attended to and cropped; it may be
    smaller than the window. ``rpb`` is ``[heads, 2 * kernel - 1, ...]``, of which centred windows use the middle.
    """
    kernel = per_axis("kernel_size", kernel_size, _rank(q), int)
    _check_positive("kernel_size", kernel)
    pads = [(size // 2, (size - 1) // 2) for size in kernel]
    return _bordered(q, k, v, kernel, 1, pads, border, scale, rpb)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: PerAxis,
    halo: PerAxis,
    *,
    border: Border = "zeros",
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> Tensor:
    """HaloNet's blocked local attention (Vaswani et al., CVPR 2021): a block of queries shares a window around it.

    All queries of a block see the block and ``halo`` tokens on each side of it: stride = block, kernel size =
    block + 2 * halo. With ``border`` "zeros" (the paper's) and "mask" this is exact everywhere, on a padded
    copy; with "shift" there is no copy, and the outermost blocks (those less than a halo from a border)
    see a window of the same size moved inward. A last partial block counts as a block that the border cuts.
    ``rpb`` is ``[heads, 2 * (block + 2 * halo) - 1, ...]``.

    Raises ValueError for a block < 1, a halo < 0 and, with "shift", a window larger than the map.
    """
    rank = _rank(q)
    blocks, halos = per_axis("block", block, rank, int), per_axis("halo", halo, rank, int)
    _check_positive("block", blocks)
    if min(halos) < 0:
        raise ValueError(f"halo is {halos}; it must be at least 0 on every axis.")
    kernel = tuple(b + 2 * h for b, h in zip(blocks, halos, strict=True))
    if border == "shift":
        return _attend(q, k, v, kernel, blocks, scale, rpb)
    # In front whole blocks, so that the map's own blocks stay where they are; behind, the rest of the last block.
    pads = [(-(-h // b) * b, -extent % b + h) for b, h, extent in zip(blocks, halos, q.shape[1:-2], strict=True)]
    return _bordered(q, k, v, kernel, blocks, pads, border, scale, rpb)


def swin_rpb(table: Tensor, window_size: Sequence[int]) -> Tensor:
    """Swin's ``relative_position_bias_table`` ``[(2 * w0 - 1) * ..., heads]`` as a table ``[heads, 2 * w0 - 1, ...]``.

    Swin's index is query minus key, the one here key minus query: every axis is turned round.
    """
    sides = [2 * size - 1 for size in window_size]
    return table.T.reshape(-1, *sides).flip(tuple(range(1, len(sides) + 1))).contiguous()


def _rank(q: Tensor) -> int:
    rank = q.dim() - 3
    if rank not in _FUNCTIONS:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [batch, 1 to 3 spatial axes, heads, head_dim].")
    return rank


def _check_positive(name: str, entries: tuple[int, ...]) -> None:
    if min(entries) < 1:
        raise ValueError(f"{name} is {entries}; it must be at least 1 on every axis.")


def _attend(q: Tensor, k: Tensor, v: Tensor, kernel: PerAxis, stride: PerAxis, scale: Any, rpb: Any) -> Tensor:
    return _FUNCTIONS[_rank(q)](q, k, v, kernel, stride=stride, scale=scale, rpb=rpb)


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, window: tuple, shifts: tuple, done: tuple, scale: Any, rpb: Tensor | None
) -> Tensor:
    """Cuts one axis into strip, windows and strip, and goes on with the next; ``done`` are the windows so far.

    `split` and `cat` undo each other in the backward, too: every gradient is written once.
    """
    axis = len(done)
    if axis == len(window):
        return _attend(q, k, v, done, done, scale, rpb)
    size, shift, extent = window[axis], shifts[axis], q.shape[1 + axis]
    if shift == 0:
        return _blocked(q, k, v, window, shifts, (*done, size), scale, rpb)
    parts = [(shift, shift), (extent - size, size), (size - shift, size - shift)]  # tokens, and windows of
    parts = [part for part in parts if part[0]]
    pieces = zip(*(x.split([length for length, _ in parts], dim=1 + axis) for x in (q, k, v)), strict=True)
    outs = []
    for (_, side), (q_part, k_part, v_part) in zip(parts, pieces, strict=True):
        # A smaller window has the smaller offsets: the middle of the table.
        table = None if rpb is None else rpb.narrow(1 + axis, size - side, 2 * side - 1)
        outs.append(_blocked(q_part, k_part, v_part, window, shifts, (*done, side), scale, table))
    return torch.cat(outs, dim=1 + axis)


def _bordered(
    q: Tensor, k: Tensor, v: Tensor, kernel: tuple, stride: PerAxis, pads: list, border: str, scale: Any, rpb: Any
) -> Tensor:
    """Attention on a map with ``pads`` (in front, behind) around it, such that no window of a query inside moves."""
    if border not in ("zeros", "mask"):
        raise ValueError(f"border {border!r} is not 'zeros' or 'mask' (or, for halo_attention, 'shift').")
    spatial = q.shape[1:-2]
    around = [0, 0, 0, 0, *(side for pair in reversed(pads) for side in pair)]  # the last axis first
    q, k, v = (F.pad(x, around) for x in (q, k, v))
    if border == "mask":
        scale = (q.shape[-1] ** -0.5) if scale is None else scale
        q, k, scale = _masked(q, k, scale, spatial, around)
    out = _attend(q, k, v, kernel, stride, scale, rpb)
    for axis, ((front, _), extent) in enumerate(zip(pads, spatial, strict=True)):
        out = out.narrow(1 + axis, front, extent)
    return out


def _masked(q: Tensor, k: Tensor, scale: float, spatial: Sequence[int], around: list) -> tuple[Tensor, Tensor, float]:
    """More channels, in which only keys of the padding differ from 0: their scores are so low that their weights are 0.

    Finite, because an infinite key would make NaN of its zero weight in the gradient of q.
    """
    if abs(scale) < _SMALL_SCALE:  # 0 included: the mask must count all the same
        q, scale = q * scale, 1.0
    flags = q.new_zeros(1, *spatial, 1, _MASK_CHANNELS)
    flags = F.pad(flags, around, value=-_DEPTH if scale > 0 else _DEPTH).expand(*k.shape[:-1], -1)
    return F.pad(q, (0, _MASK_CHANNELS), value=_DEPTH), torch.cat([k, flags], dim=-1), scale
