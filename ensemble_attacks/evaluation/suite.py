"""The attacks that ``evaluate`` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.a3 import A3
from ensemble_attacks.apgd import APGD
from ensemble_attacks.autoattack import STANDARD, standard_autoattack
from ensemble_attacks.base import DescentAttack
from ensemble_attacks.caa import CAA
from ensemble_attacks.descent import Trace
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.evaluation.passes import CountingModel
from ensemble_attacks.mora import MORA
from ensemble_attacks.pgd import PGD


@dataclass(frozen=True)
class Settings:
    """What all attacks of one evaluation share; eps in pixel units of [0, 1]."""

    eps: float
    norm: str = "Linf"
    seed: int = 0
    batch_size: int = 250


@dataclass(frozen=True, eq=False)
class Crafted:
    """What an attack returns.

    Attributes:
        images: (N, C, H, W).
        stages: of a suite, after each of its parts: its own robust flags (N,), and forward and backward passes so far.
        trace: of an attack of this package, its convergence (`Trace.rows`).
    """

    images: Tensor
    stages: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)
    trace: list[dict[str, float]] = field(default_factory=list)


Craft = Callable[[CountingModel, Tensor, Tensor, Settings], Crafted]


@dataclass(frozen=True)
class Entry:
    """A named attack."""

    craft: Craft
    summary: str
    needs_members: bool = False


def _standard(*attacks: str) -> Craft:
    def craft(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        passes: dict[str, tuple[int, int]] = {}
        images, flags = standard_autoattack(
            model,
            x,
            y,
            eps=settings.eps,
            norm=settings.norm,
            seed=settings.seed,
            batch_size=settings.batch_size,
            attacks=attacks,
            on_attack=lambda name: passes.setdefault(name, (model.forwards, model.backwards)),
        )
        return Crafted(images, {name: (flags[name], *passes[name]) for name in attacks if len(attacks) > 1})

    return craft


def _ours(attack: Callable[..., DescentAttack], **arguments: Any) -> Craft:
    def craft(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        made = attack(
            model,
            norm=settings.norm,
            eps=settings.eps,
            seed=settings.seed,
            batch_size=settings.batch_size,
            **arguments,
        )
        made.trace = Trace()
        images = made(x, y).to(x.device)
        rows, stages = made.trace.rows(), {}
        if isinstance(made, MORA) and made.targets:
            sweep = [row for row in rows if row["stage"] < len(made.betas)]
            robust = torch.cat(made.trace.fooled_in).cpu() >= len(made.betas)
            stages["mora"] = (robust, *(sum(row[kind] for row in sweep) for kind in ("forwards", "backwards")))
        return Crafted(images, stages, rows)

    return craft


ATTACKS: dict[str, Entry] = {
    "apgd-ce": Entry(_standard("apgd-ce"), "AutoAttack's APGD on cross-entropy, 100 steps"),
    "apgd-t": Entry(_standard("apgd-t"), "AutoAttack's targeted APGD on DLR, 9 targets x 100 steps"),
    "fab-t": Entry(_standard("fab-t"), "AutoAttack's targeted FAB, 9 targets x 100 steps"),
    "square": Entry(_standard("square"), "AutoAttack's Square, 5000 queries"),
    "autoattack": Entry(_standard(*STANDARD), "the standard AutoAttack: apgd-ce, apgd-t, fab-t, square"),
    "mora": Entry(_ours(MORA), "MORA: five betas x 100 steps", needs_members=True),
    "mora-mt": Entry(
        _ours(MORA, targets=9), "MORA, then its multi-targeted stage: 9 targets x 100 steps", needs_members=True
    ),
    "pgd": Entry(_ours(PGD), "PGD, 5 restarts x 100 steps of eps / 4, as the MORA paper runs it"),
    "cw": Entry(_ours(PGD, loss="margin"), "CW (the margin of the logits), 5 restarts x 100 steps of eps / 4"),
    "a3": Entry(_ours(A3), "A3 (Liu et al. 2022), 28 restarts of up to 60 steps"),
    "caa": Entry(_ours(CAA), "CAA's Linf policy: 9 targets x (50 + 25), then 125 steps"),
    "ea-apgd-ce": Entry(_ours(APGD), "this package's APGD on cross-entropy, 100 steps"),
    "ea-apgd-dlr": Entry(_ours(APGD, loss="dlr"), "this package's APGD on DLR, 100 steps"),
    "ea-apgd-t": Entry(_ours(APGD, loss="dlr-targeted"), "this package's targeted APGD on DLR, 9 targets x 100 steps"),
}


def find_attack(name: str) -> Entry:
    """The attack of that name; ValueError with the nearest one otherwise."""
    if name not in ATTACKS:
        raise unknown_name("attack", name, ATTACKS)
    return ATTACKS[name]
