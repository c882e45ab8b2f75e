"""Token permutation in torch's own operations, differentiable. torch_nat's kernels read maps as they lie."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.nn import functional as F

from torch_nat.compat.natten.v0_21.utils.tuples import ceil_div_tuple, mul_tuple

Tile = tuple[int, ...]


def token_permute_operation(
    tensor: Tensor,
    tile_shape: Tile,
    dilation: Tile | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = False,
) -> tuple[Tensor, Tile, Tile]:
    """``[batch, *spatial, heads, dim]`` to ``[batch * prod(dilation), tokens, heads, dim]``, tile by tile.

    Every axis is padded with zeros at its end to whole tiles of each dilation group. A group is a batch
    entry of its own; its tiles follow each other, and the tokens of a tile, in row-major order or, with
    ``flip_tiled_dims``, with the first axis fastest. ``use_torch`` chooses no result.

    Returns:
        The tokens, the size of the map, and the padded size of one dilation group's.

    Raises:
        ValueError: unless there are 1 to 3 spatial axes, and a tile shape and dilation of as many.
    """
    rank = tensor.dim() - 3
    if rank not in (1, 2, 3):
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}; expected 4, 5 or 6 axes, heads last.")
    dilation = _checked(rank, tile_shape, dilation)
    batch, *spatial, heads, dim = tensor.shape
    rest = _tiles(spatial, tile_shape, dilation)
    padded = mul_tuple(mul_tuple(rest, tile_shape), dilation)
    missing = [
        pad for full, extent in zip(reversed(padded), reversed(spatial), strict=True) for pad in (0, full - extent)
    ]
    split = [extent for axis in zip(rest, tile_shape, dilation, strict=True) for extent in axis]
    tiled = F.pad(tensor, (0, 0, 0, 0, *missing)).reshape(batch, *split, heads, dim)
    tokens = tiled.permute(_order(rank, flip_tiled_dims)).reshape(batch * prod(dilation), -1, heads, dim)
    return tokens.contiguous(), tuple(spatial), mul_tuple(rest, tile_shape)


def token_unpermute_operation(
    tensor: Tensor,
    token_layout_shape: Tile,
    tile_shape: Tile,
    dilation: Tile | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = False,
) -> Tensor:
    """The inverse of `token_permute_operation`: ``[batch, *token_layout_shape, heads, dim]``, the padding cut off.

    Raises ValueError for a tensor that does not hold the tokens of such a map.
    """
    rank = len(token_layout_shape)
    if rank not in (1, 2, 3):
        raise ValueError(f"token_layout_shape is {token_layout_shape}; expected 1 to 3 axes.")
    dilation = _checked(rank, tile_shape, dilation)
    rest = _tiles(token_layout_shape, tile_shape, dilation)
    groups, tokens = prod(dilation), prod(mul_tuple(rest, tile_shape))
    if tensor.dim() != 4 or tensor.shape[1] != tokens or tensor.shape[0] % groups:
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)}; expected [a multiple of {groups}, {tokens}, heads, dim] for a "
            f"map of {tuple(token_layout_shape)} in tiles of {tuple(tile_shape)} with dilation {dilation}."
        )
    order = _order(rank, flip_tiled_dims)
    split = [extent for axis in zip(rest, tile_shape, dilation, strict=True) for extent in axis]
    batch, heads, dim = tensor.shape[0] // groups, tensor.shape[2], tensor.shape[3]
    sizes = [batch, *split, heads, dim]
    tiled = tensor.reshape([sizes[axis] for axis in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    out = tiled.permute(inverse).reshape(batch, *mul_tuple(mul_tuple(rest, tile_shape), dilation), heads, dim)
    for axis, extent in enumerate(token_layout_shape, 1):
        out = out.narrow(axis, 0, extent)
    return out.contiguous()


def _checked(rank: int, tile_shape: Sequence[int], dilation: Sequence[int] | None) -> Tile:
    """The dilation. Raises ValueError for another number of axes."""
    dilation = (1,) * rank if dilation is None else tuple(dilation)
    if len(tile_shape) != rank or len(dilation) != rank or min(*tile_shape, *dilation) < 1:
        raise ValueError(f"tile_shape {tuple(tile_shape)} and dilation {dilation}: expected {rank} integers >= 1 each.")
    return dilation


def _tiles(spatial: Sequence[int], tile_shape: Sequence[int], dilation: Tile) -> Tile:
    """How many tiles each axis of a dilation group's map has."""
    return ceil_div_tuple(ceil_div_tuple(tuple(spatial), tuple(tile_shape)), dilation)


def _order(rank: int, flip: bool) -> list[int]:
    """Of [batch, (tile, place in it, dilation group) of each axis, heads, dim]: groups, then tiles, then places."""
    axes = range(rank)[::-1] if flip else range(rank)
    moved = [3 * axis + 1 + part for part in (2, 0, 1) for axis in axes]
    return [0, *moved, 3 * rank + 1, 3 * rank + 2]
