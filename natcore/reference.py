"""The definition of neighbourhood attention: dense masks in NumPy float64, forward and backward.

No cleverness: everything else is tested against this file. Cost grows with the square of the map.

Shapes: q `[batch, *spatial, heads, head_dim]`, k and v alike with heads_kv heads (v may have its
own head_dim), rpb `[heads, 2*k0 - 1, ...]`, additional keys and values
`[batch, extra, heads_kv, head_dim]`. Neighbourhoods follow Hassani et al., "Neighborhood Attention
Transformer" (CVPR 2023) and, for dilation, "Dilated Neighborhood Attention Transformer" (2022).
"""

from __future__ import annotations

import numpy as np

from natcore.problem import Gradients, Window


def neighborhood(query: int, extent: int, kernel: int, stride: int, dilation: int, causal: bool) -> tuple[int, int]:
    """The key indices [start, end), within the query's dilation group, that it sees on one axis."""
    group, p = query % dilation, query // dilation
    length = (extent - group + dilation - 1) // dilation
    if causal:
        leader = min((p // stride) * stride + stride - 1, length - 1)
        return max(leader - kernel + 1, 0), min(p + 1, length)
    center = min((p // stride) * stride + stride // 2, length - 1)
    start = min(max(center - kernel // 2, 0), length - kernel)
    return start, start + kernel


def axis_mask(extent: int, kernel: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    mask = np.zeros((extent, extent), bool)  # [query, key]
    for i in range(extent):
        start, end = neighborhood(i, extent, kernel, stride, dilation, causal)
        for j in range(i % dilation, extent, dilation):
            mask[i, j] = start <= j // dilation < end
    return mask


def window_mask(window: Window, spatial: tuple[int, ...]) -> np.ndarray:
    """bool [queries, keys], both in row-major order of the map: the AND over the axes."""
    window.check_fits(spatial)
    mask = np.ones((1, 1), bool)
    axes = zip(spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True)
    for extent, kernel, stride, dilation, causal in axes:
        mask = np.kron(mask, axis_mask(extent, kernel, stride, dilation, causal))
    return mask


def rpb_index(window: Window, spatial: tuple[int, ...]) -> np.ndarray:
    """int [queries, keys]: the flat entry of a head's RPB table; only meaningful under the mask."""
    index = np.zeros((1, 1), int)
    for extent, kernel, dilation in zip(spatial, window.kernel_size, window.dilation, strict=True):
        place = np.arange(extent) // dilation
        entry = np.clip(place[None, :] - place[:, None] + kernel - 1, 0, 2 * kernel - 2)
        index = np.kron(index, np.ones_like(entry)) * (2 * kernel - 1) + np.kron(np.ones_like(index), entry)
    return index


def _heads_first(x: np.ndarray, heads: int, dtype: type) -> np.ndarray:
    """[batch, *tokens, heads_kv, d] -> [batch, heads, tokens, d], kv heads repeated for GQA."""
    x = np.asarray(x, dtype=dtype)
    x = np.moveaxis(x.reshape(x.shape[0], int(np.prod(x.shape[1:-2])), *x.shape[-2:]), -2, 1)
    return np.repeat(x, heads // x.shape[1], axis=1)


def _heads_last(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `_heads_first`: the heads of a GQA group are summed."""
    batch, heads, tokens, d = x.shape
    grouped = x.reshape(batch, shape[-2], heads // shape[-2], tokens, d).sum(axis=2)
    return np.moveaxis(grouped, 1, -2).reshape(shape)


def _probabilities(q, k, window, scale, rpb, additional_keys, dtype):
    """Softmax weights [batch, heads, queries, keys + extra] and the LSE [batch, heads, queries]."""
    spatial, heads = q.shape[1:-2], q.shape[-2]
    scores = scale * (_heads_first(q, heads, dtype) @ _heads_first(k, heads, dtype).swapaxes(-1, -2))
    if rpb is not None:
        table = np.asarray(rpb, dtype=dtype).reshape(heads, -1)
        scores = scores + table[:, rpb_index(window, spatial)]
    scores = np.where(window_mask(window, spatial), scores, -np.inf)
    if additional_keys is not None:
        extra = scale * (_heads_first(q, heads, dtype) @ _heads_first(additional_keys, heads, dtype).swapaxes(-1, -2))
        scores = np.concatenate([scores, extra], axis=-1)
    top = scores.max(axis=-1, keepdims=True)
    lse = top + np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
    return np.exp(scores - lse), lse[..., 0]


def _values(v, additional_values, heads, dtype):
    tokens = [x for x in (v, additional_values) if x is not None]
    return np.concatenate([_heads_first(x, heads, dtype) for x in tokens], axis=2)


def forward(
    q, k, v, window: Window, *, scale: float | None = None, rpb=None,
    additional_keys=None, additional_values=None, factors=None, dtype: type = np.float64,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """out and lse; ``scale`` defaults to head_dim ** -0.5, ``dtype`` is that of all arithmetic.

    ``factors`` [batch, heads, queries, keys + extra], where given, multiply the softmax's weights (dropout).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p, lse = _probabilities(q, k, window, scale, rpb, additional_keys, dtype)
    weights = p if factors is None else p * factors.astype(dtype)
    out = weights @ _values(v, additional_values, q.shape[-2], dtype)
    return _heads_last(out, (*q.shape[:-1], v.shape[-1])), np.moveaxis(lse, 1, -1).reshape(q.shape[:-1])


def backward(
    d_out, q, k, v, window: Window, *, scale: float | None = None, rpb=None,
    additional_keys=None, additional_values=None, d_lse=None, factors=None, dtype: type = np.float64,
) -> Gradients:  # fmt: skip
    """Gradients of sum(out * d_out) + sum(lse * d_lse) with respect to every input."""
    heads, tokens = q.shape[-2], int(np.prod(q.shape[1:-2]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p, _ = _probabilities(q, k, window, scale, rpb, additional_keys, dtype)
    d_out = _heads_first(d_out, heads, dtype)
    factors = np.ones_like(p) if factors is None else factors.astype(dtype)
    d_values = (p * factors).swapaxes(-1, -2) @ d_out
    dp = factors * (d_out @ _values(v, additional_values, heads, dtype).swapaxes(-1, -2))
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    if d_lse is not None:
        ds = ds + p * _heads_first(np.asarray(d_lse)[..., None], heads, dtype)
    keys = _values(k, additional_keys, heads, dtype)
    dq = scale * (ds @ keys)
    d_keys = scale * (ds.swapaxes(-1, -2) @ _heads_first(q, heads, dtype))
    drpb = None
    if rpb is not None:
        mask, index = window_mask(window, q.shape[1:-2]), rpb_index(window, q.shape[1:-2])
        per_pair = ds[..., :tokens].sum(axis=0)[:, mask]
        drpb = np.stack([np.bincount(index[mask], w, int(np.prod(window.rpb_shape))) for w in per_pair])
        drpb = drpb.reshape(heads, *window.rpb_shape)
    return Gradients(
        _heads_last(dq, q.shape),
        _heads_last(d_keys[:, :, :tokens], k.shape),
        _heads_last(d_values[:, :, :tokens], v.shape),
        drpb,
        _heads_last(d_keys[:, :, tokens:], additional_keys.shape) if additional_keys is not None else None,
        _heads_last(d_values[:, :, tokens:], additional_values.shape) if additional_values is not None else None,
    )
