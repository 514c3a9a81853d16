"""Bring inputs of any shape and box to AutoAttack's attacks, which know images in [0, 1], and carry back what they find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.descent.balls import make_ball
from ensemble_attacks.judge import judge
from ensemble_attacks.models.boxed import Boxed, seen_from_unit_box, share_of
from ensemble_attacks.norms import UNIT
from ensemble_attacks.validation import check_eps, check_images, check_labels, check_norm, check_radius

SLOTS = ("apgd", "apgd_targeted", "fab", "square")  # the original's attacks, whose settings are carried over
KNOW_ONE = "AutoAttack's own attacks"


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
    share = share_of(eps, box, KNOW_ONE)
    made = [name for name in adversary.attacks_to_run if not isinstance(name, str)]
    if made:
        raise ValueError(f"{type(made[0]).__name__} was made on the model itself: name it, so that it is made on its box")
    module, seen = seen_from_unit_box(adversary.model, x, box)
    custom = adversary.attacks_to_run if adversary.version == "custom" else ()
    inner = type(adversary)(
        module,
        norm,
        share,
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
    for name in ("draws", "eot_iter", "steps", "on_attack"):
        setattr(inner, name, getattr(adversary, name))
    return inner, seen


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
