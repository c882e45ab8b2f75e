"""Plain attention with an LSE, over equal or unequal lengths, and over packed sequences."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_nat.compat.natten._arguments import check_dense, readable
from torch_nat.functional import na1d


def attend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of ``[batch, tokens, heads, head_dim]``; a causal query i sees the keys 0 to i.

    Without the LSE this is torch's own attention. With it, and as many keys as queries, it is na1d with
    the window as long as the sequence; else dense attention, of which autograd keeps the scores.
    """
    check_dense((query, key, value))
    if query.shape[1] == 0 or key.shape[1] == 0:
        return _empty(query, key, value)
    if not return_lse:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        gqa = query.shape[2] != key.shape[2]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2), None
    if query.shape[1] == key.shape[1]:
        q, k, v = (readable(x) for x in (query, key, value))
        return na1d(q, k, v, query.shape[1], is_causal=is_causal, scale=scale, return_lse=True)  # type: ignore
    return _dense(query, key, value, is_causal, scale)


def _dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Scores in float32 (float64 for float64); heads of a GQA group share their key and value."""
    batch, queries, heads, head_dim = query.shape
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(accumulator).transpose(1, 2) for x in (query, key, value))
    groups = key.shape[2]
    q = q.reshape(batch, groups, heads // groups, queries, head_dim)
    scores = (head_dim**-0.5 if scale is None else scale) * (q @ k.unsqueeze(2).transpose(-1, -2))
    if is_causal:
        hidden = torch.ones(queries, key.shape[1], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ v.unsqueeze(2)
    out = out.reshape(batch, heads, queries, -1).transpose(1, 2).to(query.dtype)
    return out, lse.reshape(batch, heads, queries).transpose(1, 2)


def _empty(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """No queries, or no keys: nothing is seen, the output is 0 and the LSE is -inf."""
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    nothing = 0 * (query.sum() + key.sum() + value.sum())  # keeps the graph, with gradients of 0
    out = query.new_zeros((*query.shape[:-1], value.shape[-1])) + nothing
    return out, torch.full(query.shape[:-1], -torch.inf, dtype=accumulator, device=query.device)


@torch.compiler.disable(reason="attention over packed sequences reads their lengths on the host")
def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative: tuple[Tensor, Tensor],
    longest: tuple[int, ...],
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention within each of several sequences that lie one after the other along the token axis.

    ``cumulative``: int32 ``[sequences + 1]`` each, from 0 to the number of tokens. Raises ValueError where
    they do not describe the tensors, or ``longest`` is shorter than a sequence. torch.compile leaves it out.
    """
    bounds = [boundaries.tolist() for boundaries in cumulative]
    names, tokens_of = ("cumulative_seqlen_Q", "cumulative_seqlen_KV"), (query.shape[1], key.shape[1])
    for name, ends, tokens, limit in zip(names, bounds, tokens_of, longest, strict=True):
        lengths = [end - start for start, end in pairwise(ends)]
        if ends[0] != 0 or ends[-1] != tokens or min(lengths) < 0:
            raise ValueError(f"{name} is {ends}; it must rise from 0 to the {tokens} tokens of the tensor.")
        if max(lengths) > limit:
            raise ValueError(f"{name} has a sequence of {max(lengths)} tokens, longer than max_seqlen {limit}.")
    results = []
    for (q0, q1), (k0, k1) in zip(*(pairwise(ends) for ends in bounds), strict=True):
        part = attend(query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], is_causal, scale, return_lse)
        results.append(part)
    out = torch.cat([out for out, _ in results], dim=1)
    return out, torch.cat([lse for _, lse in results], dim=1) if return_lse else None  # type: ignore
