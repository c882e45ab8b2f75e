"""Multiply-accumulates of a model's forward pass, by kind of operation.

    python -m torch_nat.flops nat_tiny --size 224

The convention is fvcore's, in which the NAT and DiNAT papers and their published code give "FLOPs": one
per multiply-add of matrix products, convolutions and attention (scores and weighted sums, every window
counted whole), biases of layers not at all, one per addition of the relative positional bias, five per
element of an affine norm, one per element that average pooling reads, one per element that nearest resizing
writes and four where it is bilinear. Activations, softmax, residual connections and RoIAlign count nothing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from natcore.models import MODELS
from torch_nat.models import create_model
from torch_nat.ops import decode_window

Counts = dict[str, int]
KINDS = ("linear", "convolution", "attention", "rpb", "norm", "pool", "resize")
_aten = torch.ops.aten


def count(model: nn.Module, *inputs: Tensor) -> Counts:
    """Multiply-accumulates of ``model(*inputs)`` by kind, one entry for each of KINDS.

    Model and inputs may be on the meta device, where nothing is computed. The model runs in the mode
    (training or evaluation) that it is in.

    Raises NotImplementedError for an operation of this package that has no rule.
    """
    counter = _Counter()
    with torch.no_grad(), counter:
        model(*inputs)
    return {kind: counter.counts[kind] for kind in KINDS}


def count_named(name: str, size: int = 224, **changes: object) -> Counts:
    """`count` for one square image through a model of `create_model`, without its weights."""
    with torch.device("meta"):
        model = create_model(name, **changes).eval()
        return count(model, torch.empty(1, model.config.in_chans, size, size))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = _RULES.get(func.overloadpacket)
        if rule is not None:
            self.counts.update(rule(args, out))
        elif func.namespace == "natcore":
            raise NotImplementedError(f"no rule counts {func}; those that have one: {', '.join(map(str, _RULES))}.")
        return out


def _product(first: int) -> Callable[[Sequence[Any], Any], Counts]:
    """[..., m, k] times [..., k, n], where argument number ``first`` is the one on the left."""
    return lambda args, out: {"linear": out.numel() * args[first].shape[-1]}


def _convolution(args: Sequence[Any], out: Tensor) -> Counts:
    x, weight, transposed = args[0], args[1], args[6]
    return {"convolution": (x if transposed else out).numel() * weight[0].numel()}


def _attention(args: Sequence[Any], out: Any) -> Counts:
    q, _, v, *rest = args
    return _windows(q.shape, v.shape[-1], *rest)


def _attention_packed(args: Sequence[Any], out: Any) -> Counts:
    qkv, *rest = args
    *batch, _, heads, head_dim = qkv.shape
    return _windows((*batch, heads, head_dim), head_dim, *rest)


def _windows(
    q: Sequence[int],
    head_dim_v: int,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    dropout_seed: Tensor | None,
    window: str,
    *_: Any,
) -> Counts:
    queries, keys = prod(q[:-1]), prod(decode_window(window).kernel_size)
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    return {
        "attention": queries * (keys + extra) * (q[-1] + head_dim_v),
        "rpb": 0 if rpb is None else queries * keys,
    }


def _scores(args: Sequence[Any], out: Tensor) -> Counts:
    q, _, rpb, _, window = args[:5]
    return {
        "attention": out.numel() * q.shape[-1],
        "rpb": 0 if rpb is None else prod(q.shape[:-1]) * prod(decode_window(window).kernel_size),
    }


def _weighted_sum(args: Sequence[Any], out: Tensor) -> Counts:
    weights, v = args[:2]
    return {"attention": weights.numel() * v.shape[-1]}


def _dense_attention(args: Sequence[Any], out: Any) -> Counts:
    q, k, v = args[:3]  # heads first
    return {"attention": prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])}


def _norm(weight: int) -> Callable[[Sequence[Any], Any], Counts]:
    """fvcore's: mean, variance, scaling, and one more for the affine map, whose weight is argument ``weight``."""
    return lambda args, out: {"norm": args[0].numel() * (4 if args[weight] is None else 5)}


def _batch_norm(args: Sequence[Any], out: Any) -> Counts:
    """As other norms in training; in evaluation, the stored statistics are one multiply-add and the affine map."""
    x, weight, training = args[0], args[1], args[5]
    affine = weight is not None
    return {"norm": x.numel() * (4 + affine if training else 1 + affine)}


def _pool(args: Sequence[Any], out: Tensor) -> Counts:
    return {"pool": args[0].numel()}


def _resize(terms: int) -> Callable[[Sequence[Any], Any], Counts]:
    """``terms`` elements of the input for each of the output."""
    return lambda args, out: {"resize": terms * out.numel()}


#: By operation: from its arguments and its result to counts.
_RULES: dict[Any, Callable[[Sequence[Any], Any], Counts]] = {
    _aten.mm: _product(0),
    _aten.bmm: _product(0),
    _aten.addmm: _product(1),
    _aten.baddbmm: _product(1),
    _aten.convolution: _convolution,
    _aten.native_layer_norm: _norm(2),
    _aten.native_group_norm: _norm(1),
    _aten.native_batch_norm: _batch_norm,
    _aten.cudnn_batch_norm: _batch_norm,
    _aten.mean: _pool,
    _aten._adaptive_avg_pool2d: _pool,
    _aten.upsample_nearest2d: _resize(1),
    _aten.upsample_bilinear2d: _resize(4),
    _aten._scaled_dot_product_flash_attention: _dense_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu: _dense_attention,
    _aten._scaled_dot_product_efficient_attention: _dense_attention,
    _aten._scaled_dot_product_cudnn_attention: _dense_attention,
    torch.ops.natcore.attention: _attention,
    torch.ops.natcore.attention_packed: _attention_packed,
    torch.ops.natcore.qk: _scores,
    torch.ops.natcore.av: _weighted_sum,
}


def print_counts(counts: Counts) -> None:
    """A line for each kind and two for totals."""
    total = sum(counts.values())
    for kind, macs in (counts | {"total": total, "total without norms": total - counts["norm"]}).items():
        print(f"{kind:20}{macs:>20,}{macs / 1e9:>10.3f} G")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_nat.flops", description="Multiply-accumulates of a model.")
    parser.add_argument("model", choices=MODELS, metavar="model", help=", ".join(MODELS))
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels (default: 224)")
    options = parser.parse_args(arguments)
    counts = count_named(options.model, options.size)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(options.model).parameters())
    print(f"{options.model}, one image of {options.size} x {options.size}, {parameters:,} parameters")
    print_counts(counts)


if __name__ == "__main__":
    main()
