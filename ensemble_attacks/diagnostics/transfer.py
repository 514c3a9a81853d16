"""Measure how far adversarial examples carry from one member of an ensemble to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from ensemble_attacks.models.ask import Asked, ask, ask_members, beside
from ensemble_attacks.models.ensembles import asks_each
from ensemble_attacks.scores import decided

BATCH = 250


def transfer_matrix(members: Sequence[nn.Module] | nn.ModuleList, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    """Return the share (%) of the images crafted on member i (row) that member j gets wrong, (M, M).

    The attack is torchattacks' PGD with steps of eps / 4, on that member alone, from the images that all members get right
    (NaN, if there are none). Scores that decide nothing (`ensemble_attacks.scores.decided`) are no success.

    Args:
        members: modules, each (N, C, H, W) in [0, 1] -> logits (N, K).
        x, y: images (N, C, H, W) and labels (N,).
        eps: Linf radius in pixel units of [0, 1].
        steps: the number of gradient steps.
    """
    members = list(members)
    right = right_for_all(members, x, y)
    x, y = x[right], y[right]
    rows = []
    for member in members:
        crafted = crafted_on(member, x, y, eps=eps, steps=steps)
        rows.append(torch.stack([fooled(other, crafted, y).double().mean() for other in members]))
    return 100 * torch.stack(rows).cpu()


def crafted_on(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    """Return images (N, C, H, W) of torchattacks' PGD on a model, with steps of eps / 4."""
    attack = torchattacks.PGD(Asked(model), eps=eps, alpha=eps / 4, steps=steps)
    parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
    return torch.cat([attack(*part) for part in parts]) if len(x) else x


@torch.no_grad()
def right_for_all(members: Sequence[nn.Module], x: Tensor, y: Tensor) -> Tensor:
    """Return the samples that every member classifies rightly, (N,) bool."""
    return torch.stack([ask(member, x).argmax(1) == y for member in members]).all(0)


@torch.no_grad()
def fooled(member: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the samples that a member gets wrong, by scores that decide something, (N,) bool."""
    scores_NK = ask(member, x)
    return (scores_NK.argmax(1) != y) & decided(scores_NK)


class Member(nn.Module):
    """A member of an ensemble that runs as the ensemble itself runs it: (N, C, H, W) -> (N, K).

    Where the ensemble asks each of its networks by itself, only the member's own is run; else all of them are.
    """

    def __init__(self, ensemble: nn.Module, index: int) -> None:
        super().__init__()
        self.ensemble, self.index = ensemble, index
        self.alone = asks_each(ensemble)
        self.training = ensemble.training

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.ensemble
        if not self.alone:
            return ask_members(net, x)[self.index]
        member = net.members[self.index]
        return ask(member, beside(member, x), f"members[{self.index}]").to(x.device)


def draw_transfer(axes: Any, shares: Tensor) -> None:
    """Draw the matrix as a heat map on a figure's axes."""
    drawn = axes.imshow(shares.numpy(), vmin=0, vmax=100, cmap="viridis")
    for i, row in enumerate(shares.tolist()):
        for j, share in enumerate(row):
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color="white" if share < 60 else "black")
    axes.set(xlabel="fooled member", ylabel="crafted on member", xticks=range(len(shares)), yticks=range(len(shares)))
    axes.figure.colorbar(drawn, label="fooled (%)")
