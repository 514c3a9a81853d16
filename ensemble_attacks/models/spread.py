"""Share a batch among devices: each holds a copy of the model, and answers about its own images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import reason
from ensemble_attacks.models.adopted import AdoptedEnsemble
from ensemble_attacks.models.ask import ask, ask_members, beside, devices_of
from ensemble_attacks.models.structure import structure_of

logger = logging.getLogger(__name__)


class Spread(nn.Module):
    """A model of which the first copy is itself: images (N, ...) -> scores (N, K), both where it lies.

    The host tells one device after another what to compute, so that they compute at the same time.
    """

    asks_itself = True  # as of `Asked`

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copies)
        self.training = copies[0].training

    def forward(self, x: Tensor) -> Tensor:
        return self._each(ask, x, dim=0)

    def _each(self, asked: Callable[[Any, Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
        shares = zip(self.copies, x.chunk(len(self.copies)), strict=False)  # of few images, some devices have none
        answers = [asked(model, beside(model, part)) for model, part in shares]
        return torch.cat([answer.to(x.device) for answer in answers], dim)


class SpreadEnsemble(Spread):
    """An ensemble of which each device holds a copy."""

    @property
    def first(self) -> Any:
        return self.copies[0]

    @property
    def vote(self) -> Any:
        return getattr(self.first, "vote", None)

    def member_logits(self, x: Tensor) -> Tensor:
        return self._each(ask_members, x, dim=1)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return self.first.aggregate(logits_MNK)


def spread(model: nn.Module, devices: Sequence[str], x: Tensor) -> nn.Module:
    """Return the model with a copy on each device but the first, where it lies; itself where it cannot be shared.

    A random model is not shared, as its draws follow the place in the batch, nor one with a front end, which attacks ask for
    by name, or whose parts lie on several devices already, or that cannot be copied, nor an `AdoptedEnsemble`, which books
    what is claimed for it; a message says so.

    Args:
        model: images (N, ...) -> scores (N, K).
        devices: those to share it among.
        x: a few images on the model's device.
    """
    if len(devices) == 1:
        return model
    why = obstacle(model, x)
    if not why:
        try:
            copies = [model, *(copy.deepcopy(model).to(device) for device in devices[1:])]
            return (SpreadEnsemble if hasattr(model, "member_logits") else Spread)(copies)
        except Exception as error:  # networks that cannot be copied say so in many ways
            why = f"it cannot be copied ({reason(error)})"
    logger.warning("%s is not shared among %s: %s", type(model).__name__, ", ".join(devices), why)
    return model


def obstacle(model: nn.Module, x: Tensor) -> str:
    """Say why something else cannot stand for a model, by its answers alone, and answer for each image by itself."""
    if isinstance(model, AdoptedEnsemble):
        return "its members are claimed for it"
    if len(devices_of(model)) > 1:
        return "its parts lie on several devices"
    structure = structure_of(model, x)
    if structure.random or structure.known_draws:
        return "it is random"
    return "attacks ask for its front end by name" if structure.frontend else ""
