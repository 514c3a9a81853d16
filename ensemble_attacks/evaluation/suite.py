"""Provide the attacks that ``evaluate`` knows by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.attacks.bpda import BPDAIdentity
from ensemble_attacks.attacks.careful import CarefulAttack
from ensemble_attacks.attacks.foreign import craft
from ensemble_attacks.attacks.mora import MORA
from ensemble_attacks.attacks.registry import EOT_ITER, find_attack, registered
from ensemble_attacks.descent.stages import Trace
from ensemble_attacks.errors import reason, unknown_name
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.evaluation.watch import watched
from ensemble_attacks.hosts.autoattack import AutoAttack
from ensemble_attacks.hosts.flags import INCOMPLETE
from ensemble_attacks.hosts.original import RAND, STANDARD, run_autoattack
from ensemble_attacks.judge import or_clean, outside
from ensemble_attacks.models.boxed import share_of
from ensemble_attacks.models.passes import CountingModel
from ensemble_attacks.models.surrogates import Expected
from ensemble_attacks.names import options_in, split_options

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Crafted:
    """A record of what an attack returns.

    Attributes:
        images: (N, C, H, W).
        stages: after each part of a suite, its own robust flags (N,), and the forward and backward passes so far.
        trace: how the attack converged (`Trace.rows`); of one that keeps no trace, as it was seen to (`Watch.rows`).
        outside: the number of images that left the ball, and were replaced by the clean ones.
        failed: by part of a suite that could not be run, why.
        fooled: the samples (N,) that the attack itself saw fooled; ``None`` where it does not say.
    """

    images: Tensor
    stages: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)
    trace: list[dict[str, float]] = field(default_factory=list)
    outside: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    fooled: Tensor | None = None


Craft = Callable[..., Crafted]  # of (CountingModel, x, y, Settings), and of a pipeline's options


def _original(*attacks: str, version: str = "standard", expectation: bool = False) -> Craft:
    def run(model: CountingModel, x: Tensor, y: Tensor, settings: Settings, *, steps: int | None = None) -> Crafted:
        if not settings.plain:
            names = attacks if version == "standard" else ()
            return _ours(version, *names, expectation=expectation)(model, x, y, settings, steps=steps)
        eps = settings.eps
        assert not isinstance(eps, Tensor)
        passes: dict[str, tuple[int, int]] = {}
        failed: dict[str, str] = {}
        images, flags = run_autoattack(
            Expected(model, settings.eot_iter or EOT_ITER) if expectation else model,
            x,
            y,
            eps=eps,
            norm=settings.norm,
            seed=settings.seed,
            batch_size=settings.batch_size,
            version=version,
            attacks=attacks,
            steps=steps,
            on_attack=lambda name: passes.setdefault(name, (model.forwards, model.backwards)),
            on_failure=failed.__setitem__,
        )
        stages = {name: (flags[name], *passes[name]) for name in flags} if len(attacks) > 1 else {}
        return Crafted(images, stages, failed=failed, fooled=~list(flags.values())[-1] if flags else None)

    return run


def _ours(version: str, *attacks: str, expectation: bool = False) -> Craft:
    """Return what runs our AutoAttack, which knows any box: of a version, or its attacks of these names."""

    def run(model: CountingModel, x: Tensor, y: Tensor, settings: Settings, *, steps: int | None = None) -> Crafted:
        adversary = AutoAttack(
            Expected(model, settings.eot_iter or EOT_ITER) if expectation else model,
            norm=settings.norm,
            eps=settings.eps,
            seed=settings.seed,
            verbose=False,
            attacks_to_run=attacks,
            version="custom" if attacks else version,
            box=settings.box,
        )
        adversary.eot_iter, adversary.steps = settings.eot_iter or EOT_ITER, steps
        passes: dict[str, tuple[int, int]] = {}
        adversary.on_attack = lambda name: passes.setdefault(name, (model.forwards, model.backwards))
        images = adversary.run_standard_evaluation(x, y, bs=settings.batch_size)
        assert isinstance(images, Tensor)
        left = {flag.message.split(" is left out")[0]: flag.message for flag in adversary.flags if flag.name in INCOMPLETE}
        stages = {name: (adversary.stages[name], *passes[name]) for name in passes}
        fooled = ~adversary.robust | adversary.disagreement if stages else None
        return Crafted(images, stages, failed=left | adversary.failed, fooled=fooled)

    return run


def _make(make: Callable[..., Attack], model: nn.Module, settings: Settings) -> Any:
    """Return an attack; one that is not of this package is made for [0, 1], and knows no mask."""
    given = {key: getattr(settings, key) for key in ("norm", "eps", "seed", "batch_size", "eot_iter")}
    if settings.plain:
        return make(model, **given)
    try:
        made = make(model, **given, **{key: getattr(settings, key) for key in ("box", "mask")})
    except TypeError as error:
        raise ValueError(f"it knows no box but [0, 1], no mask, and one eps ({reason(error)})") from error
    return made if isinstance(made, CarefulAttack) else None


def _named(name: str, make: Callable[..., Attack]) -> Craft:
    def run(model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        made = _make(make, model, settings)
        if isinstance(made, (DescentAttack, BPDAIdentity)):
            return _by_descent(made, x, y, settings)
        craft = _ours("custom", name) if made is None else partial(_by_others, made)
        return _watching(craft)(model, x, y, settings)

    return run


def _by_descent(made: DescentAttack | BPDAIdentity, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
    made.trace = trace = Trace()
    images = craft(made, x, y, seed=settings.seed, batch_size=settings.batch_size)
    rows, stages = trace.rows(), {}
    fooled = trace.fooled(len(x)) if isinstance(made, DescentAttack) else None
    if isinstance(made, MORA) and made.targets:
        descents = len(made.sweep())
        sweep = [row for row in rows if row["stage"] < descents]
        robust = torch.cat(trace.fooled_in).cpu() >= descents
        stages["mora"] = (robust, *(sum(row[kind] for row in sweep) for kind in ("forwards", "backwards")))
    return Crafted(images, stages, rows, fooled=fooled)


def _by_others(made: Attack, model: CountingModel, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
    given: dict[str, Any] = dict(seed=settings.seed, batch_size=settings.batch_size)
    if isinstance(made, CarefulAttack):
        return Crafted(craft(made, x, y, **given))
    eps, norm = settings.eps, settings.norm
    assert not isinstance(eps, Tensor)
    images = craft(made, x, y, eps=eps, norm=norm, **given)
    left = int(outside(x, images.to(x), eps=eps, norm=norm).sum())
    if left:
        logger.warning(
            "%d of the %d images that %s returned are outside the %s ball of eps = %g, and count as the clean ones",
            *(left, len(x), type(made).__name__, norm, eps),
        )
    return Crafted(or_clean(x, images, eps=eps, norm=norm), outside=left)


def _watching(craft: Craft) -> Craft:
    """Return what also traces the attack that ``craft`` runs: one that keeps no trace, or only that of a part."""

    def run(model: CountingModel, x: Tensor, y: Tensor, settings: Settings, **options: Any) -> Crafted:
        with watched(model, x, y, settings) as rows_of:
            crafted = craft(model, x, y, settings, **options)
        return replace(crafted, trace=rows_of())

    return run


PIPELINES: dict[str, Craft] = {  # of the records that are no attack that could be made by itself
    name: _watching(craft)
    for name, craft in {
        **{name: _original(name) for name in STANDARD},
        "autoattack": _original(*STANDARD),
        "autoattack-rand": _original(*RAND, version="rand"),
        "autoattack-ensemble": _ours("ensemble"),
        "autoattack-adaptive": _ours("adaptive"),
        "auto": _ours("auto"),
        "eot-square": _original("square", expectation=True),
    }.items()
}


def attack_names() -> list[str]:
    """Return the names of the attacks that ``evaluate`` runs, but for torchattacks'."""
    return [name for name, record in registered().items() if record.make is not None or name in PIPELINES]


