"""Which pixels a score depends on: gradients with respect to the input, smoothed by noise.

Simonyan et al., "Deep Inside Convolutional Networks" (arXiv 1312.6034); Smilkov et al., "SmoothGrad: removing
noise by adding noise" (arXiv 1706.03825). The NAT paper compares its models with such maps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def smoothed_gradients(
    model: nn.Module,
    images: Tensor,
    classes: Tensor | None = None,
    *,
    samples: int = 32,
    noise: float = 0.15,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean over noisy copies of d logit of a class / d image (SmoothGrad's equation 3).

    The model is asked in eval mode and left in its own; gradients of its parameters are not touched.

    Args:
        model: images ``[count, channels, height, width]`` to logits ``[count, classes]``.
        images: as the model takes them (normalised).
        classes: int64 ``[count]``; by default the class that the model gives each image without noise.
        samples: noisy copies of each image, one after the other.
        noise: standard deviation of the Gaussian noise, as a share of each image's own range; the paper finds 0.1
            to 0.2 best. 0 gives the plain gradient.
        generator: of the noise, on the images' device; torch's default one if None.

    Returns:
        ``[count, channels, height, width]``, signed, in the images' dtype.

    Raises:
        ValueError: for samples < 1, a negative noise, or classes that are not one per image.
    """
    if samples < 1 or noise < 0:
        raise ValueError(f"samples is {samples} and noise {noise}; at least 1 sample and a noise >= 0 are needed.")
    if classes is not None and classes.shape != images.shape[:1]:
        raise ValueError(
            f"classes has shape {tuple(classes.shape)}; expected one per image, {tuple(images.shape[:1])}."
        )
    images = images.detach()
    flat = images.flatten(1)
    sigma = noise * (flat.amax(1) - flat.amin(1)).view(-1, *(1,) * (images.dim() - 1))
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            chosen = model(images).argmax(dim=1) if classes is None else classes
        total = torch.zeros_like(images)
        for _ in range(samples if noise else 1):
            drawn = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
            noisy = (images + sigma * drawn).requires_grad_()
            with torch.enable_grad():
                score = model(noisy).gather(1, chosen[:, None]).sum()
            total += torch.autograd.grad(score, noisy)[0]
    finally:
        for module, was in training.items():
            module.training = was
    return total / (samples if noise else 1)


def saliency_map(gradients: Tensor) -> Tensor:
    """``[count, channels, height, width]`` to ``[count, height, width]``: the largest |gradient| of any channel.

    Each map is divided by its 99th percentile and cut at 1, as SmoothGrad shows them: a few outliers would
    otherwise leave all else dark. A map without any gradient stays 0.
    """
    worth = gradients.abs().amax(dim=1)
    flat = worth.flatten(1)
    top = flat.kthvalue(max(1, round(0.99 * flat.shape[1])), dim=1).values[:, None, None]
    return (worth / top.clamp(min=torch.finfo(worth.dtype).tiny)).clamp(max=1)
