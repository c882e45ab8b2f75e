"""ViT, Swin, SASA and HaloNet through NA, each beside a dense oracle written as its paper computes it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

import torch_nat
from torch_nat import patterns

DOUBLE = torch.float64


def operands(spatial: tuple, heads: int = 2, dim: int = 4, *, heads_kv: int = 0, dim_v: int = 0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(prod(spatial))

    def draw(count: int, channels: int) -> Tensor:
        x = torch.randn(2, *spatial, count, channels, generator=generator, dtype=DOUBLE)
        return x.to(dtype).requires_grad_()

    kv = heads_kv or heads
    return draw(heads, dim), draw(kv, dim), draw(kv, dim_v or dim)


def table(heads: int, sides: tuple) -> Tensor:
    shape = [2 * side - 1 for side in sides]
    return torch.randn(heads, *shape, generator=torch.Generator().manual_seed(7), dtype=DOUBLE).requires_grad_()


def agree(ours: Callable, oracle: Callable, inputs: tuple, atol: float = 1e-10) -> None:
    """The same output and the same gradients of every input."""
    out, expected = ours(*inputs), oracle(*inputs)
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=atol)
    given = [x for x in inputs if x is not None]
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(out.dtype)
    for one, other in zip(
        torch.autograd.grad(out, given, d_out), torch.autograd.grad(expected, given, d_out.to(expected)), strict=True
    ):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=10 * atol)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """[..., tokens, head_dim], the scores in full."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias).softmax(-1) @ v


# --- ViT


