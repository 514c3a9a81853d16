"""Implement ``multiresolution``: Ensemble everything everywhere (Fort & Lakshminarayanan, "Ensemble Everything Everywhere:
Multi-scale Aggregation for Adversarial Robustness", arXiv:2408.05446).

One network sees a stack of noisy copies of the image at several resolutions, linear probes read its intermediate layers, and
CrossMax aggregates them.

It follows the published notebook, including where that departs from the paper: the noise is uniform in [0, 1) times its
strength, and the contrast is that of the colour draw (``faithful_contrast_bug``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses import standard
from defenses.architectures import NORMALIZATIONS, ConvNet, ResNet
from defenses.crossmax import check_k, crossmax
from defenses.draws import OwnDraws
from defenses.stack import Stack, resize
from defenses.standard import cross_entropy_sum
from defenses.training import Batch, Recipe, adam
from defenses.training.ascent import sign_ascent
from ensemble_attacks.validation import check_positive

PREFIX = "multiresolution-"  # of the network's name


class Probe(nn.Sequential):
    """A linear read-out of features, which are flattened and batch-normalised first: (N, ...) -> (N, K)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.BatchNorm1d(features), nn.Linear(features, num_classes))


class Multiresolution(OwnDraws):
    """A self-ensemble that aggregates the probes of one network, and its own logits, by CrossMax.

    The probes share one draw of the stack, the network's logits have another. While training, the probes learn on features
    that they do not change.

    Args:
        stages: the network as modules to run one after another; the last puts out the logits (N, K).
        taps: the stages before which a probe reads.
        stack: what the network sees.
        k: CrossMax's rank among the predictors (probes and logits).
        size: the size to which the stack is resized, in pixels; ``None``: it is not resized.
        mean, std: the mean and standard deviation by channel of the image, that the stack is normalised by.
        image_size: the size of the images, in pixels.
        num_classes: the number of classes.
        seed: the seed of the draws; ``None``: fresh ones in every process.

    Raises:
        TypeError, ValueError: Where taps, ``k`` or ``size`` cannot be used.
    """

    mean: Tensor
    std: Tensor
    vote = None

    def __init__(
        self,
        stages: Sequence[nn.Module],
        taps: Sequence[int],
        stack: Stack,
        *,
        k: int = 3,
        size: int | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int = 32,
        num_classes: int = 10,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if any(not 0 < tap < len(stages) for tap in taps):
            raise ValueError(f"taps {tuple(taps)}: each must lie between 1 and {len(stages) - 1}, the network's stages")
        if size is not None:
            check_positive("size", size)
        check_k(k, len(taps) + 1)
        copies = len(stack.resolutions)
        self.stages, self.taps, self.stack, self.k, self.size = nn.ModuleList(stages), tuple(taps), stack, k, size
        self.register_buffer("mean", torch.tensor(mean).repeat(copies).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).repeat(copies).view(-1, 1, 1), persistent=False)
        self.own_draws(seed)
        self.eval()
        with torch.no_grad():
            side = size or image_size
            seen = self._read(torch.zeros(2, len(mean) * copies, side, side))
        self.train()
        self.probes = nn.ModuleList(Probe(features[0].numel(), num_classes) for features in seen[:-1])

    def _read(self, z: Tensor) -> list[Tensor]:
        """Return the features at the taps, and the logits."""
        seen = []
        for index, stage in enumerate(self.stages):
            if index in self.taps:
                seen.append(z)
            z = stage(z)
        return [*seen, z]

    def _see(self, x: Tensor, generator: torch.Generator) -> Tensor:
        z = self.stack(x, generator, self.draws_for(len(x)))
        if self.size is not None:
            z = resize(z, self.size, self.size)
        return (z - self.mean) / self.std

    def member_logits(self, x: Tensor) -> Tensor:
        """Return the logits of the probes and of the network, (M, N, K), from two draws."""
        generator = self.next_draws()
        *features, _ = self._read(self._see(x, generator))
        if self.training:
            features = [feature.detach() for feature in features]
        own = self._read(self._see(x, generator))[-1]
        return torch.stack([*(probe(feature) for probe, feature in zip(self.probes, features, strict=True)), own])

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        """Return the scores (N, K) that CrossMax makes of logits (M, N, K)."""
        return crossmax(logits_MNK, self.k)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.member_logits(x))


