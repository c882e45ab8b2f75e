"""The definition of unfused attention (see `natcore.unfused`): dense, in NumPy float64, with gradients.

Shapes are those of `natcore.reference`; scores and weights are
`[batch, *spatial, heads, prod(kernel_size) + extra]`.
"""

from __future__ import annotations

from math import prod

import numpy as np

from natcore.problem import Window
from natcore.reference import _heads_first, _heads_last, _values, neighborhood, rpb_index, window_mask
from natcore.unfused import AVGradients, QKGradients


def place_index(window: Window, spatial: tuple[int, ...]) -> np.ndarray:
    """int [queries, keys]: the place of a key in a query's window; only meaningful under the mask."""
    index = np.zeros((1, 1), int)
    axes = zip(spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True)
    for extent, kernel, stride, dilation, causal in axes:
        start = [neighborhood(i, extent, kernel, stride, dilation, causal)[0] for i in range(extent)]
        place = np.clip(np.arange(extent)[None, :] // dilation - np.array(start)[:, None], 0, kernel - 1)
        index = np.kron(index, np.ones_like(place)) * kernel + np.kron(np.ones_like(index), place)
    return index


def _to_places(dense: np.ndarray, window: Window, spatial: tuple[int, ...], empty: float) -> np.ndarray:
    """[batch, heads, queries, keys + extra] -> [batch, *spatial, heads, places]."""
    tokens, kernel = prod(spatial), prod(window.kernel_size)
    places = np.full((*dense.shape[:3], kernel + dense.shape[3] - tokens), empty, dense.dtype)
    query, key = np.nonzero(window_mask(window, spatial))
    places[:, :, query, place_index(window, spatial)[query, key]] = dense[:, :, query, key]
    places[..., kernel:] = dense[..., tokens:]
    return np.moveaxis(places, 1, -2).reshape(dense.shape[0], *spatial, dense.shape[1], places.shape[-1])


def _to_dense(places: np.ndarray, window: Window, dtype: type) -> np.ndarray:
    """The way back, with zeros outside the windows."""
    spatial, kernel = places.shape[1:-2], prod(window.kernel_size)
    places = _heads_first(places, places.shape[-2], dtype)
    tokens, extra = prod(spatial), places.shape[-1] - kernel
    dense = np.zeros((*places.shape[:3], tokens + extra), dtype)
    query, key = np.nonzero(window_mask(window, spatial))
    dense[:, :, query, key] = places[:, :, query, place_index(window, spatial)[query, key]]
    dense[..., tokens:] = places[..., kernel:]
    return dense


def qk(q, k, window: Window, *, scale: float = 1.0, rpb=None, additional_keys=None, dtype: type = np.float64):
    """The scores."""
    spatial, heads = q.shape[1:-2], q.shape[-2]
    dense = scale * (_heads_first(q, heads, dtype) @ _values(k, additional_keys, heads, dtype).swapaxes(-1, -2))
    if rpb is not None:
        table = np.asarray(rpb, dtype=dtype).reshape(heads, -1)
        dense[..., : prod(spatial)] += table[:, rpb_index(window, spatial)]
    return _to_places(dense, window, spatial, -np.inf)


def qk_backward(
    d_scores, q, k, window: Window, *, scale: float = 1.0, rpb=None, additional_keys=None, dtype: type = np.float64
) -> QKGradients:
    """Gradients of sum(scores * d_scores) over the places that have a key."""
    spatial, heads, tokens = q.shape[1:-2], q.shape[-2], prod(q.shape[1:-2])
    ds = _to_dense(d_scores, window, dtype)
    dq = scale * (ds @ _values(k, additional_keys, heads, dtype))
    d_keys = scale * (ds.swapaxes(-1, -2) @ _heads_first(q, heads, dtype))
    drpb = None
    if rpb is not None:
        mask, index = window_mask(window, spatial), rpb_index(window, spatial)
        per_pair = ds[..., :tokens].sum(axis=0)[:, mask]
        drpb = np.stack([np.bincount(index[mask], w, prod(window.rpb_shape)) for w in per_pair]).reshape(rpb.shape)
    return QKGradients(_heads_last(dq, q.shape), *_split(d_keys, k, additional_keys, lambda dk: (dk, drpb)))


def av(weights, v, window: Window, *, additional_values=None, dtype: type = np.float64):
    """out."""
    out = _to_dense(weights, window, dtype) @ _values(v, additional_values, weights.shape[-2], dtype)
    return _heads_last(out, (*weights.shape[:-1], v.shape[-1]))


def av_backward(d_out, weights, v, window: Window, *, additional_values=None, dtype: type = np.float64) -> AVGradients:
    """Gradients of sum(out * d_out); 0 where a place has no key."""
    heads = weights.shape[-2]
    d_out = _heads_first(d_out, heads, dtype)
    dp = d_out @ _values(v, additional_values, heads, dtype).swapaxes(-1, -2)
    d_values = _to_dense(weights, window, dtype).swapaxes(-1, -2) @ d_out
    d_weights = _to_places(dp, window, weights.shape[1:-2], 0.0)
    return AVGradients(d_weights, *_split(d_values, v, additional_values, lambda dv: (dv,)))


def _split(gradient: np.ndarray, keys, additional, between) -> tuple:
    """The gradient of keys and of additional ones; ``between`` says what is returned for the keys."""
    tokens = prod(keys.shape[1:-2])
    rest = None if additional is None else _heads_last(gradient[:, :, tokens:], additional.shape)
    return (*between(_heads_last(gradient[:, :, :tokens], keys.shape)), rest)
