"""Choose by a measurement on this machine what to craft on: mixed precision, recorded or compiled passes, only where they
show the same, faster.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import out_of_memory, reason
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.preserve import differentiable
from ensemble_attacks.models.replayed import Padded, can_record, compile_for, padded, record
from ensemble_attacks.models.spread import obstacle
from ensemble_attacks.models.twins import SEEN, TOLERANCE, Autocast, prepare

logger = logging.getLogger(__name__)
PLAIN, FOLDED, MIXED, GRAPHS, COMPILED = "as it is", "folded", "in bfloat16", "by CUDA graphs", "compiled"
REPEATED = 3  # timed passes, after one that warms up
CLEARLY = 0.9  # of the time: less is no reason to round
HALVINGS = 2  # of the batch, each of which is recorded: the batches of a descent grow smaller
PATIENCE = 600  # seconds of passes for which it may pay to compile, which takes minutes
HOPELESS = 2  # times as long for a few images, which do not fill a device


def twin_for(model: nn.Module, x: Tensor, *, amp: bool = False) -> nn.Module:
    """Return the twin of a model (`prepare`) to craft on.

    Args:
        model: an ensemble or any other model, in eval mode.
        x: the first batch of images, (N, ...), on the model's device.
        amp: whether it may run in mixed precision, which it does where it predicts the same classes of all of ``x`` as in
            full precision, and takes clearly less time for a forward and a backward pass; else a message says why not.
    """
    plain = prepare(model, x[:SEEN])
    if not amp:
        return plain
    mixed = prepare(model, x[:SEEN], amp=True)
    if not any(isinstance(part, Autocast) for part in mixed.modules()):
        return plain
    try:
        why = _slower(mixed, plain, x[:SEEN], HOPELESS) or _slower(mixed, plain, x, CLEARLY) or _otherwise(mixed, plain, x)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        why = f"memory runs out on {len(x)} images"
    if why:
        logger.info("%s is not run in mixed precision: %s", type(model).__name__, why)
    return plain if why else mixed


def _slower(mixed: nn.Module, plain: nn.Module, x: Tensor, share: float) -> str:
    """Say that mixed precision takes more than a share of the time for images."""
    before, after = (seconds(net, x) for net in (plain, mixed))
    return f"{after:.3g} s for {len(x)} images, in place of {before:.3g} s" if after > share * before else ""


def _otherwise(mixed: nn.Module, plain: nn.Module, x: Tensor) -> str:
    """Say that a model, asked with the same draws, predicts other classes in mixed precision."""
    answers = []
    for net in (mixed, plain):
        with guarded(net, evaluate=False), torch.no_grad():
            answers.append(ask(net, x).argmax(1))
    differ = int((answers[0] != answers[1]).sum())
    return f"it predicts another class of {differ} of {len(x)} images" if differ else ""


def seconds(net: nn.Module, x: Tensor) -> float:
    """Return the median time of a forward and a backward pass of images (N, ...)."""
    taken = []
    for _ in range(1 + REPEATED):
        began = time.perf_counter()
        _, slope = gradient_pass(net, x)
        slope.sum().item()  # waits for a device
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def gradient_pass(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (N, K) of images (N, ...), and the gradient of the highest of each; zero where there is none."""
    with guarded(net, evaluate=False), differentiable():
        images = x.detach().clone().requires_grad_()
        scores_NK = ask(net, images)
        loss = scores_NK.amax(1).sum()
        (slope,) = torch.autograd.grad(loss, images, allow_unused=True) if loss.requires_grad else (None,)
    return scores_NK.detach(), torch.zeros_like(x) if slope is None else slope


@dataclass(frozen=True)
class Way:
    """A record of a way to compute the gradient passes of a batch.

    Attributes:
        name: what it is called.
        net: the model that does so; ``None``: it cannot be used.
        once, each: the seconds that it takes once, and for each pass.
        why: why it cannot be used.
        options: the options of ``evaluate`` that allow it; what is usual needs none.
    """

    name: str
    net: nn.Module | None = None
    once: float = 0.0
    each: float = math.inf
    why: str = ""
    options: str = ""

    def total(self, passes: int) -> float:
        """Return the seconds of so many passes."""
        return self.once + passes * self.each


