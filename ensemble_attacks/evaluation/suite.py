"""The attacks that ``evaluate`` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.a3 import A3
from ensemble_attacks.apgd import APGD
from ensemble_attacks.arc import ARC, check_probabilities
from ensemble_attacks.autoattack import RAND, STANDARD, run_autoattack
from ensemble_attacks.base import CarefulAttack
from ensemble_attacks.bpda import BPDAIdentity
from ensemble_attacks.caa import CAA
from ensemble_attacks.crossmax import CrossMaxTransfer
from ensemble_attacks.descent import Trace
from ensemble_attacks.eot import EOTAPGD
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.evaluation.passes import CountingModel
from ensemble_attacks.mora import MORA
from ensemble_attacks.pgd import PGD
from ensemble_attacks.reversal import FrontEndReversal
from ensemble_attacks.surrogates import Expected, ZeroOrder, find_parts

EOT_ITER = 20  # draws of every iterate, where the user does not say


@dataclass(frozen=True)
class Settings:
    """What all attacks of one evaluation share.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1].
        draws: fresh forward passes by which the judge decides on each image of a random model.
        eot_iter: of a random model, draws of every iterate; ``None``: the model is deterministic.
    """

    eps: float
    norm: str = "Linf"
    seed: int = 0
    batch_size: int = 250
    draws: int = 1
    eot_iter: int | None = None


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
    """A named attack.

    Attributes:
        needs_members: it looks inside an ensemble.
        check: raises on a model that the attack cannot be run on.
    """

    craft: Craft
    summary: str
    needs_members: bool = False
    check: Callable[[nn.Module], object] = lambda model: None


def _autoattack(*attacks: str, version: str = "standard", expectation: bool = False) -> Craft:
    def craft(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        passes: dict[str, tuple[int, int]] = {}
        images, flags = run_autoattack(
            Expected(model, settings.eot_iter or EOT_ITER) if expectation else model,
            x,
            y,
            eps=settings.eps,
            norm=settings.norm,
            seed=settings.seed,
            batch_size=settings.batch_size,
            version=version,
            attacks=attacks,
            on_attack=lambda name: passes.setdefault(name, (model.forwards, model.backwards)),
        )
        stages = {name: (flags[name], *passes[name]) for name in flags} if len(attacks) > 1 else {}
        return Crafted(images, stages)

    return craft


def _ours(make: Callable[..., CarefulAttack], **arguments: Any) -> Craft:
    def craft(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        made = make(
            model,
            norm=settings.norm,
            eps=settings.eps,
            seed=settings.seed,
            batch_size=settings.batch_size,
            **arguments,
        )
        made.eot_iter = settings.eot_iter
        made.trace = trace = Trace()
        images = made(x, y).to(x.device)
        rows, stages = trace.rows(), {}
        if isinstance(made, MORA) and made.targets:
            sweep = [row for row in rows if row["stage"] < len(made.betas)]
            robust = torch.cat(trace.fooled_in).cpu() >= len(made.betas)
            stages["mora"] = (robust, *(sum(row[kind] for row in sweep) for kind in ("forwards", "backwards")))
        return Crafted(images, stages, rows)

    return craft


def _has_frontend(model: nn.Module) -> None:
    find_parts(model, "frontend")


def _eot(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
    return _ours(EOTAPGD)(model, x, y, replace(settings, eot_iter=settings.eot_iter or EOT_ITER))


def _zero_order(model: nn.Module, **arguments: Any) -> PGD:
    return PGD(ZeroOrder(model), steps=20, n_restarts=1, **arguments)


ATTACKS: dict[str, Entry] = {
    "apgd-ce": Entry(_autoattack("apgd-ce"), "AutoAttack's APGD on cross-entropy, 100 steps"),
    "apgd-t": Entry(_autoattack("apgd-t"), "AutoAttack's targeted APGD on DLR, 9 targets x 100 steps"),
    "fab-t": Entry(_autoattack("fab-t"), "AutoAttack's targeted FAB, 9 targets x 100 steps"),
    "square": Entry(_autoattack("square"), "AutoAttack's Square, 5000 queries"),
    "autoattack": Entry(_autoattack(*STANDARD), "the standard AutoAttack: apgd-ce, apgd-t, fab-t, square"),
    "autoattack-rand": Entry(
        _autoattack(*RAND, version="rand"), "AutoAttack's version for random models: apgd-ce, apgd-dlr, 20 draws"
    ),
    "mora": Entry(_ours(MORA), "MORA: five betas x 100 steps", needs_members=True),
    "mora-mt": Entry(
        _ours(MORA, targets=9), "MORA, then its multi-targeted stage: 9 targets x 100 steps", needs_members=True
    ),
    "pgd": Entry(_ours(PGD), "PGD, 5 restarts x 100 steps of eps / 4, as the MORA paper runs it"),
    "cw": Entry(_ours(PGD, loss="margin"), "CW (the margin of the logits), 5 restarts x 100 steps of eps / 4"),
    "a3": Entry(_ours(A3), "A3 (Liu et al. 2022), 28 restarts of up to 60 steps"),
    "caa": Entry(_ours(CAA), "CAA's Linf policy: 9 targets x (50 + 25), then 125 steps"),
    "eot-apgd": Entry(_eot, "EOTAPGD: APGD of the mean over 20 draws (or --eot-iter), 100 steps"),
    "eot-square": Entry(
        _autoattack("square", expectation=True),
        "AutoAttack's Square on the mean over 20 draws (or --eot-iter), no gradients",
    ),
    "zero-order-pgd": Entry(_ours(_zero_order), "PGD, 20 steps, on gradients estimated from 50 pairs of scores"),
    "bpda": Entry(_ours(BPDAIdentity), "BPDAIdentity: APGD past the parts called frontend", check=_has_frontend),
    "bpda-mora": Entry(
        _ours(BPDAIdentity, attack=MORA),
        "MORA past the parts called frontend",
        needs_members=True,
        check=_has_frontend,
    ),
    "front-end-reversal": Entry(
        _ours(FrontEndReversal),
        "APGD on what lies behind the part called frontend, carried back through it",
        check=_has_frontend,
    ),
    "crossmax-transfer": Entry(
        _ours(CrossMaxTransfer), "APGD on the mean of the members' logits, refined on the model itself", needs_members=True
    ),
    "arc": Entry(
        _ours(ARC),
        "ARC, 20 rounds over the members of a randomized ensemble",
        needs_members=True,
        check=check_probabilities,
    ),
    "ea-apgd-ce": Entry(_ours(APGD), "this package's APGD on cross-entropy, 100 steps"),
    "ea-apgd-dlr": Entry(_ours(APGD, loss="dlr"), "this package's APGD on DLR, 100 steps"),
    "ea-apgd-t": Entry(_ours(APGD, loss="dlr-targeted"), "this package's targeted APGD on DLR, 9 targets x 100 steps"),
}


def find_attack(name: str) -> Entry:
    """The attack of that name; ValueError with the nearest one otherwise."""
    if name not in ATTACKS:
        raise unknown_name("attack", name, ATTACKS)
    return ATTACKS[name]