def crafting(name: str) -> Craft:
    """Return the function that runs the attack of a name.

    Raises:
        ValueError: Where the name is unknown; the message names the nearest one.
    """
    record, (body, query) = find_attack(name), split_options(name)
    if body in PIPELINES:
        return partial(PIPELINES[body], **options_in(query)) if query else PIPELINES[body]
    if record.make is None:
        raise unknown_name("attack", name, attack_names())
    return _named(name, record.make)


def check_attack(name: str, model: nn.Module, settings: Settings) -> None:
    """Raise where the attack of a name cannot be run on a model, with these settings."""
    record = find_attack(name)
    crafting(name)
    record.check(model, name)
    try:
        made = None if record.make is None else _make(record.make, model, settings)
        if made is None and not settings.plain:
            _check_unmade(settings)
    except ValueError as error:
        if settings.plain:
            raise
        raise ValueError(f"attack {name!r}: {error}") from error


def _check_unmade(settings: Settings) -> None:
    """Raise a `ValueError` where an attack that knows [0, 1] alone cannot be run, seen from there."""
    if settings.mask is not None:
        raise ValueError("it knows no mask: attack with MORA or APGD (mora, ea-apgd-ce), and leave it out")
    share_of(settings.eps, settings.box, "attacks of others")


def check_fit(name: str, classes: int, norm: str, shape: Sequence[int]) -> None:
    """Raise a `ValueError` where the attack of a name cannot attack inputs of a shape, without the batch, in a norm."""
    if why := find_attack(name).misfit(classes, norm, shape):
        raise ValueError(f"attack {name!r} cannot attack this model: {why}; leave it out")
