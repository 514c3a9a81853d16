"""Choose by a measurement on this machine what to craft on: mixed precision only where it shows the same, faster."""

from __future__ import annotations

import logging
import statistics
import time

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import out_of_memory
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.preserve import differentiable
from ensemble_attacks.models.twins import SEEN, Autocast, prepare

logger = logging.getLogger(__name__)
REPEATED = 3  # timed passes, after one that warms up
CLEARLY = 0.9  # of the time: less is no reason to round
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
        with guarded(net, evaluate=False), differentiable():
            began = time.perf_counter()
            images = x.detach().clone().requires_grad_()
            loss = ask(net, images).logsumexp(1).sum()
            (slope,) = torch.autograd.grad(loss, images, allow_unused=True) if loss.requires_grad else (None,)
            (loss if slope is None else slope.sum()).item()  # waits for a device
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
