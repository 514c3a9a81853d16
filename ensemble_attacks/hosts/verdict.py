"""Ask the attacked model itself what an attack's images are worth."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensemble_attacks.devices import full_precision
from ensemble_attacks.judge import judge
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.preserve import private_random_state
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.scores import decided

SEEN = 8  # images whose scores tell models apart, and whether one is random
JUDGING_SEED = 2**31 - 2  # of the draws of a random model, none of which an attack saw


class Verdict(NamedTuple):
    """A record of what a model says of images.

    Attributes:
        right: the share of right draws, (N,), float64.
        predicted: the last prediction, (N,).
        finite: whether the scores decide (`decided`) in every draw, (N,) bool.
    """

    right: Tensor
    predicted: Tensor
    finite: Tensor


@full_precision()
@torch.no_grad()
def verdict(model: nn.Module, images: Tensor, labels: Tensor, *, device: torch.device | str, draws: int | None) -> Verdict:
    """Return what a model, asked on its device, says of images (N, ...); ``draws`` of a random one, else ``None``."""
    if draws is None:
        scores_NK = ask(model, images.to(device)).to(labels.device)
        return Verdict((scores_NK.argmax(1) == labels).double(), scores_NK.argmax(1), decided(scores_NK))
    with private_random_state(JUDGING_SEED, model):
        scores_DNK = torch.stack([ask(model, images.to(device)).to(labels.device) for _ in range(draws)])
    right_DN = scores_DNK.argmax(-1) == labels
    finite = decided(scores_DNK.flatten(0, 1)).view_as(right_DN).all(0)
    return Verdict(right_DN.double().mean(0), scores_DNK[-1].argmax(1), finite)


@torch.no_grad()
def scores(model: nn.Module, x: Tensor, device: torch.device | str) -> Tensor:
    """Return the model's scores of some images (N, K), on the processor, by which models are told apart."""
    with private_random_state(0, model):
        return ask(model, x.to(device)).cpu()


def clean_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    device: torch.device | str,
    seed: int,
    draws: int,
    batch_size: int,
    box: Box = UNIT,
) -> float:
    """Return the share of right predictions on images (N, ...), in [0, 1]; of a random model, the mean over ``draws``."""
    random = len(x) and structure_of(model, x[:SEEN].to(device), seed=seed).random
    room = box.diameter("Linf", x[0]) if len(x) else 1.0
    given: dict[str, Any] = {"eps": room, "batch_size": batch_size, "draws": draws if random else 1, "box": box}
    return judge(model, x, y, x, **given).accuracy