class SelfEnsembles(nn.Module):
    """A group of self-ensembles that are aggregated by the median CrossMax of their scores.

    Args:
        members: `Multiresolution` models.
    """

    vote = None

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)

    def own_draws(self, seed: int | None = None, device: str | torch.device = "cpu") -> None:
        """Start the members' generators, at ``seed`` and its successors, or anywhere (`OwnDraws.own_draws`)."""
        for index, member in enumerate(self.members):
            member.own_draws(None if seed is None else seed + index, device)

    @contextmanager
    def frozen_noise(self, seed: int = 0) -> Iterator[None]:
        """Freeze the draws of all members within the context, as `OwnDraws.frozen_noise` does."""
        with ExitStack() as stack:
            for index, member in enumerate(self.members):
                stack.enter_context(member.frozen_noise(seed + index))
            yield

    def member_logits(self, x: Tensor) -> Tensor:
        """Return the logits of all predictors of all members, (M, N, K)."""
        return torch.cat([member.member_logits(x) for member in self.members])

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        """Return the scores (N, K) that CrossMax makes within every member, then among them, of logits (M, N, K)."""
        parts = logits_MNK.split([len(member.probes) + 1 for member in self.members])
        return crossmax(torch.stack([own.aggregate(part) for own, part in zip(self.members, parts, strict=True)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.member_logits(x))


def resnet20(
    num_classes: int = 10, *, resolutions: Sequence[int] = (32, 16, 8, 4), k: int = 3, **options: Any
) -> Multiresolution:
    """Return a self-ensemble on ResNet-20 at 32 pixels, with probes behind the last six blocks and the pooling.

    ``options`` are those of `Stack`.
    """
    net = ResNet(20, num_classes, in_channels=3 * len(resolutions))
    stages = [
        nn.Sequential(net.conv1, net.bn1, nn.ReLU()),
        *net.layer1,
        *net.layer2,
        *net.layer3,
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        net.linear,
    ]
    mean, std = NORMALIZATIONS["cifar10"]
    return Multiresolution(
        stages, range(5, 12), Stack(resolutions, **options), k=k, mean=mean, std=std, num_classes=num_classes
    )


class NormFreeBlock(nn.Module):
    """A block of two 3x3 convolutions on a shortcut, which has no normalisation.

    The branch is multiplied by a scalar that starts at zero (De & Smith, "Batch Normalization Biases Residual Blocks Towards
    the Identity Function", 2020).
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.scale = nn.Parameter(torch.zeros(1))
        self.shortcut = nn.Identity() if in_planes == planes else nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.scale * self.conv2(F.relu(self.conv1(x))))


def resnet18(
    num_classes: int = 10,
    *,
    width: int = 32,
    resolutions: Sequence[int] = (32, 16, 8, 4),
    size: int | None = None,
    k: int = 3,
    **options: Any,
) -> Multiresolution:
    """Return a self-ensemble on a ResNet-18 without batch norm, at 32 pixels or resized to ``size``.

    It has ``width`` planes in the first stage (64 is the usual number), and probes behind the last six blocks. ``options``
    are those of `Stack`.
    """
    planes = [width, width, 2 * width, 4 * width, 8 * width]
    blocks: list[nn.Module] = []
    for before, after, stride in zip(planes, planes[1:], (1, 2, 2, 2), strict=False):
        blocks += [NormFreeBlock(before, after, stride), NormFreeBlock(after, after, 1)]
    stem = nn.Sequential(nn.Conv2d(3 * len(resolutions), width, 3, padding=1), nn.ReLU())
    stages = [stem, *blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(planes[-1], num_classes)]
    for module in (*stem, *(part for block in blocks for part in block.modules())):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    mean, std = NORMALIZATIONS["cifar10"]
    return Multiresolution(
        stages, range(4, 10), Stack(resolutions, **options), k=k, size=size, mean=mean, std=std, num_classes=num_classes
    )


def convnet(num_classes: int = 10, *, resolutions: Sequence[int] = (8, 4, 2), k: int = 2, **options: Any) -> Multiresolution:
    """Return a small self-ensemble for the 1x8x8 digits, with probes behind both convolutions and the first linear layer."""
    net = ConvNet(num_classes, in_channels=len(resolutions))
    stages = [
        nn.Sequential(net.conv1, nn.ReLU()),
        nn.Sequential(net.conv2, nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), net.linear1, nn.ReLU()),
        net.linear2,
    ]
    stack = Stack(resolutions, **{"jitter": 1, **options})
    return Multiresolution(stages, range(1, 4), stack, k=k, mean=(0.5,), std=(0.5,), image_size=8, num_classes=num_classes)


def resnet152(num_classes: int = 100, *, weights: Any = None, k: int = 3, **options: Any) -> Multiresolution:
    """Return a self-ensemble as published: torchvision's ResNet-152 at 224 pixels and its ``weights``, with seven probes."""
    from torchvision.models import resnet152 as build

    net = build(weights=weights)
    stack = Stack(**options)
    net.conv1 = nn.Conv2d(3 * len(stack.resolutions), 64, 7, stride=2, padding=3, bias=False)
    net.fc = nn.Linear(2048, num_classes)
    stages = [
        nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool),
        *net.layer1,
        *net.layer2,
        *net.layer3,
        *net.layer4,
        nn.Sequential(net.avgpool, nn.Flatten()),
        net.fc,
    ]
    mean, std = NORMALIZATIONS["imagenet"]
    taps = (20, 30, 35, 40, 45, 50, 52)
    return Multiresolution(stages, taps, stack, k=k, size=224, mean=mean, std=std, num_classes=num_classes)


SELF_ENSEMBLES: dict[str, Callable[..., Multiresolution]] = {
    f"{PREFIX}convnet": convnet,
    f"{PREFIX}resnet20": resnet20,
    f"{PREFIX}resnet18": resnet18,
    f"{PREFIX}resnet152": resnet152,
}


def light_adversarial_loss(batch: Batch) -> Tensor:
    """Return `standard.loss` on images one signed step of eps away, made in eval mode from one draw, as in the notebook."""
    nets = len(getattr(batch.ensemble, "members", [None]))

    def objective(x: Tensor) -> Tensor:
        own = batch.logits(x).unflatten(0, (nets, -1))[:, -1]
        return torch.stack([F.cross_entropy(logits_NK, batch.y, reduction="none") for logits_NK in own]).sum(0)

    with batch.crafting():
        adversarial = sign_ascent(objective, batch.x, eps=batch.data.eps, step=batch.data.eps, steps=1)
    return cross_entropy_sum(batch.logits(adversarial), batch.y)


RECIPE = Recipe(
    name="multiresolution",
    loss=standard.loss,
    optimizer=adam,
    max_lr=1e-3,
    prefix=PREFIX,
    fewest_members=1,
    summary="Ensemble everything everywhere (Fort & Lakshminarayanan 2024): multi-resolution stack, probes trained beside "
    "the network, CrossMax; Adam, weight decay 1e-4.",
)


LIGHT_AT = replace(
    RECIPE,
    name="multiresolution_at",
    loss=light_adversarial_loss,
    summary=f"{RECIPE.summary} Light adversarial training: on images one signed step away.",
)
