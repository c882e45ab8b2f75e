"""Parameters of attention over packed sequences of unequal lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV) from the lengths.

    ``seqlens_Q`` and ``seqlens_KV`` are int32 ``[sequences]`` on the tensors' device; without them the
    answer is (None, None, 0, 0). The cumulative sums begin with 0.

    Raises:
        ValueError: for lengths that do not go with the tensors or with each other.
        RuntimeError: under torch.compile, since the maxima are read on the host.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "generate_varlen_parameters reads lengths on the host, which breaks the graph: call it outside the "
            "compiled region and pass cumulative_seqlen_* and max_seqlen_* to attention."
        )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value have batches {query.shape[0]}, {key.shape[0]}, {value.shape[0]}.")
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    for name, lengths in (("seqlens_Q", seqlens_Q), ("seqlens_KV", seqlens_KV)):
        check_vector(name, lengths, query, 1)
    assert seqlens_Q is not None and seqlens_KV is not None
    if seqlens_Q.shape != seqlens_KV.shape:
        raise ValueError(f"seqlens_Q has {len(seqlens_Q)} entries and seqlens_KV {len(seqlens_KV)}.")
    if query.shape[0] != 1:
        raise ValueError(f"sequences are packed along one sequence: the batch must be 1, not {query.shape[0]}.")
    sums = (torch.nn.functional.pad(x.cumsum(0).to(torch.int32), (1, 0)) for x in (seqlens_Q, seqlens_KV))
    return *sums, int(seqlens_Q.max()), int(seqlens_KV.max())  # type: ignore[return-value]


def check_vector(name: str, vector: object, query: Tensor, least: int) -> None:
    """Raises ValueError unless ``vector`` is int32, on query's device, with at least ``least`` entries."""
    if not isinstance(vector, Tensor):
        raise ValueError(f"{name} is {type(vector).__name__}; lengths of queries and of keys go together, as tensors.")
    if vector.dtype != torch.int32 or vector.dim() != 1 or len(vector) < least or vector.device != query.device:
        raise ValueError(
            f"{name} is {vector.dtype} of shape {tuple(vector.shape)} on {vector.device}; expected int32 of one axis "
            f"with at least {least} entries on {query.device}."
        )