def ways_to_pass(net: nn.Module, x: Tensor, passes: int | None = None) -> list[Way]:
    """Measure the ways to compute gradient passes of a batch (N, ...): as they are, recorded, and compiled.

    Each is measured on this batch, and can be used only where it shows the same classes, scores and gradient there, and of
    two images, padded. Nothing is compiled for fewer ``passes`` than take `PATIENCE`; ``None``: for any number.
    """
    plain = Way(PLAIN, net, each=seconds(net, x))
    short = None if passes is None or passes * plain.each >= PATIENCE else f"{passes * plain.each:.0f} s"
    obstacles = {
        GRAPHS: "" if can_record(x) else f"there are none on {x.device.type}",
        COMPILED: f"that takes minutes, the passes {short}, as far as is known" if short else "",
    }
    if not all(obstacles.values()):
        why = obstacle(net, x[:SEEN])
        obstacles = {name: own or why for name, own in obstacles.items()}
    recorded, compiled = partial(padded, net, x, record, HALVINGS), partial(padded, net, x, compile_for)
    makers: dict[str, Callable[[], Padded]] = {GRAPHS: recorded, COMPILED: compiled}
    return [plain, *(_measured(name, why, makers[name], plain, x) for name, why in obstacles.items())]


def _measured(name: str, why: str, make: Callable[[], Padded], plain: Way, x: Tensor) -> Way:
    if why:
        return Way(name, why=why)
    assert plain.net is not None
    began = time.perf_counter()
    try:
        net = make()
        if why := _not_the_same(net, plain.net, x):
            return Way(name, why=why)
        once = time.perf_counter() - began
        each = seconds(net, x)
    except Exception as error:  # compilers and drivers fail in many ways
        return Way(name, why=reason(error))
    net.least = each / plain.each
    return Way(name, net, once, each)


def _not_the_same(net: nn.Module, plain: nn.Module, x: Tensor) -> str:
    """Say what a model shows otherwise than another, of images or of a few of them."""
    for images in (x, x[:2]):
        (scores, slope), (other, expected) = (gradient_pass(one, images) for one in (net, plain))
        if differ := int((scores.argmax(1) != other.argmax(1)).sum()):
            return f"it predicts another class of {differ} of {len(images)} images"
        if not (scores - other).abs().max() <= TOLERANCE[0] * other.abs().max():
            return "its scores are others"
        if not (slope - expected).norm() <= TOLERANCE[1] * expected.norm():
            return "its gradient is another"
    return ""


def ways_to_craft(model: nn.Module, x: Tensor) -> list[Way]:
    """Measure all ways to craft on a model, with a batch (N, ...): itself, its twin (`prepare`), and this otherwise."""

    def made(name: str, options: str, amp: bool) -> Way:
        began = time.perf_counter()
        net = prepare(model, x[:SEEN], amp=amp)
        once = time.perf_counter() - began
        if net is model or (amp and not any(isinstance(part, Autocast) for part in net.modules())):
            return Way(name, why="it cannot be prepared so", options=options)
        why = _otherwise(net, model, x) if amp else ""
        return Way(name, None if why else net, once, seconds(net, x), why, options)

    itself = Way(PLAIN, model, each=seconds(model, x))
    folded = made(FOLDED, "", False)
    ways = [itself, folded, made(MIXED, "--amp", True)]
    for base in (folded if folded.net is not None else itself, ways[2]):
        if base.net is not None:
            options, (_, *further) = f"{base.options} --tune".strip(), ways_to_pass(base.net, x)
            ways += [replace(way, name=f"{base.name}, {way.name}", options=options) for way in further]
    return ways


def best_of(ways: list[Way], passes: int) -> Way:
    """Return the way that takes the least time for so many passes: the first, unless another takes clearly less."""
    passes = max(passes, 1)  # of some attacks nobody knows how many
    best = min(ways, key=lambda way: way.total(passes))
    return best if best.total(passes) < CLEARLY * ways[0].total(passes) else ways[0]


def quickest(net: nn.Module, x: Tensor, passes: int) -> nn.Module:
    """Return what computes the gradient passes of a model the soonest on this machine, as a short measurement shows.

    Args:
        net: what attacks craft on (`twin_for`).
        x: the first batch of images, (N, ...), on its device.
        passes: the number of batches whose gradient attacks are going to take, at the most.
    """
    if not len(x):
        return net
    try:
        ways = [replace(way, once=0.0) for way in ways_to_pass(net, x, passes)]  # which has been spent
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        logger.info("%s is not tuned: memory runs out on %d images", type(net).__name__, len(x))
        return net
    best = best_of(ways, passes)
    rest = "; ".join(f"{way.name}: {way.why or f'{way.each:.3g} s a pass'}" for way in ways if way is not best)
    logger.info("%s is asked %s, %.3g s a pass of %d images (%s)", type(net).__name__, best.name, best.each, len(x), rest)
    assert best.net is not None
    return best.net
