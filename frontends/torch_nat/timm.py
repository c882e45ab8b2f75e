"""The family for timm: ``import torch_nat.timm`` registers it.

    import timm, torch_nat.timm
    model = timm.create_model("dinat_s_tiny", num_classes=10)

Names are those of `natcore.models.MODELS` and, for ViT-rpb, also the published ``vitrpb_small`` and
``vitrpb_base``. Keywords are timm's, and any field of `natcore.models.NATConfig`. ``pretrained=True``
loads the published weights from where their authors keep them; bias tables are resized where
``kernel_size`` (ViT-rpb: ``img_size``) is not theirs. ``drop_rate`` means what it means in the published
code: dropout after the patch embedding and every projection, not before the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

try:
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
    )
except ImportError as error:
    raise ImportError("torch_nat.timm needs timm 1.0 or newer: pip install 'timm>=1.0'") from error

from natcore.checkpoints import resize_rpb
from natcore.models import MODELS, NATConfig
from torch_nat.models import NAT

__all__ = ["TimmNAT"]

#: Names in the published code that differ from those of MODELS.
_PUBLISHED_NAMES = {"vitrpb_small": "vit_rpb_small", "vitrpb_base": "vit_rpb_base"}
_WEIGHTS = "https://shi-labs.com/projects/"


class TimmNAT(NAT):
    """A NAT with what timm's tools call: features, classifier, intermediates.

    Raises ValueError for a ``global_pool`` other than "avg" and for an ``img_size`` that a ViT-rpb cannot have.
    """

    def __init__(
        self,
        cfg: NATConfig,
        img_size: int | Sequence[int] | None = None,
        global_pool: str = "avg",
        **changes: Any,
    ):
        if global_pool not in ("avg", None):
            raise ValueError(
                f"global_pool is {global_pool!r}, but these models average: 'avg' (forward_features: none)."
            )
        if img_size is not None and cfg.layout == "vit_rpb":
            changes.setdefault("kernel_size", _tokens(img_size, cfg.patch_size))
        super().__init__(replace(cfg, **changes))
        self.num_classes = self.config.num_classes
        self.num_features = self.head_hidden_size = self.config.width(len(self.config.depths) - 1)
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": name} for width, reduction, name in _taps(self.config)
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map after its norm, ``[batch, height, width, num_features]``."""
        return self.norm(self._run(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What forward_features gives, averaged, to logits; with pre_logits, the average."""
        pooled = x.mean(dim=(1, 2))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps before downsampling of the stages in ``indices`` (of the blocks, where there is one stage).

        With ``norm``, the last goes through the model's norm. Arguments as in timm's models.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; the maps are NCHW or NHWC.")
        taken, last = self._taken(indices)
        final = len(self.feature_info) - 1
        x, maps = self._run(x, taken, last if stop_early else final)
        normed = norm and final in taken
        maps = [self.norm(y) if normed and index == final else y for index, y in zip(taken, maps, strict=True)]
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        if intermediates_only:
            return maps
        return x if stop_early and last < final else self.norm(x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the maps in ``indices`` do not need; the model then gives features alone."""
        taken, last = self._taken(indices)
        trunk: nn.ModuleList = self.get_submodule(self.config.trunk_name)  # type: ignore[assignment]
        if prune_norm or last < len(trunk) - 1:
            self.norm = nn.Identity()
        del trunk[last + 1 :]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, freshly initialised; 0 classes: none."""
        if global_pool not in ("avg", None):
            raise ValueError(f"global_pool is {global_pool!r}, but these models average: 'avg'.")
        self.config = replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        weight = self.patch_embed.norm.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for layer-wise learning rates: stages, or blocks."""
        trunk = self.config.trunk_name
        stage = rf"^{trunk}\.(\d+)"
        if self.config.flat:
            blocks: Any = stage
        else:
            blocks = stage if coarse else [(rf"{stage}\.downsample", (0,)), (rf"{stage}\.blocks\.(\d+)", None)]
        return {"stem": "^patch_embed", "blocks": blocks if isinstance(blocks, str) else [*blocks, ("^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise NotImplementedError("gradient checkpointing: wrap blocks in torch.utils.checkpoint instead.")

    def _taken(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """The numbers of the maps asked for, in order, and the greatest: all, the last so many, or those given."""
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            indices = list(range(count))[-(indices or count) :]
        if not indices or not all(-count <= index < count for index in indices):
            raise ValueError(f"indices {indices} must be some of the model's {count} maps.")
        taken = sorted({index % count for index in indices})
        return taken, taken[-1]

    def _run(self, x: Tensor, wanted: Sequence[int] = (), last: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """What follows the stages (the blocks, in a flat model) up to number ``last``, and the wanted maps."""
        x, maps = self.pos_drop(self.patch_embed(x)), []
        for index, module in enumerate(self.get_submodule(self.config.trunk_name).children()):
            before, x = (module(x),) * 2 if self.config.flat else module(x)
            maps += [before] if index in wanted else []
            if index == last:
                break
        return x, maps


def _tokens(img_size: int | Sequence[int], patch_size: int) -> int:
    """The side of a square image's map."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width or height % patch_size:
        raise ValueError(f"a ViT-rpb takes square images of whole patches of {patch_size}, not {height} x {width}.")
    return height // patch_size


def _taps(config: NATConfig) -> Iterator[tuple[int, int, str]]:
    """Width, stride and module of every map: of stages or, in a flat model, of blocks."""
    if config.flat:
        yield from ((config.embed_dim, config.patch_size, config.block_name(0, j)) for j in range(config.depths[0]))
    else:
        for i in range(len(config.depths)):
            yield config.width(i), config.patch_size * 2**i, config.stage_name(i)


def _fitted(state: Mapping[str, Tensor], model: TimmNAT) -> dict[str, Tensor]:
    """A published state with its bias tables resized to the model's kernel size."""
    fitted, side = dict(state), 2 * model.config.kernel_size - 1
    for name, tensor in state.items():
        if name.endswith(".rpb") and tensor.shape[-1] != side:
            fitted[name] = torch.from_numpy(resize_rpb(tensor.detach().cpu().numpy(), (side, side)))
            fitted.pop(f"{name.removesuffix('rpb')}relative_position_index", None)  # of the old size
    return fitted


def _cfg(name: str) -> dict[str, Any]:
    """timm's description of a model's published weights."""
    config = MODELS[_PUBLISHED_NAMES.get(name, name)]
    size = 384 if "384" in name else 224
    tokens = size // config.patch_size // 2 ** (len(config.depths) - 1)
    return {
        "url": _WEIGHTS + _file(name),
        "input_size": (3, size, size),
        "fixed_input_size": config.layout == "vit_rpb",
        "pool_size": (tokens, tokens),
        "crop_pct": 1.0 if size == 384 else 0.875,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj.0" if config.layout == "nat" else "patch_embed.proj",
        "classifier": "head",
    }


def _file(name: str) -> str:
    if name in ("nat_mini", "nat_tiny", "nat_small", "nat_base"):
        return f"nat/checkpoints/CLS/{name}.pth"
    if "isotropic" in name or "rpb" in name:
        return f"dinat/checkpoints/isotropic/{name.replace('vit_rpb', 'vitrpb')}_in1k_224.pth"
    base, _, size = name.partition("_384")
    pretraining = "_in22k" if base == "dinat_large" else ""
    return f"dinat/checkpoints/imagenet1k/{base}{pretraining}_in1k_{'384' + size if '384' in name else '224'}.pth"


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    config = MODELS[_PUBLISHED_NAMES.get(name, name)]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": None, "feature_cls": "getter"}  # all maps
        return build_model_with_cfg(
            TimmNAT,
            name,
            pretrained,
            model_cfg=config,
            feature_cfg=features,
            pretrained_filter_fn=_fitted,
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name} for timm.create_model."
    return create


_names = (*MODELS, *_PUBLISHED_NAMES)
default_cfgs = generate_default_cfgs({f"{_name}.in1k": _cfg(_name) for _name in _names})
for _name in _names:
    globals()[_name] = register_model(_entrypoint(_name))
