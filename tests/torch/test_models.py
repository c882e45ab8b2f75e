"""NAT-Mini, Tiny, Small, Base: names, shapes and numbers as published."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_nat
from natcore.models import NATConfig
from tests.family import ROWS
from tests.torch.common import randomized
from torch_nat.models import NATBlock

PUBLISHED = {name: row for name, row in ROWS.items() if name.startswith("nat_") and len(row.depths) == 4}
SMALL = NATConfig(32, (1, 2), (1, 2), mlp_ratio=2, kernel_size=5, dilations=((2,), (1, 1)), num_classes=7)


def on_meta(name: str, **changes) -> torch_nat.NAT:
    with torch.device("meta"):
        return torch_nat.create_model(name, **changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads(name: str):
    width = PUBLISHED[name].width
    backbone = on_meta(name, features_only=True)
    names = {key.split(".")[0] for key in backbone.state_dict()}
    assert names == {"patch_embed", "levels", "norm0", "norm1", "norm2", "norm3"}
    maps = backbone(torch.empty(2, 3, 224, 160, device="meta"))
    assert [tuple(m.shape) for m in maps] == [(2, width * 2**i, 56 // 2**i, 40 // 2**i) for i in range(4)]
    assert on_meta(name)(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    pooled = on_meta(name, num_classes=0)
    assert isinstance(pooled.head, nn.Identity)
    assert pooled(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 8 * width)


def test_norms_activations_and_drop_path_rates():
    model = on_meta("nat_small")
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all(m.eps == 1e-5 for m in norms)
    assert all(m.approximate == "none" for m in model.modules() if isinstance(m, nn.GELU))
    blocks = [m for m in model.modules() if isinstance(m, NATBlock)]
    assert [b.drop_path.rate for b in blocks] == pytest.approx(torch.linspace(0, 0.3, 30).tolist(), abs=1e-6)
    assert {b.attn.head_dim for b in blocks} == {32}


def test_initialisation():
    torch.manual_seed(0)
    model = torch_nat.create_model("nat_mini", layer_scale=1e-5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std().item() - 0.02) < 0.002 and not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
        elif isinstance(module, NATBlock):
            assert 0.017 < module.attn.rpb.std().item() < 0.023
            assert (module.gamma1 == 1e-5).all() and (module.gamma2 == 1e-5).all()


def by_hand(model: torch_nat.NAT, x: torch.Tensor) -> list[torch.Tensor]:
    """The published forward, written out with torch's functions: the map after each stage's blocks."""
    state, config = model.state_dict(), model.config

    def linear(name, x):
        return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-5)

    def conv(name, x):
        return F.conv2d(x, state[name + ".weight"], state.get(name + ".bias"), stride=2, padding=1)

    def attention(name, x, heads, dilation):
        height, width = x.shape[1:3]
        reach = config.kernel_size * dilation
        x = F.pad(x, (0, 0, 0, max(reach - width, 0), 0, max(reach - height, 0)))
        q, k, v = linear(name + ".qkv", x).unflatten(-1, (3, heads, -1)).unbind(-3)
        out = torch_nat.na2d(q, k, v, config.kernel_size, dilation=dilation, rpb=state[name + ".rpb"])
        return linear(name + ".proj", out.flatten(-2)[:, :height, :width])

    maps = []
    x = conv("patch_embed.proj.1", conv("patch_embed.proj.0", x)).permute(0, 2, 3, 1)
    x = norm("patch_embed.norm", x)
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            block = f"levels.{i}.blocks.{j}"
            gamma1, gamma2 = (state.get(f"{block}.gamma{n}", 1) for n in (1, 2))
            y = attention(block + ".attn", norm(block + ".norm1", x), config.num_heads[i], config.dilation(i, j))
            x = x + gamma1 * y
            y = linear(block + ".mlp.fc2", F.gelu(linear(block + ".mlp.fc1", norm(block + ".norm2", x))))
            x = x + gamma2 * y
        maps.append(x)
        if i < len(config.depths) - 1:
            x = conv(f"levels.{i}.downsample.reduction", x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = norm(f"levels.{i}.downsample.norm", x)
    return maps


@pytest.mark.parametrize("side", [(48, 56), (30, 17)], ids=["windows fit", "maps are padded"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_forward_against_the_published_code(side: tuple[int, int], layer_scale: float | None):
    model, x = randomized(replace(SMALL, layer_scale=layer_scale)), torch.randn(2, 3, *side, dtype=torch.float64)
    last = by_hand(model, x)[-1]
    pooled = F.layer_norm(last, last.shape[-1:], model.norm.weight, model.norm.bias, 1e-5).flatten(1, 2).mean(1)
    expected = F.linear(pooled, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(x), expected)


def test_feature_maps_have_their_own_norms():
    model, x = randomized(replace(SMALL, features_only=True)), torch.randn(2, 3, 30, 17, dtype=torch.float64)
    for i, (actual, last) in enumerate(zip(model(x), by_hand(model, x), strict=True)):
        norm = model.get_submodule(f"norm{i}")
        expected = F.layer_norm(last, last.shape[-1:], norm.weight, norm.bias, 1e-5).permute(0, 3, 1, 2)
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()


def test_padding_is_not_masked():
    """A padded token is attended to; masking it would give other numbers."""
    block = randomized(SMALL).levels[1].blocks[0]
    x = torch.randn(1, 3, 5, 64, dtype=torch.float64)
    y = block.norm1(x)
    plain = torch_nat.NeighborhoodAttention2D(64, 2, (3, 5), rel_pos_bias=True).double()
    state = {**block.attn.state_dict(), "rpb": block.attn.rpb[:, 2:7]}
    plain.load_state_dict(state)
    assert (block._attend(y) - plain(y)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["nat", "vit_rpb"])
def test_every_branch_of_every_sample_is_dropped_on_its_own(layout: str):
    """At a rate of 1/2 each branch drops about half of the samples, and no two branches the same ones; branches of
    blocks that were replaced are their own affair."""
    torch.manual_seed(0)
    plain, flat = replace(SMALL, num_classes=0, drop_path_rate=0.5), layout == "vit_rpb"
    config = replace(plain, layout=layout, depths=(3,), num_heads=(2,), dilations=None) if flat else plain
    model = torch_nat.NAT(config).train()
    stage = model.get_submodule("layers" if flat else "levels.1.blocks")
    blocks = [block for block in stage.children() if isinstance(block, NATBlock)]
    dropped: list[Tensor] = []
    for block in blocks:
        block.drop_path.rate = 0.5
        block.drop_path.register_forward_hook(lambda _, inputs, y: dropped.append((y == 0).flatten(1).all(1)))
    stage.add_module("0", nn.Sequential(blocks[0]))
    images = torch.randn(64, 3, *(2 * (config.patch_size * config.kernel_size,) if flat else (40, 40)))
    with torch.no_grad():
        model(images)
    assert len(dropped) == 2 * len(blocks) == 2 * len(list(stage.children()))
    for at, one in enumerate(dropped):
        assert 16 <= one.sum() <= 48
        assert all((one != other).sum() >= 16 for other in dropped[:at])


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_factors_of_dropped_paths_have_the_dtype_of_their_branch(autocast: bool, layer_scale: float | None):
    model = torch_nat.NAT(replace(SMALL, drop_path_rate=0.5, layer_scale=layer_scale)).train()
    dtypes: list[tuple[torch.dtype, ...]] = []
    for block in (m for m in model.modules() if isinstance(m, NATBlock) and m.drop_path.rate):
        block.drop_path.register_forward_hook(lambda _, inputs, y: dtypes.append(tuple(x.dtype for x in (*inputs, y))))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(torch.randn(2, 3, 40, 40))
    branch = torch.bfloat16 if autocast and layer_scale is None else torch.float32
    assert dtypes == [(branch,) * 3] * 4


def test_it_trains():
    torch.manual_seed(0)
    model = torch_nat.NAT(replace(SMALL, drop_path_rate=0.1, drop_rate=0.05))
    x, labels = torch.randn(8, 3, 40, 40), torch.arange(8) % 7
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(p.grad is not None for p in model.parameters())


def test_it_compiles():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = torch_nat.NAT(SMALL).eval(), torch.randn(2, 3, 30, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: torch_nat.create_model("nat_huge"),
            "no model 'nat_huge'; there are nat_mini, nat_tiny, .*dinat_s_base",
        ),
        (lambda: torch_nat.NAT(SMALL)(torch.zeros(1, 30, 30, 3)), r"expected \[batch, 3, height, width\]"),
    ],
)
def test_refusals(call, text: str):
    with pytest.raises(ValueError, match=text):
        call()
