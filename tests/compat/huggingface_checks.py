"""Run by test_huggingface.py in a process of its own: huggingface_checks.py VERSION_OF_NATTEN | late."""

import inspect
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

import torch_nat
from natcore.models import NATConfig
from torch_nat.compat.natten import install

CONFIGS = {
    "nat": NATConfig(16, (2, 1), (2, 4), 2, kernel_size=3, num_classes=5),
    "nat, layer scale": NATConfig(16, (1, 2), (2, 4), 3, kernel_size=5, layer_scale=0.1, qkv_bias=False, num_classes=2),
    "dinat": NATConfig(16, (2, 1), (2, 4), 2, kernel_size=3, dilations=((1, 4), (2,)), num_classes=5),
    "dinat, layer scale": NATConfig(
        16, (1, 1), (2, 4), 2, kernel_size=3, dilations=((3,), (1,)), layer_scale=0.1, num_classes=0
    ),
}
IMAGES = torch.randn(2, 3, 40, 52, generator=torch.Generator().manual_seed(0))


def ours(config: NATConfig) -> torch_nat.NAT:
    """A model whose every parameter matters: biases, norms and scales too."""
    torch.manual_seed(0)
    model = torch_nat.NAT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain(config) -> dict:
    """What a configuration says, but for where it was read from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def check_conversion(config: NATConfig) -> None:
    """Equal outputs and gradients with converted weights; every bit comes back; files too."""
    import torch_nat.hf as hf

    model = ours(config)
    converted = hf.to_huggingface(model)
    assert type(converted).__name__.startswith("Dinat" if config.dilations else "Nat")
    back = hf.from_huggingface(converted)
    assert back.config == config and same(back.state_dict(), model.state_dict())
    again = hf.to_huggingface(back)
    assert same(again.state_dict(), converted.state_dict())
    expected = model(IMAGES)
    output = converted(IMAGES)
    pairs = zip(expected, output.feature_maps, strict=True) if config.features_only else [(expected, output.logits)]
    pairs = list(pairs)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    sum(a.square().mean() for a, _ in pairs).backward()
    sum(b.square().mean() for _, b in pairs).backward()
    prefix = "" if config.features_only else converted.base_model_prefix
    renamed = hf.parameters_to_huggingface({name: p.grad for name, p in model.named_parameters()}, prefix)
    torch.testing.assert_close({name: p.grad for name, p in converted.named_parameters()}, renamed)
    with tempfile.TemporaryDirectory() as folder:
        converted.save_pretrained(folder)
        loaded = type(converted).from_pretrained(folder)
        assert same(loaded.state_dict(), converted.state_dict())
        assert hf.from_huggingface(loaded).config == config


def check_dinat() -> None:
    """Attention weights, dropout, padding of small maps; no name leaks into natten.functional."""
    import natten.functional
    from transformers.models.dinat import modeling_dinat

    if not natten.__version__.startswith("0.17"):
        assert not hasattr(natten.functional, "natten2dqkrpb")
    assert modeling_dinat.natten2dqkrpb.__name__ == "natten2dqkrpb" and modeling_dinat.repaired_by_torch_nat
    torch.manual_seed(0)
    config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.5)
    layer = modeling_dinat.NeighborhoodAttention(config, dim=16, num_heads=2, kernel_size=3, dilation=2).eval()
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(1, 6, 7, 16)
    out, weights = layer(x, output_attentions=True)
    assert weights.shape == (1, 2, 6, 7, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6, 7))
    torch.testing.assert_close(out, layer(x)[0])
    layer.train()
    assert not torch.allclose(layer(x)[0], out) and (layer(x, True)[1] == 0).float().mean() > 0.3


def check_nat() -> None:
    """The Auto classes, the outputs' fields, initialisation, a loss and its gradients."""
    import transformers
    from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

    import torch_nat.hf as hf

    options = dict(embed_dim=16, depths=[2, 1], num_heads=[2, 4], kernel_size=3, num_labels=4)
    config = AutoConfig.for_model("nat", **options, layer_scale_init_value=1e-2)
    assert isinstance(config, hf.NatConfig) and config.hidden_size == 32
    model = AutoModelForImageClassification.from_config(config).eval()
    assert isinstance(model, hf.NatForImageClassification)
    rpb = model.nat.encoder.levels[0].layers[0].attention.self.rpb
    assert 0 < rpb.std() < 0.04
    output = model(IMAGES, labels=torch.tensor([1, 3]), output_attentions=True, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 3]))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 10, 13, 16), (2, 5, 7, 32), (2, 5, 7, 32)]
    assert output.reshaped_hidden_states[0].shape == (2, 16, 10, 13)
    assert [tuple(x.shape) for x in output.attentions] == [(2, 2, 10, 13, 9), (2, 4, 5, 7, 9)]
    assert torch.equal(model(IMAGES, return_dict=False)[0], model(IMAGES).logits)
    assert model(IMAGES[..., :8, :8]).logits.shape == (2, 4)  # maps of 2 x 2 and 1 x 1: padded
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert (Path(folder) / "config.json").is_file()
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        assert same(loaded.state_dict(), model.state_dict())
        assert plain(loaded.config) == plain(model.config)
        body = AutoModel.from_pretrained(folder)
        assert isinstance(body, hf.NatModel)
        torch.testing.assert_close(body(IMAGES).last_hidden_state, model.nat(IMAGES).last_hidden_state)
    backbone = AutoBackbone.from_config(hf.NatConfig(**options, out_features=["stage1", "stage2"])).eval()
    maps = backbone(IMAGES).feature_maps
    assert [tuple(x.shape) for x in maps] == [(2, 16, 10, 13), (2, 32, 5, 7)] and backbone.channels == [16, 32]
    default = hf.NatConfig()
    assert default.out_features == ["stage4"] and default.stage_names[0] == "stem"
    names = list(inspect.signature(hf.NatConfig).parameters)
    assert names[0] == "patch_size" and "layer_scale_init_value" in names
    for bad, error in ((dict(hidden_act="relu"), NotImplementedError), (dict(patch_size=8), ValueError)):
        try:
            hf.config_from_huggingface(hf.NatConfig(**bad))
        except error:
            continue
        raise AssertionError(bad)
    try:
        hf.config_to_huggingface(NATConfig(16, (1,), (2,), 2, rel_pos_bias=False))
    except NotImplementedError as error:
        assert "rel_pos_bias" in str(error)
    else:
        raise AssertionError
    print("transformers", transformers.__version__)