def vit(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
    spatial, heads = q.shape[1:-2], q.shape[-2]
    tokens = [x.flatten(1, -3).transpose(1, 2).repeat_interleave(heads // x.shape[-2], 1) for x in (q, k, v)]
    bias: Tensor | float = 0.0
    if rpb is not None:
        places = list(product(*map(range, spatial)))
        entries = [
            rpb[(slice(None), *(b - a + side - 1 for a, b, side in zip(i, j, spatial, strict=True)))]
            for i in places
            for j in places
        ]
        bias = torch.stack(entries, dim=-1).view(heads, len(places), len(places))
    return softmax_attention(*tokens, bias).transpose(1, 2).unflatten(1, spatial)


@pytest.mark.parametrize("spatial", [(9,), (4, 5), (2, 3, 4)])
def test_self_attention_is_vit(spatial: tuple):
    agree(patterns.self_attention, vit, operands(spatial, 4, heads_kv=2, dim_v=6))
    rpb = table(2, spatial)
    agree(lambda q, k, v, t: patterns.self_attention(q, k, v, rpb=t), lambda *x: vit(*x), (*operands(spatial), rpb))


# --- Swin: roll, partition, mask by region, as its authors wrote it down


def partition(x: Tensor, window: tuple) -> Tensor:
    """[B, *spatial, ...] -> [B, windows, tokens of a window, ...]."""
    rank = len(window)
    rest = x.shape[1 + rank :]
    split = [n for extent, w in zip(x.shape[1 : 1 + rank], window, strict=True) for n in (extent // w, w)]
    x = x.reshape(x.shape[0], *split, *rest)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), *range(2 * rank + 1, x.dim())]
    x = x.permute(order)
    return x.reshape(x.shape[0], prod(x.shape[1 : 1 + rank]), prod(window), *rest)


def unpartition(x: Tensor, window: tuple, spatial: tuple) -> Tensor:
    rank = len(window)
    x = x.reshape(x.shape[0], *(n // w for n, w in zip(spatial, window, strict=True)), *window, *x.shape[3:])
    order = [0, *(a for axis in range(rank) for a in (1 + axis, 1 + rank + axis)), *range(1 + 2 * rank, x.dim())]
    return x.permute(order).reshape(x.shape[0], *spatial, *x.shape[1 + 2 * rank :])


def regions(window: tuple, shift: tuple, spatial: tuple) -> Tensor:
    """[1, *spatial]: on the rolled map, a number for what belongs together."""
    labels = torch.zeros(spatial)
    cuts = [
        (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
        for w, s in zip(window, shift, strict=True)
    ]
    for number, where in enumerate(product(*cuts)):
        labels[where] = number
    return labels[None]


def swin_index(window: tuple) -> Tensor:
    """Query minus key in every window, as one number per pair."""
    coordinates = torch.stack(torch.meshgrid(*map(torch.arange, window), indexing="ij")).flatten(1)
    difference = coordinates[:, :, None] - coordinates[:, None, :]
    index = torch.zeros(difference.shape[1:], dtype=torch.long)
    for axis, w in enumerate(window):
        index = index * (2 * w - 1) + difference[axis] + w - 1
    return index


def swin(window: tuple, shift: tuple) -> Callable:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        spatial, axes, heads = tuple(q.shape[1:-2]), tuple(range(1, q.dim() - 2)), q.shape[-2]
        back = tuple(-s for s in shift)
        windows = [partition(x.roll(back, axes), window).transpose(2, 3) for x in (q, k, v)]
        windows = [x.repeat_interleave(heads // x.shape[2], 2) for x in windows]  # [B, windows, heads, tokens, d]
        label = partition(regions(window, shift, spatial), window)[0]  # [windows, tokens]
        bias = torch.zeros(label.shape[0], 1, *2 * label.shape[1:], dtype=DOUBLE)
        bias = bias.masked_fill((label[:, None] != label[:, :, None])[:, None], -torch.inf)
        if bias_table is not None:
            bias = bias + bias_table[swin_index(window)].permute(2, 0, 1)
        out = softmax_attention(*windows, bias).transpose(2, 3)
        return unpartition(out, window, spatial).roll(shift, axes)

    return attention


SWIN = [
    ((8, 12), (4, 4), (0, 0)),
    ((8, 12), (4, 4), (2, 2)),
    ((14, 7), (7, 7), (3, 0)),
    ((6, 10), (3, 5), (1, 4)),
    ((5, 5), (5, 5), (2, 2)),
    ((12,), (4,), (3,)),
    ((4, 6, 6), (2, 3, 3), (1, 1, 1)),
]


@pytest.mark.parametrize("spatial, window, shift", SWIN)
@pytest.mark.parametrize("bias", [False, True])
def test_windows_are_swins(spatial: tuple, window: tuple, shift: tuple, bias: bool):
    inputs = operands(spatial)
    if not bias:
        agree(lambda *x: patterns.window_attention(*x, window, shift), swin(window, shift), inputs)
        return
    entries = torch.randn(prod(2 * w - 1 for w in window), 2, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)

    def ours(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return patterns.window_attention(q, k, v, window, shift, rpb=patterns.swin_rpb(t, window))

    agree(ours, swin(window, shift), (*inputs, entries.requires_grad_()))


def test_windows_take_grouped_queries_other_values_and_float32():
    inputs = operands((6, 9), 4, heads_kv=2, dim_v=8, dtype=torch.float32)
    oracle = swin((3, 3), (1, 1))
    agree(
        lambda *x: patterns.window_attention(*x, 3, 1), lambda *x: oracle(*(y.double() for y in x)), inputs, atol=1e-5
    )


def test_an_explicit_scale_is_honoured():
    q, k, v = operands((6, 6))
    ours = patterns.window_attention(q, k, v, 3, 1, scale=-0.3)
    torch.testing.assert_close(ours, swin((3, 3), (1, 1))(q * -0.3 * 2, k, v), rtol=0, atol=1e-10)


def test_windows_that_do_not_fit_are_refused():
    q, k, v = operands((6, 8))
    with pytest.raises(ValueError, match="window_size 4 does not divide extent 6 on axis 0"):
        patterns.window_attention(q, k, v, 4)
    with pytest.raises(ValueError, match="shift 2 on axis 1 must be at least 0 and less than window_size 2"):
        patterns.window_attention(q, k, v, 2, (1, 2))
    with pytest.raises(ValueError, match="1 to 3 spatial axes"):
        patterns.window_attention(q[0, 0], k[0, 0], v[0, 0], 2)


# --- SASA and HaloNet: windows cut out of a padded map, all scores in memory


def windows_of(x: Tensor, block: tuple, front: tuple, size: tuple) -> Tensor:
    """[B, *spatial, h, d] -> [B, *blocks, h, d, *size]: what each block sees, cut out of a zero-padded map."""
    spatial, rank = x.shape[1:-2], len(size)
    counts = [-(-extent // b) for extent, b in zip(spatial, block, strict=True)]
    extents = [(n - 1) * b + k for n, b, k in zip(counts, block, size, strict=True)]
    padded = x.new_zeros(
        x.shape[0], *(max(e, f + s) for e, f, s in zip(extents, front, spatial, strict=True)), *x.shape[-2:]
    )
    padded[(slice(None), *(slice(f, f + s) for f, s in zip(front, spatial, strict=True)))] = x
    for axis in range(rank):
        padded = padded.narrow(1 + axis, 0, extents[axis]).unfold(1 + axis, size[axis], block[axis])
    return padded


def gathered(block: tuple, before: tuple, size: tuple, border: str) -> Callable:
    """One query after the other, so that nothing but the definition is used."""

    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        spatial, heads = q.shape[1:-2], q.shape[-2]
        inside = windows_of(torch.ones(1, *spatial, 1, 1, dtype=DOUBLE), block, before, size)
        keys, values = (windows_of(x.repeat_interleave(heads // x.shape[-2], -2), block, before, size) for x in (k, v))
        out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        for place in product(*map(range, spatial)):
            at = (slice(None), *(i // b for i, b in zip(place, block, strict=True)))
            here = q[(slice(None), *place)]  # [B, h, d]
            scores = torch.einsum("bhd,bhdk->bhk", here, keys[at].flatten(3)) * q.shape[-1] ** -0.5
            if rpb is not None:
                starts = [i // b * b - f for i, b, f in zip(place, block, before, strict=True)]
                first = [s - i + n - 1 for s, i, n in zip(starts, place, size, strict=True)]
                scores = scores + rpb[
                    (slice(None), *(slice(f, f + n) for f, n in zip(first, size, strict=True)))
                ].flatten(1)
            if border == "mask":
                scores = scores.masked_fill(inside[at].flatten(2) == 0, -torch.inf)
            out[(slice(None), *place)] = torch.einsum("bhk,bhdk->bhd", scores.softmax(-1), values[at].flatten(3))
        return out

    return attention


def sasa_oracle(kernel: tuple, border: str) -> Callable:
    return gathered((1,) * len(kernel), tuple(k // 2 for k in kernel), kernel, border)


SASA = [((5, 6), (3, 3)), ((4, 5), (4, 3)), ((3, 4), (5, 7)), ((9,), (5,)), ((3, 4, 3), (3, 2, 3))]


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("spatial, kernel", SASA)
def test_sasa_is_centred_on_a_padded_map(spatial: tuple, kernel: tuple, border: str):
    agree(lambda *x: patterns.sasa(*x, kernel, border=border), sasa_oracle(kernel, border), operands(spatial))
    inputs = (*operands(spatial, 4, heads_kv=2, dim_v=6), table(4, kernel))
    agree(lambda q, k, v, t: patterns.sasa(q, k, v, kernel, border=border, rpb=t), sasa_oracle(kernel, border), inputs)


@pytest.mark.parametrize("scale", [0.0, 1e-9, -0.7, 3.0])
def test_mask_holds_at_any_scale(scale: float):
    q, k, v = operands((5, 4))
    ours = patterns.sasa(q, k, v, 3, border="mask", scale=scale)
    expected = sasa_oracle((3, 3), "mask")(q * scale * 2, k, v)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_mask_holds_in_every_dtype(dtype: torch.dtype, atol: float):
    q, k, v = operands((6, 5), dim=8, dtype=dtype)
    ours = patterns.sasa(q, k, v, 3, border="mask")
    expected = sasa_oracle((3, 3), "mask")(q.double(), k.double(), v.double())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=atol)
    gradients = torch.autograd.grad(ours.float().square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=10 * atol)


def test_borders_differ_and_the_middle_does_not():
    q, k, v = operands((9, 9))
    na = torch_nat.na2d(q, k, v, 3)
    zeros, mask = (patterns.sasa(q, k, v, 3, border=border) for border in ("zeros", "mask"))
    inner = (slice(None), slice(1, -1), slice(1, -1))
    for other in (zeros, mask):
        torch.testing.assert_close(other[inner], na[inner], rtol=0, atol=1e-12)
        assert (other[:, 0] - na[:, 0]).abs().max() > 0.1
    assert (zeros[:, 0] - mask[:, 0]).abs().max() > 0.1


HALO = [
    ((8, 8), (4, 4), (2, 2)),
    ((6, 8), (3, 2), (1, 3)),
    ((7, 5), (3, 2), (2, 1)),
    ((4, 4), (4, 4), (1, 1)),
    ((9,), (4,), (5,)),
    ((4, 4), (2, 2), (0, 0)),
]


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("spatial, block, halo", HALO)
def test_blocks_with_halos_are_halonets(spatial: tuple, block: tuple, halo: tuple, border: str):
    size = tuple(b + 2 * h for b, h in zip(block, halo, strict=True))
    oracle = gathered(block, halo, size, border)
    agree(lambda *x: patterns.halo_attention(*x, block, halo, border=border), oracle, operands(spatial))
    inputs = (*operands(spatial), table(2, size))
    agree(lambda q, k, v, t: patterns.halo_attention(q, k, v, block, halo, border=border, rpb=t), oracle, inputs)


def test_shifted_halos_are_exact_away_from_borders():
    q, k, v = operands((12, 12))
    shifted = patterns.halo_attention(q, k, v, 3, 2, border="shift")
    exact = gathered((3, 3), (2, 2), (7, 7), "mask")(q, k, v)
    same = (shifted - exact).abs().amax((0, 3, 4)) < 1e-10
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:9, 3:9] = True
    assert torch.equal(same, expected)


def test_wrong_blocks_and_borders_are_refused():
    q, k, v = operands((6, 6))
    for call, text in (
        (lambda: patterns.halo_attention(q, k, v, 0, 1), "block is"),
        (lambda: patterns.halo_attention(q, k, v, 2, -1), "halo is"),
        (lambda: patterns.halo_attention(q, k, v, 2, 3, border="shift"), "8 > extent 6"),
        (lambda: patterns.sasa(q, k, v, 0), "kernel_size is"),
        (lambda: patterns.sasa(q, k, v, 3, border="shift"), "border 'shift' is not"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=text):
            call()


# --- layers


def layers() -> list[torch.nn.Module]:
    options = {"rel_pos_bias": True}
    return [
        patterns.WindowAttention2D(8, 2, 3, 1, **options),
        patterns.StandAloneAttention2D(8, 2, 3, **options),
        patterns.StandAloneAttention2D(8, 2, 3, "mask", **options),
        patterns.HaloAttention2D(8, 2, 2, 1, **options),
    ]


@pytest.mark.parametrize("index", range(4))
def test_layers_project_as_neighborhood_attention_does(index: int):
    layer = layers()[index].double()
    plain = torch_nat.NeighborhoodAttention2D(8, 2, layer.window.kernel_size, rel_pos_bias=True).double()
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    x = torch.randn(2, 6, 6, 8, dtype=DOUBLE)
    q, k, v = layer.qkv(x).view(2, 6, 6, 3, 2, 4).unbind(3)
    oracles = {
        "WindowAttention2D": lambda: swin((3, 3), (1, 1))(q, k, v, layer.rpb.flip(1, 2).flatten(1).T),
        "StandAloneAttention2D": lambda: sasa_oracle((3, 3), layer.border)(q, k, v, layer.rpb),
        "HaloAttention2D": lambda: gathered((2, 2), (1, 1), (4, 4), "zeros")(q, k, v, layer.rpb),
    }
    expected = layer.proj(oracles[type(layer).__name__]().flatten(-2))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="expected"):
        layer(x[..., :4])


def test_window_layer_pads_as_swin_does_and_leaves_single_windows_alone():
    layer = patterns.WindowAttention2D(8, 2, (4, 3), (2, 1), rel_pos_bias=True).double()
    x = torch.randn(1, 6, 3, 8, dtype=DOUBLE)
    padded = torch.zeros(1, 8, 3, 8, dtype=DOUBLE)
    padded[:, :6] = x
    q, k, v = layer.qkv(padded).view(1, 8, 3, 3, 2, 4).unbind(3)
    expected = swin((4, 3), (2, 0))(q, k, v, layer.rpb.flip(1, 2).flatten(1).T)
    torch.testing.assert_close(layer(x), layer.proj(expected.flatten(-2))[:, :6], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"shift \(3, 3\)"):
        patterns.WindowAttention2D(8, 2, 3, 3)


def test_layers_say_what_they_are_and_compile():
    texts = [repr(layer) for layer in layers()]
    assert "shift=(1, 1)" in texts[0] and "border=mask" in texts[2] and "block=(2, 2), halo=(1, 1)" in texts[3]
    layer = layers()[0]
    x = torch.randn(1, 6, 6, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
