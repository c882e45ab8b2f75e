"""Smoothed gradients, against gradients that are known and against what noise must do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_nat
from natcore.models import NATConfig
from torch_nat.saliency import saliency_map, smoothed_gradients


class Quadratic(nn.Module):
    """Logit c is the sum of weight[c] * x + x**2 / 2: its gradient is weight[c] + x."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(x)
        return (self.weight[None] * x[:, None] + x[:, None] ** 2 / 2).flatten(2).sum(-1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_without_noise_it_is_the_gradient(generator: torch.Generator):
    model, images = Quadratic(generator), torch.randn(4, 2, 4, 5, generator=generator, dtype=torch.float64)
    classes = torch.tensor([2, 0, 1, 1])
    found = smoothed_gradients(model, images, classes, noise=0)
    torch.testing.assert_close(found, model.weight.detach()[classes] + images)
    assert model.training and model.drop.training and model.weight.grad is None and not images.requires_grad


def test_noise_is_a_share_of_the_range_and_averages_out(generator: torch.Generator):
    """The gradient being weight + x, what is averaged beside it is the noise itself."""
    model = Quadratic(generator).eval()
    images = (
        torch.rand(2, 2, 4, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 50])[:, None, None, None]
    )
    classes = torch.tensor([0, 1])
    extent = images.flatten(1).amax(1) - images.flatten(1).amin(1)
    for samples in (1, 400):
        noise = smoothed_gradients(model, images, classes, samples=samples, noise=0.2, generator=generator)
        spread = (noise - model.weight.detach()[classes] - images).flatten(1).std(1)
        torch.testing.assert_close(spread, 0.2 * extent / samples**0.5, rtol=0.35, atol=0)


def test_default_class_is_the_models_own(generator: torch.Generator):
    model = Quadratic(generator)
    images = torch.randn(5, 2, 4, 5, generator=generator, dtype=torch.float64)
    classes = model.eval()(images).argmax(1)
    assert len(set(classes.tolist())) > 1
    torch.testing.assert_close(smoothed_gradients(model, images, noise=0), model.weight.detach()[classes] + images)


def test_a_seed_makes_it_reproducible_on_a_nat():
    torch.manual_seed(0)
    config = NATConfig(32, (1, 1), (1, 2), 2, kernel_size=3, in_chans=1, num_classes=10)
    model, images = torch_nat.NAT(config), torch.randn(2, 1, 24, 24)
    first, second, other = (
        smoothed_gradients(model, images, samples=3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other) and first.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_maps_are_the_largest_channel_cut_at_the_99th_percentile(generator: torch.Generator):
    gradients = torch.randn(2, 3, 40, 40, generator=generator)
    gradients[1] = 0
    gradients[0, 1, 0, 0] = -1000
    maps = saliency_map(gradients)
    assert maps.shape == (2, 40, 40) and maps[1].max() == 0 and maps.max() == 1 and maps[0, 0, 0] == 1
    assert 10 <= (maps[0] == 1).sum() <= 17
    worth = gradients[0].abs().amax(0)
    assert torch.equal(maps[0].flatten().sort().values[:1000], maps[0].flatten()[worth.flatten().argsort()][:1000])


def test_wrong_arguments_are_refused(generator: torch.Generator):
    model, images = Quadratic(generator), torch.zeros(2, 2, 4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="samples is 0"):
        smoothed_gradients(model, images, samples=0)
    with pytest.raises(ValueError, match=r"classes has shape \(3,\)"):
        smoothed_gradients(model, images, torch.zeros(3, dtype=torch.long))
