"""merge_attentions with NATTEN's arguments and checks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import torch_nat


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """One attention from several over disjoint keys: outputs ``[batch, tokens, heads, dim]``, LSEs without dim.

    The gradient is the true one with either value of ``use_autograd_fix``, from any kind of attention, and
    no input is written to (NATTEN overwrites them in the backward). ``torch_compile`` changes nothing.
    Raises ValueError for fewer than two, or for shapes that do not match.
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(f"{len(outputs)} outputs and {len(lse_tensors)} LSEs: expected as many, at least two.")
    shape = outputs[0].shape
    for at, (output, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if output.dim() != 4 or output.shape != shape or lse.shape != shape[:-1]:
            raise ValueError(
                f"output {at} has shape {tuple(output.shape)} and its LSE {tuple(lse.shape)}; expected "
                f"[batch, tokens, heads, dim] and the same without dim, all as the first, {tuple(shape)}."
            )
    return torch_nat.merge_attentions(list(outputs), list(lse_tensors))
