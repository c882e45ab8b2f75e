"""The flax models against torch's, through one file, and the modules by themselves."""

from __future__ import annotations

from dataclasses import replace
from math import erfc, prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_nat
from jax_nat.checkpoints import _AXES_TO_TORCH, _name
from jax_nat.models import _gelu
from natcore.models import MODELS, NATConfig

pytest.importorskip("torch")
import torch

import torch_nat
from tests.family import ISOTROPIC, ROWS, SWIN, VIT, published_shapes

#: The smallest config that has everything: dilation, layer scale, two stages, uneven sizes.
SMALL = NATConfig(
    32, (2, 1), (1, 2), mlp_ratio=2, layer_scale=0.7, kernel_size=3, dilations=((1, 2), (1,)), num_classes=10
)

#: One of each layout, traced whole.
FULL = ("nat_mini", "dinat_s_tiny", "dinat_isotropic_small", "vit_rpb_small")


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a value that its initialisation would not: biases, norms and gammas too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1 and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif "gamma" in name:
                p.copy_(0.5 + 0.1 * noise)
            elif p.dim() in (2, 4):
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.1 * noise)
    return model.eval()


def images(size: tuple[int, int], batch: int = 1, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, *size, channels)).astype(np.float32)


forward = nnx.jit(lambda model, x: model(x))


def agree(actual, wanted, tolerance: float = 1e-4) -> None:
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    error, scale = np.abs(actual - wanted).max(), np.abs(wanted).max()
    assert scale > 0
    assert error <= tolerance * scale, f"max|difference| {error:.3g} > {tolerance:g} * {scale:.3g}"


def both(model: torch.nn.Module, path, x: np.ndarray):
    """Outputs of a torch model, and of the jax model that reads its file."""
    torch_nat.save(model, path)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x).permute(0, 3, 1, 2))
    loaded = jax_nat.load(path)
    return forward(loaded, x), wanted


@pytest.mark.parametrize(
    ("name", "size"),
    [("nat_mini", (96, 64)), ("nat_tiny", (224, 224)), ("nat_small", (64, 64)), ("nat_base", (64, 64))],
)
def test_logits_equal_torch(name, size, tmp_path):
    with jax.default_matmul_precision("highest"):
        agree(*both(randomise(torch_nat.create_model(name)), tmp_path / "model", images(size)))


@pytest.mark.parametrize("size", [(32, 32), (45, 61), (7, 100)], ids=str)
def test_small_and_odd_maps_equal_torch(size, tmp_path):
    agree(*both(randomise(torch_nat.NAT(SMALL)), tmp_path / "model", images(size, batch=2)))


@pytest.mark.parametrize(
    ("config", "size"), [(SWIN, (22, 39)), (ISOTROPIC, (97, 40)), (VIT, (64, 64))], ids=["dinat_s", "isotropic", "vit"]
)
def test_other_layouts_equal_torch(config, size, tmp_path):
    """Sizes that need padding of the image, of the maps between stages and of those under the window."""
    agree(*both(randomise(torch_nat.NAT(config)), tmp_path / "model", images(size)))
    jax_nat.save(jax_nat.load(tmp_path / "model"), tmp_path / "again")
    for (name, a), (other, b) in zip(
        torch_nat.load(tmp_path / "model").state_dict().items(),
        torch_nat.load(tmp_path / "again").state_dict().items(),
        strict=True,
    ):
        assert name == other
        assert torch.equal(a, b), name


def test_maps_of_other_layouts_equal_torch(tmp_path):
    maps, wanted = both(
        randomise(torch_nat.NAT(replace(SWIN, features_only=True))), tmp_path / "model", images((40, 40))
    )
    for actual, expected in zip(maps, wanted, strict=True):
        agree(actual, expected.permute(0, 2, 3, 1))
    maps, wanted = both(
        randomise(torch_nat.NAT(replace(ISOTROPIC, features_only=True))), tmp_path / "model", images((96, 96))
    )
    assert len(maps) == len(wanted) == 1
    agree(maps[0], wanted[0].permute(0, 2, 3, 1))


def test_another_kernel_size_equals_torch(tmp_path):
    torch_nat.save(randomise(torch_nat.NAT(VIT)), tmp_path / "model")
    x = images((96, 96))
    with torch.no_grad():
        wanted = torch_nat.load(tmp_path / "model", kernel_size=6)(torch.from_numpy(x).permute(0, 3, 1, 2))
    agree(forward(jax_nat.load(tmp_path / "model", kernel_size=6), x), wanted)
    with pytest.raises(ValueError, match="maps of 4 x 4 tokens"):
        nnx.eval_shape(lambda: jax_nat.NAT(VIT, rngs=nnx.Rngs(0))(jnp.zeros((1, 96, 96, 3))))


@pytest.mark.parametrize("config", [SMALL, SWIN, ISOTROPIC, VIT], ids=lambda config: config.layout)
def test_models_of_one_config_share_a_compilation(config):
    first, second = (nnx.eval_shape(lambda s=s: jax_nat.NAT(config, rngs=nnx.Rngs(s))) for s in range(2))
    assert nnx.graphdef(first) == nnx.graphdef(second)
    assert hash(nnx.graphdef(first)) == hash(nnx.graphdef(second))


