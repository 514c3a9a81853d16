"""Show a model as it is seen from [0, 1], to attacks and checks that know no other box: inputs of any shape, in any box."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.models.ask import ask, ask_members, member_probabilities
from ensemble_attacks.norms import Box

SAME = 1e-6  # relative differences of eps per width that are rounding


class Boxed(nn.Module):
    """A model as it is seen from [0, 1]: inputs (N, C, H, W) stand for those in the box, of the shape that it takes."""

    asks_itself = True  # it makes inputs of its own

    def __init__(self, model: nn.Module, box: Box, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.boxed: Any = model
        self.box, self.shape = box, shape
        self.training = model.training

    def inputs(self, u: Tensor) -> Tensor:
        """Return what images ``u`` (N, C, H, W) in [0, 1] stand for, (N, ...), in the box."""
        low, width = (bound.to(u) if isinstance(bound, Tensor) else bound for bound in (self.box.low, self.box.width))
        return self.box.clamp(low + width * u.reshape(-1, *self.shape))

    def forward(self, u: Tensor) -> Tensor:
        return ask(self.boxed, self.inputs(u))


class BoxedEnsemble(Boxed):
    """An ensemble as it is seen from [0, 1]."""

    @property
    def vote(self) -> str | None:
        return getattr(self.boxed, "vote", None)

    @property
    def probabilities(self) -> Tensor | None:
        """Return the members' probabilities of a randomized ensemble (`member_probabilities`), else ``None``."""
        return member_probabilities(self.boxed)

    @property
    def own_ties(self) -> bool:
        """Tell whether an adopted ensemble breaks ties in a way of its own."""
        return getattr(self.boxed, "own_ties", False)

    def member_logits(self, u: Tensor) -> Tensor:
        return ask_members(self.boxed, self.inputs(u))

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return self.boxed.aggregate(logits_MNK)


def share_of(eps: float | Tensor, box: Box, who: str) -> float:
    """Return eps as a share of the box's width, that of every feature that has room.

    Raises:
        ValueError: Where it is not the same share of each; ``who`` is what knows one eps.
    """
    width, radius = (torch.as_tensor(value, dtype=torch.double).cpu() for value in (box.width, eps))
    shares = (radius / width)[(width > 0).expand_as(radius / width)]
    if shares.amax() - shares.amin() > SAME * shares.amax():
        raise ValueError(
            f"eps is {shares.amin():.3g} to {shares.amax():.3g} of the box's width, feature by feature, and {who} know "
            "one eps: give eps as the same share of each feature's width, or attack with MORA or APGD"
        )
    return shares.mean().item()


def seen_from_unit_box(model: nn.Module, x: Tensor, box: Box) -> tuple[Boxed, Tensor]:
    """Return a model, and inputs (N, ...), as they are seen from [0, 1].

    Inputs that are no images become images of one pixel, with a channel for each feature.
    """
    kind = BoxedEnsemble if hasattr(model, "member_logits") and hasattr(model, "aggregate") else Boxed
    seen = box.levels(x).to(x.dtype).clamp(0, 1)
    return kind(model, box, tuple(x.shape[1:])), seen if x.dim() == 4 else seen.reshape(len(x), -1, 1, 1)
