"""Make ensembles of one network: its views of an image, its draws of dropout, or of noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.votes import Vote
from ensemble_attacks.validation import check_count, check_positive


class Viewed(nn.Module):
    """A network on one view of the images (N, ...), such as a flip or a crop."""

    def __init__(self, net: nn.Module, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.view = net, view

    def forward(self, x: Tensor) -> Tensor:
        return ask(self.net, self.view(x))


class Noisy(nn.Module):
    """A network on images (N, ...) with Gaussian noise of standard deviation ``sigma``, in eval mode, too."""

    def __init__(self, net: nn.Module, sigma: float) -> None:
        super().__init__()
        check_positive("sigma", sigma)
        self.net, self.sigma = net, sigma

    def forward(self, x: Tensor) -> Tensor:
        return ask(self.net, x + self.sigma * torch.randn_like(x))


class Dropping(nn.Module):
    """A network whose dropout stays active in eval mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        if not any(isinstance(part, _DropoutNd) for part in net.modules()):
            raise ValueError(f"{type(net).__name__} has no dropout: its draws would all be the same")
        self.train(net.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.modules():
            if isinstance(part, _DropoutNd):
                part.training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return ask(self.net, x)


def augmented(net: nn.Module, views: Sequence[Callable[[Tensor], Tensor]], vote: str | Vote = "softmax") -> Ensemble:
    """Return test-time augmentation: the network's answers for several views of the images, put together by a vote."""
    return _of_one(net, [Viewed(net, view) for view in views], vote)


def smoothed(net: nn.Module, sigma: float, draws: int, vote: str | Vote = "voting") -> Ensemble:
    """Return randomised smoothing (Cohen, Rosenfeld & Kolter, ICML 2019): votes over draws of Gaussian noise, counted."""
    check_count("draws", draws)
    return _of_one(net, [Noisy(net, sigma)] * draws, vote)


def mc_dropout(net: nn.Module, draws: int, vote: str | Vote = "softmax") -> Ensemble:
    """Return Monte Carlo dropout (Gal & Ghahramani, ICML 2016): the mean probability over draws of dropout."""
    check_count("draws", draws)
    return _of_one(net, [Dropping(net)] * draws, vote)


def _of_one(net: nn.Module, members: Sequence[nn.Module], vote: str | Vote) -> Ensemble:
    training = net.training
    return Ensemble(members, vote).train(training)
