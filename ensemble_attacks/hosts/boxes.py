"""Bring inputs of any shape and box to AutoAttack's attacks, which know images in [0, 1], and carry back what they find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.descent.balls import make_ball
from ensemble_attacks.judge import judge
from ensemble_attacks.models.ask import ask, ask_members
from ensemble_attacks.models.ensembles import member_probabilities
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.validation import check_eps, check_images, check_labels, check_norm, check_radius

SLOTS = ("apgd", "apgd_targeted", "fab", "square")  # the original's attacks, whose settings are carried over
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


def needs_no_box(adversary: Any, x: object) -> bool:
    """Tell whether AutoAttack's attacks can run on inputs as they are."""
    plain = adversary.box == UNIT and not isinstance(adversary.epsilon, Tensor)
    return plain and (not isinstance(x, Tensor) or x.dim() == 4 or x.dim() < 2)


def from_unit_box(adversary: Any, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
    """Return an AutoAttack with the same settings on the model as it is seen from [0, 1], and the inputs as seen from there.

    Inputs that are no images become images of one pixel, with a channel for each feature.

    Raises:
        TypeError, ValueError: Where inputs, labels or settings cannot be used, eps is not the same share of every feature's
            width, or an attack was made on the model itself.
    """
    box, norm, eps = adversary.box, adversary.norm, adversary.epsilon
    check_eps(eps)
    check_images(x, "x_orig", box=box)
    check_labels(y, x, "y_orig")
    if not len(x):
        raise ValueError("x_orig holds no images")
    check_radius(eps, norm, x[0], box)
    check_norm(norm)
    shares = (torch.as_tensor(eps, dtype=torch.double) / torch.as_tensor(box.width, dtype=torch.double)).flatten()
    if (shares.amax() - shares.amin() > SAME * shares.amax()) or not torch.isfinite(shares).all():
        raise ValueError(
            f"eps is {shares.amin():.3g} to {shares.amax():.3g} of the box's width, feature by feature, and AutoAttack's "
            "own attacks know one eps: give eps as the same share of each feature's width, or attack with MORA or APGD"
        )
    made = [name for name in adversary.attacks_to_run if not isinstance(name, str)]
    if made:
        raise ValueError(f"{type(made[0]).__name__} was made on the model itself: name it, so that it is made on its box")
    module = adversary.model
    kind = BoxedEnsemble if hasattr(module, "member_logits") and hasattr(module, "aggregate") else Boxed
    custom = adversary.attacks_to_run if adversary.version == "custom" else ()
    inner = type(adversary)(
        kind(module, box, tuple(x.shape[1:])),
        norm,
        shares.mean().item(),
        adversary.seed,
        adversary.verbose,
        custom,
        adversary.version,
        device=adversary.device,
        log_path=adversary.log_path,
    )
    for slot in SLOTS:
        own, others = vars(getattr(adversary, slot)), vars(getattr(inner, slot))
        others.update({name: own[name] for name in own if name in others and type(own[name]) in (int, bool, str)})
    for name in ("draws", "eot_iter", "on_attack"):
        setattr(inner, name, getattr(adversary, name))
    seen = box.levels(x).to(x.dtype).clamp(0, 1)
    return inner, seen if x.dim() == 4 else seen.reshape(len(x), -1, 1, 1)


def carried_back(adversary: Any, inner: Any, x: Tensor, y: Tensor, seen: Tensor, found: Tensor) -> Tensor:
    """Return what was found from [0, 1] as inputs in ball and box, the clean ones where nothing has moved.

    What rounding on the way back has made right again is robust: so says the judge, of the model itself.
    """
    for name in ("flags", "stages", "failed", "robust", "disagreement", "robust_accuracy"):
        setattr(adversary, name, getattr(inner, name))
    eps, scale = (1.0, adversary.epsilon) if isinstance(adversary.epsilon, Tensor) else (adversary.epsilon, None)
    images = x.detach().clone()
    rows = torch.nonzero((found.to(seen) != seen).flatten(1).any(1)).squeeze(-1)
    if len(rows):
        moved = next(module for module in inner.model.modules() if isinstance(module, Boxed))
        ball = make_ball(adversary.norm, x[rows], eps, adversary.box, scale)
        images[rows] = ball.project(moved.inputs(found[rows].to(x)))
    if not inner.random:
        verdict = judge(adversary.model, x, y, images, eps=adversary.epsilon, norm=adversary.norm, box=adversary.box)
        adversary.robust = inner.robust | verdict.robust.to(inner.robust)
        adversary.robust_accuracy = adversary.robust.double().mean().item()
    return images
