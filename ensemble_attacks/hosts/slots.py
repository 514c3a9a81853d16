"""Run the original's own attacks, each of which AutoAttack holds as an attribute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.attacks.foreign import rounded
from ensemble_attacks.models.ask import default_dtype

SLOTS: dict[str, tuple[str, dict[str, Any]]] = {  # the original's attribute, and what its loop sets before every use
    "apgd-ce": ("apgd", {"loss": "ce"}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgd_targeted", {}),
    "fab": ("fab", {"targeted": False}),
    "fab-t": ("fab", {"targeted": True, "n_restarts": 1}),
    "square": ("square", {}),
}
PACKAGES = ("autoattack", "pyautoattack")
QUERIES = 50  # of Square for each step of the others, as it has 5000 beside their 100


def is_original(attack: object) -> bool:
    """Tell whether an attack is the original's, and nothing that a user put in its place."""
    return type(attack).__module__.partition(".")[0] in PACKAGES


def shorten(adversary: Any, steps: int) -> None:
    """Give the original's attacks another number of steps than their 100, and Square as many queries in proportion."""
    for slot in ("apgd", "apgd_targeted", "fab"):
        getattr(adversary, slot).n_iter = steps
    adversary.square.n_queries = QUERIES * steps


def moved(x: Tensor, images: Tensor) -> Tensor:
    """Return which images (N, ...) one of the original's attacks saw fooled, (N,) bool: others come back as they were."""
    if images.shape != x.shape:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return (images.float() != x.float()).flatten(1).any(1)


def perturb(adversary: Any, name: str, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Return what the original's attack of a name makes of one batch, in the images' type.

    It crafts in float32, as its noise is, and keeps the settings that it had before.
    """
    slot, loops_own = SLOTS[name]
    attack = getattr(adversary, slot)
    before = dict(vars(attack)) if is_original(attack) else {}
    for key, value in (loops_own | {"seed": seed}).items():
        setattr(attack, key, value)
    try:
        with default_dtype(torch.float32):
            images = attack.perturb(x.float().clone(), y.clone()).detach().to(x.device)
    finally:
        if before:
            vars(attack).clear()
            vars(attack).update(before)
    return rounded(x, images, eps=adversary.epsilon, norm=adversary.norm)
