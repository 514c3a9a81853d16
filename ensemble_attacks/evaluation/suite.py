"""The attacks that ``evaluate`` knows by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks import registry
from ensemble_attacks.attacks.base import CarefulAttack, DescentAttack, craft
from ensemble_attacks.attacks.bpda import BPDAIdentity
from ensemble_attacks.attacks.mora import MORA
from ensemble_attacks.attacks.registry import EOT_ITER, HOSTS, PEER, NamedAttack, registered
from ensemble_attacks.descent.stages import Trace
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.hosts.autoattack import AutoAttack
from ensemble_attacks.hosts.original import RAND, STANDARD, run_autoattack
from ensemble_attacks.judge import or_clean, outside
from ensemble_attacks.models.passes import CountingModel
from ensemble_attacks.models.surrogates import Expected

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What all attacks of one evaluation share.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1].
        draws: fresh forward passes by which the judge decides on each image of a random model.
        eot_iter: of a random model, draws of every iterate; ``None``: the model is deterministic.
        amp: craft in mixed precision; the judge does not.
    """

    eps: float
    norm: str = "Linf"
    seed: int = 0
    batch_size: int = 250
    draws: int = 1
    eot_iter: int | None = None
    amp: bool = False


@dataclass(frozen=True, eq=False)
class Crafted:
    """What an attack returns.

    Attributes:
        images: (N, C, H, W).
        stages: of a suite, after each of its parts: its own robust flags (N,), and forward and backward passes so far.
        trace: of an attack of this package, its convergence (`Trace.rows`).
        outside: how many images left the ball, and were replaced by the clean ones.
    """

    images: Tensor
    stages: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)
    trace: list[dict[str, float]] = field(default_factory=list)
    outside: int = 0


Craft = Callable[[CountingModel, Tensor, Tensor, Settings], Crafted]


@dataclass(frozen=True)
class Entry:
    """What ``evaluate`` runs under a name.

    Attributes:
        needs_members: it looks inside an ensemble.
        check: raises on a model that the attack cannot be run on.
    """

    craft: Craft
    summary: str
    needs_members: bool = False
    check: Callable[[nn.Module, Settings], object] = lambda model, settings: None


def _original(*attacks: str, version: str = "standard", expectation: bool = False) -> Craft:
    def run(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
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

    return run


def _ours(version: str) -> Craft:
    def run(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        adversary = AutoAttack(
            model, norm=settings.norm, eps=settings.eps, seed=settings.seed, verbose=False, version=version
        )
        adversary.eot_iter = settings.eot_iter or EOT_ITER
        passes: dict[str, tuple[int, int]] = {}
        adversary.on_attack = lambda name: passes.setdefault(name, (model.forwards, model.backwards))
        images = adversary.run_standard_evaluation(x, y, bs=settings.batch_size)
        assert isinstance(images, Tensor)
        return Crafted(images, {name: (adversary.stages[name], *passes[name]) for name in passes})

    return run


def _make(attack: NamedAttack, model: nn.Module, settings: Settings) -> Any:
    given = {key: getattr(settings, key) for key in ("norm", "eps", "seed", "batch_size", "eot_iter")}
    return attack.make(model, **given)


def _named(attack: NamedAttack) -> Craft:
    def run(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        made = _make(attack, model, settings)
        if not isinstance(made, CarefulAttack):
            images = craft(made, x, y, seed=settings.seed, batch_size=settings.batch_size)
            left = int(outside(x, images.to(x), eps=settings.eps, norm=settings.norm).sum())
            if left:
                logger.warning(
                    "%d of the %d images that %s returned are outside the %s ball of eps = %g, and count as the clean ones",
                    *(left, len(x), type(made).__name__, settings.norm, settings.eps),
                )
            return Crafted(or_clean(x, images, eps=settings.eps, norm=settings.norm), outside=left)
        trace = Trace()
        if isinstance(made, (DescentAttack, BPDAIdentity)):  # of others it is the trace of a part
            made.trace = trace
        images = craft(made, x, y, seed=settings.seed, batch_size=settings.batch_size)
        rows, stages = trace.rows(), {}
        if isinstance(made, MORA) and made.targets:
            descents = len(made.sweep())
            sweep = [row for row in rows if row["stage"] < descents]
            robust = torch.cat(trace.fooled_in).cpu() >= descents
            stages["mora"] = (robust, *(sum(row[kind] for row in sweep) for kind in ("forwards", "backwards")))
        return Crafted(images, stages, rows)

    return run


SUITES: dict[str, Entry] = {
    "autoattack": Entry(_original(*STANDARD), "the standard AutoAttack: apgd-ce, apgd-t, fab-t, square"),
    "autoattack-rand": Entry(
        _original(*RAND, version="rand"), "AutoAttack's version for random models: apgd-ce, apgd-dlr, 20 draws"
    ),
    "autoattack-ensemble": Entry(
        _ours("ensemble"), "AutoAttack(version='ensemble'): mora-mt, then the standard suite", needs_members=True
    ),
    "autoattack-adaptive": Entry(_ours("adaptive"), "AutoAttack(version='adaptive'): what the model's structure asks for"),
    "auto": Entry(_ours("auto"), "AutoAttack(version='auto'): what a diagnosis asks for, until nothing moves"),
    "eot-square": Entry(
        _original("square", expectation=True), "AutoAttack's Square on the mean over 20 draws (or --eot-iter), no gradients"
    ),
}


def attack_names() -> list[str]:
    """What `find_attack` knows, but for torchattacks'."""
    return [*SUITES, *STANDARD, *registered()]


def find_attack(name: str) -> Entry:
    """The attack of that name; ValueError with the nearest one otherwise."""
    if name in SUITES:
        return SUITES[name]
    if name in STANDARD:
        return Entry(_original(name), HOSTS[name])
    if not name.startswith(PEER) and name not in registered():
        raise unknown_name("attack", name, attack_names())
    attack = registry.find_attack(name)

    def check(model: nn.Module, settings: Settings) -> None:
        attack.check(model)
        _make(attack, model, settings)

    return Entry(_named(attack), attack.summary, attack.needs_members, check)
