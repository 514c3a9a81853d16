"""Define the member networks, each of which takes images in [0, 1], normalises them itself and returns logits (N, K)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMALIZATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class Normalize(nn.Module):
    """A module that returns ``(x - mean) / std`` per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def activation(negative_slope: float) -> Callable[[Tensor], Tensor]:
    """Return ReLU, or leaky ReLU where the slope is not 0."""
    return partial(F.leaky_relu, negative_slope=negative_slope) if negative_slope else F.relu


class BasicBlock(nn.Module):
    """A block of two 3x3 convolutions and a shortcut (He et al. 2016, section 4.2).

    Where the planes grow, option A, the default, subsamples the shortcut and pads it with zeros; option B (``projection``)
    is a 1x1 convolution with batch norm.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, projection: bool, negative_slope: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.pad, self.activation = stride, (planes - in_planes) // 2, activation(negative_slope)
        self.shortcut: nn.Module | None = None
        if projection and self.pad:
            convolution = nn.Conv2d(in_planes, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(planes))
        self.sum = nn.Identity()  # so that the features before the last activation can be seen

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return self.activation(self.sum(out + x))


class ResNet(nn.Module):
    """A CIFAR ResNet of He et al. (2016, section 4.2), of depth 6n + 2, with 16-32-64 planes.

    ``normalization`` is mean and standard deviation by channel, ``negative_slope`` that of a leaky ReLU.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        projection: bool = False,
        negative_slope: float = 0.0,
        normalization: tuple[Sequence[float], Sequence[float]] = NORMALIZATIONS["cifar10"],
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.activation = activation(negative_slope)
        self.normalize = Normalize(*normalization)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        block = partial(BasicBlock, projection=projection, negative_slope=negative_slope)
        self.layer1 = self._stage(block, 16, 16, 1, blocks)
        self.layer2 = self._stage(block, 16, 32, 2, blocks)
        self.layer3 = self._stage(block, 32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight)

    @staticmethod
    def _stage(
        block: Callable[[int, int, int], nn.Module], in_planes: int, planes: int, stride: int, blocks: int
    ) -> nn.Sequential:
        first = block(in_planes, planes, stride)
        return nn.Sequential(first, *(block(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))

    def pre_activations(self) -> list[nn.Module]:
        """Return the modules that put out the features before each nonlinearity, in order, and the logits."""
        modules: list[nn.Module] = [self.bn1]
        for block in (*self.layer1, *self.layer2, *self.layer3):
            modules += [block.get_submodule("bn1"), block.get_submodule("sum")]
        return [*modules, self.linear]


class ConvNet(nn.Module):
    """A small network for the 1x8x8 digits, which has two convolutions, one pooling and two linear layers."""

    def __init__(self, num_classes: int = 10, *, in_channels: int = 1, negative_slope: float = 0.0) -> None:
        super().__init__()
        self.activation = activation(negative_slope)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.linear1 = nn.Linear(32 * 4 * 4, 64)
        self.linear2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.conv1(2 * x - 1))
        out = F.max_pool2d(self.activation(self.conv2(out)), 2)
        return self.linear2(self.activation(self.linear1(out.flatten(1))))

    def pre_activations(self) -> list[nn.Module]:
        """Return the modules that put out the features before each nonlinearity, in order, and the logits."""
        return [self.conv1, self.conv2, self.linear1, self.linear2]


class WideBlock(nn.Module):
    """A block of batch norm, ReLU and convolution, twice, and a shortcut (Zagoruyko & Komodakis 2016, Fig. 1a)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = None if in_planes == planes else nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + kept


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko & Komodakis 2016), of depth 6n + 4, with 16-32-64 planes times ``width``."""

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 10,
        *,
        normalization: tuple[Sequence[float], Sequence[float]] = NORMALIZATIONS["cifar10"],
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        planes = [16, 16 * width, 32 * width, 64 * width]
        self.normalize = Normalize(*normalization)
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        stages = []
        for before, after, stride in zip(planes, planes[1:], (1, 2, 2), strict=False):
            stages.append(WideBlock(before, after, stride))
            stages += [WideBlock(after, after, 1) for _ in range(blocks - 1)]
        self.blocks = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(planes[-1])
        self.linear = nn.Linear(planes[-1], num_classes)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.blocks(self.conv1(self.normalize(x)))))
        return self.linear(out.mean((2, 3)))


class Mixer(nn.Module):
    """A depthwise convolution with a shortcut, which mixes places, then a pointwise one, which mixes channels."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.places = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.bn1 = nn.BatchNorm2d(width)
        self.channels = nn.Conv2d(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bn1(F.gelu(self.places(x)))
        return self.bn2(F.gelu(self.channels(x)))


class ConvMixer(nn.Module):
    """A ConvMixer (Trockman & Kolter, "Patches Are All You Need?", 2022), of patches, then ``depth`` mixers of one size."""

    def __init__(
        self,
        width: int = 192,
        depth: int = 8,
        num_classes: int = 10,
        *,
        kernel: int = 5,
        patch: int = 2,
        normalization: tuple[Sequence[float], Sequence[float]] = NORMALIZATIONS["cifar10"],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(*normalization)
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.bn = nn.BatchNorm2d(width)
        self.mixers = nn.Sequential(*(Mixer(width, kernel) for _ in range(depth)))
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.mixers(self.bn(F.gelu(self.patches(self.normalize(x)))))
        return self.linear(out.mean((2, 3)))


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}b": partial(ResNet, depth, projection=True) for depth in (20, 32, 44, 56, 110)},
    **{f"wrn{depth}x{width}": partial(WideResNet, depth, width) for depth, width in ((16, 2), (16, 4), (28, 10))},
    "convmixer": ConvMixer,
}
MIXED = {"mixed": ("resnet20", "wrn16x2", "convmixer")}  # members that differ, in turn


def networks(architecture: str, members: int) -> list[str]:
    """Return the architecture of every member: the one named, or the next of those that are mixed."""
    prefix, dash, name = architecture.rpartition("-")
    chosen = MIXED.get(name, (name,))
    return [f"{prefix}{dash}{chosen[index % len(chosen)]}" for index in range(members)]
