"""Run attacks on the same images, judge what they return, and summarise."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ensemble_attacks.appeal import contradicted
from ensemble_attacks.attacks.registry import find_attack
from ensemble_attacks.data import as_tensors
from ensemble_attacks.devices import full_precision
from ensemble_attacks.errors import none_completed, out_of_memory, reason
from ensemble_attacks.evaluation.estimate import batches_of
from ensemble_attacks.evaluation.suite import Craft, Crafted, Settings, check_attack, check_fit, crafting
from ensemble_attacks.evaluation.summary import Standing, row_of, told_of, worst_case
from ensemble_attacks.evaluation.units import CLEAN
from ensemble_attacks.judge import Judgement, judge
from ensemble_attacks.models.adopted import check_claim, check_protocol
from ensemble_attacks.models.ask import as_module, ask, beside, check_dtype, classes_of
from ensemble_attacks.models.gradients import zero_gradients
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.passes import CountingModel, count_passes
from ensemble_attacks.models.preserve import differentiable, ordinary
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.models.tuning import quickest, twin_for
from ensemble_attacks.validation import (
    check_count,
    check_eps,
    check_images,
    check_label_range,
    check_labels,
    check_mask,
    check_norm,
    check_radius,
    check_seed,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Attacked:
    """A record of what an attack did, and of what the judge says of it.

    Attributes:
        images: the images that the attack returned.
        judgement: the judge's verdict on them.
        stages: after each part of a suite, which samples (N,) are robust, and the forward and backward passes so far.
        trace: how the attack converged (`Trace.rows`, `Watch.rows`).
        forwards, backwards: the image passes that the attack spent.
        seconds: the time that it took.
        batch_size: the batch size with which it fitted into memory.
        outside: the number of images that left the ball, and count as the clean ones.
        disagreement: the number of images that the judge finds robust, and that the attack saw fooled, or on which the model
            answers otherwise when it is asked otherwise (`appeal`).
        failed: by part of a suite that could not be run, why.
        zero_gradients: of clean images, the number of those where attacks find no gradient, or one that is zero.
    """

    images: Tensor
    judgement: Judgement
    stages: dict[str, tuple[Tensor, int, int]]
    trace: list[dict[str, float]]
    forwards: int
    backwards: int
    seconds: float
    batch_size: int
    outside: int = 0
    disagreement: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    zero_gradients: int = 0


def check_arguments(model: nn.Module, x: Tensor, y: Tensor, attacks: Sequence[str], settings: Settings) -> None:
    """Raise, before anything is run, where a model, images, attacks or settings cannot be used."""
    check_images(x, "x", box=settings.box)
    check_labels(y, x, "y")
    check_settings(model, x, attacks, settings)
    check_model(model, x, y, attacks, settings)


def check_settings(model: nn.Module, x: Tensor, attacks: Sequence[str], settings: Settings) -> None:
    """Raise where settings cannot be used, for images (N, ...), or attacks with them; the model is not asked."""
    check_eps(settings.eps)
    check_norm(settings.norm)
    if len(x):
        check_radius(settings.eps, settings.norm, x[0], settings.box)
        check_mask(settings.mask, x)
    check_count("batch_size", settings.batch_size)
    check_seed(settings.seed)
    check_count("draws", settings.draws)
    if settings.eot_iter is not None:
        check_count("eot_iter", settings.eot_iter)
    for name in attacks:
        check_attack(name, model, settings)


def check_model(model: nn.Module, x: Tensor, y: Tensor, attacks: Sequence[str], settings: Settings) -> None:
    """Raise where a model, once it is asked, does not suit images (N, ...), labels (N,) or attacks, at any eps."""
    few = beside(model, x[:2])
    with guarded(model, seed=settings.seed), torch.no_grad():
        check_dtype(model, few, "x")
        try:
            classes = classes_of(model, few)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ValueError(
                f"model {type(model).__name__} cannot be asked about one or two of these images, {tuple(few.shape[1:])} "
                f"each: {reason(error)}"
            ) from error
        check_label_range(y, classes, "y")
        for name in attacks:
            check_fit(name, classes, settings.norm, x.shape[1:])
        check_claim(model, x, settings.batch_size, few.device)
        if any(find_attack(name).needs_members for name in attacks):
            check_protocol(model, x[:8].to(few.device))
    if (settings.draws == 1 or settings.eot_iter is None) and structure_of(model, few, settings.seed).random:
        logger.warning(
            "%s is random, but draws is %d and eot_iter %s: one lucky draw decides; set both (--draws 10 --eot-iter 5)",
            *(type(model).__name__, settings.draws, settings.eot_iter),
        )


def judged(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, settings: Settings) -> Judgement:
    """Return the verdict of `judge` with these settings."""
    given = {key: getattr(settings, key) for key in ("eps", "norm", "draws", "batch_size", "box", "mask")}
    return judge(model, x, y, x_adv, **given)


def in_dispute(model: nn.Module, x_adv: Tensor, judgement: Judgement, settings: Settings) -> Tensor:
    """Return on which robust images the model answers otherwise when it is asked otherwise, (N,) bool; none if random."""
    disputed = torch.zeros_like(judgement.robust)
    rows = torch.nonzero(judgement.robust).squeeze(-1)
    if settings.draws == 1 and settings.eot_iter is None:
        images = x_adv[rows.to(x_adv.device)]
        disputed[rows] = contradicted(model, images, batch_size=settings.batch_size, seed=settings.seed)
    return disputed


def attack(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, name: str, settings: Settings) -> Attacked:
    """Craft on the twin, and judge on the model; try again with half the batch size as often as memory runs out.

    Raises:
        OutOfBallError: Where an attack returned an image outside the ball.
    """

    def whole(smaller: Settings) -> Attacked:
        return _attack(model, twin, x, y, name, smaller)

    return halving(settings, name, whole)


Done = TypeVar("Done")


def halving(settings: Settings, name: str, work: Callable[[Settings], Done]) -> Done:
    """Return what ``work`` does with these settings, or with half the batch size, as often as memory runs out."""
    while True:
        try:
            return work(settings)
        except (MemoryError, RuntimeError) as error:
            if settings.batch_size == 1 or not out_of_memory(error):
                raise
        settings = replace(settings, batch_size=settings.batch_size // 2)  # once the error, and what it holds, is gone
        logger.warning("%s: out of memory, again with batches of %d", name, settings.batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _attack(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, name: str, settings: Settings) -> Attacked:
    craft = crafting(name)
    logger.info("running %s on %d images", name, len(x))
    cost = find_attack(name).cost
    most = None if cost is None else cost * len(x) * (settings.eot_iter or 1)  # if nothing is fooled
    silent = None if multiprocessing.parent_process() is None else True  # workers would write over each other's bars
    with tqdm(desc=name, total=most, unit=" passes", unit_scale=True, disable=silent, leave=False) as bar:
        counted = count_passes(twin, bar.update)
        began = time.perf_counter()
        crafted = craft(counted, x, y, settings)
        if twin is not model:
            crafted = _recraft(model, counted, x, y, crafted, craft, settings)
        seconds = time.perf_counter() - began
    judgement = judged(model, x, y, crafted.images, settings)
    # of a suite's part, robust are those that its own flags say so, or whose image the judge does not find fooled
    stages = {part: (flags.cpu() | ~judgement.fooled, f, b) for part, (flags, f, b) in crafted.stages.items()}
    disputed = in_dispute(model, crafted.images, judgement, settings)
    if crafted.fooled is not None:
        disputed |= crafted.fooled.cpu() & judgement.robust
    if disagreement := int(disputed.sum()):
        logger.warning(
            "on %d images of %s, robust for the judge, the model answers the judge otherwise than the attack, or with a "
            "gradient or one by one",
            *(disagreement, name),
        )
    passes = counted.forwards, counted.backwards
    spent = (*passes, seconds, settings.batch_size, crafted.outside, disagreement)
    return Attacked(crafted.images, judgement, stages, crafted.trace, *spent, failed=crafted.failed)


def clean_unit(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> Attacked:
    """Judge the clean images, with half the batch size as often as memory runs out."""

    def work(smaller: Settings) -> Attacked:
        judgement = judged(model, x, y, x, smaller)
        flat = zero_gradients(twin, x, y, batch_size=smaller.batch_size, seed=smaller.seed)
        if flat:
            logger.warning(
                "at %d of %d clean images attacks see no gradient: look at `ensemble-attacks diagnose`", flat, len(x)
            )
        disputed = int(in_dispute(model, x, judgement, smaller).sum())
        if disputed:
            logger.warning(
                "on %d clean images the model answers the judge otherwise than with a gradient, or one by one", disputed
            )
        done = Attacked(x, judgement, {}, [], 0, 0, 0.0, smaller.batch_size)
        return replace(done, disagreement=disputed, zero_gradients=flat)

    return halving(settings, CLEAN, work)


@differentiable()
def evaluate(
    model: nn.Module,
    x: Any,
    y: Tensor | None,
    attacks: Sequence[str],
    settings: Settings,
    *,
    report: Callable[[str, dict[str, Any]], object] = lambda name, row: None,
    keep: Callable[[str, Attacked], object] = lambda name, attacked: None,
) -> dict[str, Any]:
    """Run attacks on one model, judge their images, and summarise, in this process.

    Nothing is stored; a run (`manifest`, `chains`) stores what it finds.

    Args:
        model: images in the box -> scores (N, K); an ensemble for attacks that look inside.
        x, y: images (N, ...), such as (N, C, H, W), and labels (N,); or, with ``None``, a ``Dataset`` or ``DataLoader``.
        attacks: names, as listed in `suite.attack_names`.
        settings: the ball, the seed, and what else all attacks share.
        report: called with each attack's name and row as soon as it is judged; also for ``clean`` and ``worst case``.
        keep: called with each attack's name and all that it left.

    Returns:
        The summary: ``clean``, ``attacks`` by name, and ``worst_case`` over all attacks per sample; where an attack raised,
        also ``failed``: why, by name. What the others found is kept.

    Raises:
        ValueError, TypeError: Where arguments are unusable; nothing has been run.
        OutOfBallError, AttackFailedError: Where no attack was run to its end, and returned images in the ball.
    """
    model = as_module(model)
    x, y = (ordinary(part) if isinstance(part, Tensor) else part for part in as_tensors(x, y))
    check_arguments(model, x, y, attacks, settings)
    y = y.long()
    few = beside(model, x[: settings.batch_size])
    twin = twin_for(model, few, amp=settings.amp)
    if settings.tune:
        twin = quickest(twin, few, batches_of(attacks, len(x), settings))
    cleanly = clean_unit(model, twin, x, y, settings)
    clean, said_of_clean = cleanly.judgement, cleanly.judgement.summary() | told_of([vars(cleanly)])
    report("clean", said_of_clean)
    rows: dict[str, Any] = {}
    everyone = torch.arange(len(x))
    standing = Standing.of(len(x)).after(everyone, clean)
    errors: dict[str, Exception] = {}
    for name in attacks:
        try:
            attacked = attack(model, twin, x, y, name, settings)
        except Exception as error:  # whatever an attack raises: it costs that attack
            errors[name] = error
            logger.warning("%s is left out: %s", name, reason(error))
            continue
        standing = standing.after(everyone, attacked.judgement)
        told = told_of([vars(attacked)])
        rows[name] = row_of(attacked.judgement, attacked.stages, attacked.forwards, attacked.backwards, told)
        report(name, rows[name] | {"seconds": attacked.seconds})
        keep(name, attacked)
    if errors and not rows:
        raise none_completed(errors)
    worst = worst_case(standing)
    report("worst case", worst)
    failed = {"failed": {name: reason(error) for name, error in errors.items()}} if errors else {}
    return {**settings.listed(), "n": len(x), "clean": said_of_clean, "attacks": rows, "worst_case": worst, **failed}


def _recraft(
    model: nn.Module, counted: CountingModel, x: Tensor, y: Tensor, crafted: Crafted, craft: Craft, settings: Settings
) -> Crafted:
    """Craft again, on the model itself and in full precision, the few images that fool its twin but, by a rounding error,
    not the model.
    """

    def predict(net: nn.Module) -> Tensor:
        with guarded(net, seed=settings.seed, evaluate=False), torch.no_grad():
            parts = crafted.images.split(settings.batch_size)
            return torch.cat([ask(net, beside(model, batch)).argmax(1).cpu() for batch in parts])

    by_twin = predict(counted.counted)
    with full_precision():
        rows = torch.nonzero((by_twin != y.cpu()) & (predict(model) == y.cpu())).squeeze(-1)
    if not len(rows):
        return crafted
    counted.counted = model
    images = crafted.images.clone()
    with full_precision():
        again = craft(counted, x[rows], y[rows], settings)
    images[rows], fooled = again.images, crafted.fooled
    if fooled is not None:
        fooled = fooled.clone()
        fooled[rows] = torch.zeros(len(rows), dtype=torch.bool) if again.fooled is None else again.fooled.to(fooled)
    return replace(crafted, images=images, fooled=fooled)