def test_feature_maps_equal_torch(tmp_path):
    config = NATConfig.from_json(SMALL.to_json().replace('"features_only": false', '"features_only": true'))
    maps, wanted = both(randomise(torch_nat.NAT(config)), tmp_path / "model", images((40, 40)))
    assert len(maps) == len(wanted) == 2
    for actual, expected in zip(maps, wanted, strict=True):
        agree(actual, expected.permute(0, 2, 3, 1))


def test_pooled_features_equal_torch(tmp_path):
    config = NATConfig.from_json(SMALL.to_json().replace('"num_classes": 10', '"num_classes": 0'))
    agree(*both(randomise(torch_nat.NAT(config)), tmp_path / "model", images((40, 40))))


def test_gradients_equal_torch(tmp_path):
    model, x = randomise(torch_nat.NAT(SMALL)), images((36, 36), batch=2)
    torch_nat.save(model, tmp_path / "model")
    inputs = torch.from_numpy(x).requires_grad_()
    model(inputs.permute(0, 3, 1, 2)).square().sum().backward()
    loaded = jax_nat.load(tmp_path / "model")
    loss = nnx.jit(nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=(0, 1)))
    gradients, d_images = loss(loaded, jnp.asarray(x))
    agree(d_images, inputs.grad, 1e-3)
    block, attn = gradients["levels"][0]["blocks"][1], dict(model.named_parameters())
    agree(block["attn"]["rpb"][...], attn["levels.0.blocks.1.attn.rpb"].grad, 1e-3)
    agree(block["attn"]["qkv"]["kernel"][...].T, attn["levels.0.blocks.1.attn.qkv.weight"].grad, 1e-3)
    agree(block["gamma1"][...], attn["levels.0.blocks.1.gamma1"].grad, 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_ones(name):
    """To the unit; one block per stage, which tells as much, for all but one model of each kind."""
    depths = MODELS[name].depths if name in FULL else (1,) * len(MODELS[name].depths)
    config = replace(MODELS[name], depths=depths, dilations=None)
    abstract = nnx.eval_shape(lambda: jax_nat.NAT(config, rngs=nnx.Rngs(0)))
    shapes = {_name(place): leaf.shape for place, leaf in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
    for key, shape in shapes.items():
        shapes[key] = tuple(shape[axis] for axis in _AXES_TO_TORCH.get(len(shape), range(len(shape))))
    assert shapes == published_shapes(name, depths)
    if depths == MODELS[name].depths:
        assert sum(map(prod, shapes.values())) == ROWS[name].parameters


def test_a_file_goes_to_torch_and_back_unchanged(tmp_path):
    model = randomise(torch_nat.NAT(SMALL))
    torch_nat.save(model, tmp_path / "torch")
    jax_nat.save(jax_nat.load(tmp_path / "torch"), tmp_path / "jax")
    again = torch_nat.load(tmp_path / "jax")
    assert again.config == model.config
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_a_model_born_in_jax_is_read_by_torch(tmp_path):
    model = nnx.jit(lambda: jax_nat.NAT(SMALL, rngs=nnx.Rngs(3)))()
    model.eval()
    jax_nat.save(model, tmp_path / "model")
    x = images((36, 36))
    with torch.no_grad():
        wanted = torch_nat.load(tmp_path / "model")(torch.from_numpy(x).permute(0, 3, 1, 2))
    actual, wanted = np.asarray(forward(model, x)), wanted.numpy()
    assert np.abs(actual - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_bfloat16_parameters_survive(tmp_path):
    torch_nat.save(randomise(torch_nat.NAT(SMALL)).to(torch.bfloat16), tmp_path / "model")
    model = jax_nat.load(tmp_path / "model")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    assert forward(model, images((32, 32))).dtype == jnp.float32
    assert forward(model, jnp.asarray(images((32, 32)), jnp.bfloat16)).dtype == jnp.bfloat16


def test_bad_files_and_bad_models_are_refused(tmp_path):
    torch_nat.save(torch_nat.NAT(SMALL), tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    (tmp_path / "short").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        jax_nat.load(tmp_path / "short")
    with pytest.raises(TypeError, match=r"jax_nat\.NAT, not Linear"):
        jax_nat.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "other")  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


def test_drop_path_drops_whole_samples_in_training_only():
    config = NATConfig.from_json(SMALL.to_json().replace('"drop_path_rate": 0.0', '"drop_path_rate": 0.9'))
    model = nnx.jit(lambda: jax_nat.NAT(config, rngs=nnx.Rngs(0)))()
    block = model.levels[1].blocks[0]
    assert block.drop_path.rate == pytest.approx(0.9)
    x = jnp.ones((64, 3, 3, 64))
    kept = np.asarray(block.drop_path(x)).reshape(64, -1)
    assert set(np.unique(kept.max(axis=1).round(3))) == {0.0, 10.0}
    assert (kept.min(axis=1) == kept.max(axis=1)).all()
    model.eval()
    assert (block.drop_path(x) == x).all()


def test_a_training_step_changes_every_parameter():
    config = NATConfig.from_json(SMALL.to_json().replace('"drop_path_rate": 0.0', '"drop_path_rate": 0.1'))
    model = nnx.jit(lambda: jax_nat.NAT(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))()

    @nnx.jit
    def step(model, x):
        gradients = nnx.grad(lambda m: jnp.mean(m(x).astype(jnp.float32) ** 2 + m(x)))(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - g, nnx.state(model, nnx.Param), gradients))
        return gradients

    for place, gradient in nnx.to_flat_state(step(model, images((32, 32), batch=4))):
        assert gradient[...].dtype == jnp.float32
        assert float(jnp.abs(gradient[...]).max()) > 0, place


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_equal_torch(rank):
    name, window = (
        f"NeighborhoodAttention{rank}D",
        {"stride": 2, "dilation": 2, "is_causal": [True, False, False][:rank]},
    )
    theirs = getattr(torch_nat, name)(48, 3, 3, **window, rel_pos_bias=True, qk_scale=0.3)
    ours = getattr(jax_nat, name)(48, 3, 3, **window, rel_pos_bias=True, qk_scale=0.3, rngs=nnx.Rngs(0))
    randomise(theirs)
    for part in ("qkv", "proj"):
        layer = getattr(theirs, part)
        getattr(ours, part).kernel[...] = jnp.asarray(layer.weight.detach().numpy().T)
        getattr(ours, part).bias[...] = jnp.asarray(layer.bias.detach().numpy())
    ours.rpb[...] = jnp.asarray(theirs.rpb.detach().numpy())
    x = np.random.default_rng(1).standard_normal((2, *(9, 7, 6)[:rank], 48)).astype(np.float32)
    with torch.no_grad():
        agree(ours(x), theirs(torch.from_numpy(x)))


def gelu_by_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GELU and its derivative in float64."""
    below = 0.5 * np.vectorize(erfc)(-x * 0.5**0.5)
    return x * below, below + x * np.exp(-0.5 * x * x) / (2 * np.pi) ** 0.5


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_gelu_is_rounded_once(dtype):
    """To half a unit in the last place, but for float32's own error; jax.nn.gelu is off by several."""
    x = jnp.asarray(np.random.default_rng(0).uniform(-12, 12, 20_000), dtype)
    value, slope = gelu_by_numpy(np.asarray(x, np.float64))
    half_unit = float(jnp.finfo(dtype).eps) / 2
    subnormal = float(jnp.finfo(dtype).smallest_subnormal) / 2

    def worst(actual, expected):
        error = np.abs(np.asarray(actual, np.float64) - expected)
        return (error / (half_unit * np.abs(expected) + subnormal + 2e-6)).max()

    assert worst(jax.jit(_gelu)(x), value) <= 1
    assert worst(jax.vmap(jax.grad(_gelu))(x), slope) <= 1
    if dtype != jnp.float32:
        assert worst(jax.nn.gelu(x, approximate=False), value) > 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_gelu_far_out(dtype):
    x = jnp.asarray([0, 20, -20, float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).min)], dtype)
    np.testing.assert_array_equal(_gelu(x), jnp.maximum(x, 0))
    np.testing.assert_array_equal(jax.vmap(jax.grad(_gelu))(x), jnp.asarray([0.5, 1, 0, 1, 0], dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_gelu_is_one_fusion(dtype):
    """One pass over x and one erf, and nothing computed in x's dtype, which XLA would put in a kernel of its own."""
    lowered = jax.jit(_gelu).lower(jax.ShapeDtypeStruct((64, 384), dtype))
    multiplications = [line for line in lowered.as_text().splitlines() if "stablehlo.multiply" in line]
    assert multiplications and all(line.endswith("xf32>") for line in multiplications)
    program = lowered.compile().as_text()
    assert program.count(" erf(") == 1
    entry = [
        line for line in program[program.index("ENTRY") :].splitlines() if " = " in line and "parameter(" not in line
    ]
    assert len(entry) == 1 and " fusion(" in entry[0]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 3"):
        jax_nat.NeighborhoodAttention1D(10, 3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"input has shape \(2, 5, 8\)"):
        nnx.eval_shape(lambda: jax_nat.NeighborhoodAttention2D(8, 2, 3, rngs=nnx.Rngs(0))(jnp.zeros((2, 5, 8))))
    with pytest.raises(ValueError, match=r"images have shape \(1, 3, 32, 32\)"):
        nnx.eval_shape(lambda: jax_nat.NAT(SMALL, rngs=nnx.Rngs(0))(jnp.zeros((1, 3, 32, 32))))
    with pytest.raises(ValueError, match="no model 'nat_huge'"):
        jax_nat.create_model("nat_huge", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"drop rate 1\.0"):
        jax_nat.NeighborhoodAttention1D(8, 2, 3, proj_drop=1.0, rngs=nnx.Rngs(0))