def check_published_names() -> None:
    """What a published checkpoint of transformers 4 calls its tensors."""
    import torch_nat.hf as hf

    names = set(hf.parameters_to_huggingface(ours(CONFIGS["nat, layer scale"]).state_dict()))
    block = "nat.encoder.levels.0.layers.0."
    assert {
        "nat.embeddings.patch_embeddings.projection.0.weight",
        "nat.embeddings.norm.bias",
        block + "layernorm_before.weight",
        block + "layernorm_after.bias",
        block + "attention.self.rpb",
        block + "attention.self.query.weight",
        block + "attention.output.dense.bias",
        block + "intermediate.dense.weight",
        block + "output.dense.weight",
        block + "layer_scale_parameters",
        "nat.encoder.levels.0.downsample.reduction.weight",
        "nat.encoder.levels.0.downsample.norm.bias",
        "nat.layernorm.weight",
        "classifier.weight",
    } <= names
    for convert in (hf.parameters_to_huggingface, hf.parameters_from_huggingface):
        try:
            convert({"elsewhere.weight": torch.zeros(1)})
        except ValueError as error:
            assert "elsewhere" in str(error)
        else:
            raise AssertionError


def check_too_late() -> None:
    import transformers.models.dinat.modeling_dinat  # noqa: F401

    try:
        install()
    except RuntimeError as error:
        print(error)
    else:
        raise AssertionError("install() after Dinat must raise")
    assert "natten" not in sys.modules and not torch_nat.compat.natten.installing._installed()


def main(version: str) -> None:
    if version == "late":
        check_too_late()
    else:
        from transformers.utils import is_natten_available

        assert not is_natten_available()  # and transformers remembers it, until install
        install(version)
        assert is_natten_available()
        check_nat()
        check_published_names()
        for config in CONFIGS.values():
            check_conversion(config)
            check_conversion(NATConfig(**{**vars(config), "features_only": True, "num_classes": 1000}))
        check_dinat()
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1])
