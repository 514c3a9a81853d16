"""Train ensembles: data, augmentation, schedule, checkpoint, resume, progress, log; a recipe brings the loss and optimiser.

Randomness is keyed by (seed, epoch), so that a run that was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from defenses.draws import seed_draws
from defenses.training.plan import ROUND, Batch, Plan
from ensemble_attacks.errors import said
from ensemble_attacks.files import check_plain, load_tensors, whole_file
from ensemble_attacks.schema import StoredTraining, check

logger = logging.getLogger(__name__)
FEWEST_STEPS = 10  # below which the one-cycle schedule leaves a network untrained
CHECK_EVERY = 20  # steps between looks at the loss, for which a GPU has to be waited for


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4, eps=1e-7)


def input_gradients(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return every member's logits (M, N, K) and gradient of its cross-entropy with respect to the image (M, N, C, H, W).

    A loss can be differentiated through these gradients.
    """
    inputs = [x.detach().clone().requires_grad_() for _ in batch.ensemble.members]
    logits = [batch.logits(own, member) for member, own in enumerate(inputs)]
    total = torch.stack([F.cross_entropy(logits_NK, batch.y, reduction="sum") for logits_NK in logits]).sum()
    return torch.stack(logits), torch.stack(torch.autograd.grad(total, inputs, create_graph=True))


def pair_cosines(gradients_MN: Tensor) -> Tensor:
    """Return the cosines between the members' input gradients (M, N, ...), one row a pair of members, (M (M - 1) / 2, N)."""
    flat_MND = gradients_MN.flatten(2)
    pairs = combinations(range(len(flat_MND)), 2)
    return torch.stack([F.cosine_similarity(flat_MND[a], flat_MND[b], dim=-1) for a, b in pairs])


def augment(images: Tensor, *, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) shifted at random by up to ``pad`` pixels, with zeros filled in.

    With ``flip``, each is also mirrored with probability 1/2.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    top = torch.randint(2 * pad + 1, (n, 1, 1, 1), generator=generator)
    left = torch.randint(2 * pad + 1, (n, 1, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height).view(1, 1, -1, 1), left + torch.arange(width).view(1, 1, 1, -1)
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
    samples, channels = torch.arange(n).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return padded[tuple(index.to(images.device) for index in (samples, channels, rows, columns))]


def train(
    plan: Plan,
    ensemble: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    out: Path,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Train ``ensemble`` in place by ``plan``, and resume from the checkpoint in ``out``, if there is one.

    A checkpoint is written after every epoch (by the clock, every ten minutes at least).

    Returns:
        ``{"seconds": training time over all sittings, "loss": mean loss of the last epoch, "epochs": as many as were run}``.

    Raises:
        ValueError: Where ``out`` holds the checkpoint of another run, or there are fewer images than a batch takes.
        FloatingPointError: Where the loss is not finite; the last good checkpoint stays.
    """
    steps = len(images) // plan.batch_size  # the last, short batch is left out: it would upset the batch statistics
    if not steps:
        raise ValueError(f"batch_size is {plan.batch_size}, but there are {len(images)} images: choose a smaller one")
    if plan.minutes is None and plan.epochs * steps < FEWEST_STEPS:
        logger.warning("%d steps in all are too few: more epochs, or a smaller batch_size", plan.epochs * steps)
    run, checkpoint = plan.identity(ensemble, images), out / "checkpoint.pt"
    state = _checked(checkpoint, run)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    ensemble = ensemble.to(device).to(memory_format=torch.channels_last)
    images, labels = images.to(device), labels.to(device)
    optimizer = plan.recipe.optimizer([parameter for parameter in ensemble.parameters() if parameter.requires_grad])
    schedule = plan.schedule(optimizer, steps)
    rounds, epoch, seconds, mean_loss = 0, 0.0, 0.0, float("nan")
    if state is not None:
        _restore(checkpoint, state, ensemble, optimizer, schedule)
        epoch, seconds, mean_loss = state["epoch"], state["seconds"], state["loss"]
        rounds = int(epoch) if state.get("rounds") is None else state["rounds"]
        logger.info("resuming %s after %g epochs", out, epoch)
    whole = plan.epochs * steps if plan.minutes is None else None
    with tqdm(desc=plan.recipe.name, total=whole, initial=int(epoch * steps), disable=None) as bar:
        while plan.going(epoch, seconds):
            try:
                done = _round(plan, ensemble, images, labels, optimizer, schedule, rounds, seconds, bar)
            except FloatingPointError as error:
                kept = f"; the weights after epoch {int(epoch)} are kept in {checkpoint}" if int(epoch) else ""
                remedy = f"train again in another folder with a lower max_lr (now {plan.recipe.max_lr:g})"
                what = f"{plan.recipe.name!r} diverged in epoch {int(epoch) + 1}, its {error}"
                raise FloatingPointError(f"{what}: {remedy}{kept}") from None
            taken, mean_loss, spent = done
            rounds, epoch, seconds = rounds + 1, epoch + taken / steps, seconds + spent
            epoch = int(epoch) if plan.minutes is None else epoch
            state = {
                "run": run,
                "rounds": rounds,
                "ensemble": ensemble.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": {k: v for k, v in schedule.state_dict().items() if not callable(v)},
                "epoch": epoch,
                "seconds": seconds,
                "loss": mean_loss,
            }
            with whole_file(checkpoint) as file:
                torch.save(state, file)
            row = {"epoch": round(epoch, 2), "loss": round(mean_loss, 4), "seconds": round(seconds, 1)}
            with (out / "train.log").open("a") as log:
                log.write(json.dumps(row) + "\n")
            left = timedelta(seconds=round(plan.left(epoch, seconds)))
            logger.info("epoch %g: loss %.4f, %s left", round(epoch, 2), mean_loss, left)
    return {"seconds": seconds, "loss": mean_loss, "epochs": epoch}


def _round(
    plan: Plan,
    ensemble: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.OneCycleLR,
    number: int,
    before: float,
    bar: Any,
) -> tuple[int, float, float]:
    """Run one epoch, or as much of it as there is time for, ``before`` seconds into the run.

    Returns:
        The steps taken, their mean loss, and the seconds.

    Raises:
        FloatingPointError: Where the loss, or the weights, are no longer finite.
    """
    device, steps = images.device, len(images) // plan.batch_size
    streams = [torch.Generator().manual_seed(3 * (plan.seed * 1_000_003 + number) + stream) for stream in range(3)]
    others = _batches(plan, images, labels, streams[1])
    own = streams[2].initial_seed()
    seed_draws(ensemble, own, device)
    ensemble.train()
    began, spent, taken, total = time.monotonic(), 0.0, 0, torch.zeros((), dtype=torch.float64, device=device)
    for x, y in _batches(plan, images, labels, streams[0]):
        batch = Batch(ensemble, x, y, lambda: next(others)[0], streams[2], own, plan.data, plan.amp)
        loss = plan.recipe.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        total, taken = total + loss.detach(), taken + 1
        looks = taken % CHECK_EVERY == 0 or taken == steps or device.type == "cpu"
        if looks and not torch.isfinite(total):
            raise FloatingPointError(f"loss became {loss.item()}")
        optimizer.step()
        bar.update()
        spent = time.monotonic() - began
        plan.advance(schedule, before + spent)
        if plan.minutes is not None and (spent > ROUND or not plan.going(0, before + spent)):
            break
    if not finite(ensemble.state_dict()):
        raise FloatingPointError("weights are no longer finite")
    return taken, total.item() / taken, spent


def _batches(plan: Plan, images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented images and labels, in an order of the generator's."""
    steps = len(images) // plan.batch_size
    order = torch.randperm(len(images), generator=generator)[: steps * plan.batch_size].view(steps, plan.batch_size)
    for rows in order.to(images.device):
        x = augment(images[rows], pad=plan.data.pad, flip=plan.data.flip, generator=generator)
        yield x.contiguous(memory_format=torch.channels_last), labels[rows]


def finite(state: dict[str, Tensor]) -> bool:
    """Tell whether there is no NaN and no infinity in a state dict."""
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def _checked(checkpoint: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `train` keeps after every epoch, of the same run; ``None`` where there is none yet.

    Raises:
        ValueError: Where it is a file that `train` did not write, or one of another run (the message says what differs).
    """
    if not os.path.lexists(checkpoint):
        return None
    try:
        state = load_tensors(checkpoint)
    except ValueError as error:
        raise ValueError(f"{str(checkpoint)!r} cannot be read ({error}): remove it to train anew") from None
    try:
        check(state, StoredTraining)
        for name, value in _tensors(state):
            check_plain(value, name)
    except ValueError as error:
        raise ValueError(
            f"{str(checkpoint)!r} is no checkpoint of a training ({error}): choose another folder (out), or remove it"
        ) from None
    if state["run"] != run:
        differ = ", ".join(key for key in run if state["run"].get(key) != run[key])
        out = str(checkpoint.parent)
        raise ValueError(f"out {out!r} holds a run with other {differ}: choose another folder, or remove this one")
    return state


def _tensors(content: Any, name: str = "it") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in containers of containers, with the key that each stands under."""
    if isinstance(content, Tensor):
        yield name, content
    pairs = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, (list, tuple)) else ()
    )
    for key, value in pairs:
        yield from _tensors(value, str(key)[:60])


def _restore(checkpoint: Path, state: dict[str, Any], ensemble: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Put a training where its checkpoint left it; raise a `ValueError` where the checkpoint does not fit it."""
    try:
        ensemble.load_state_dict(state["ensemble"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(checkpoint)!r} does not fit this training ({said(error)}): choose another folder (out), or remove it"
        ) from None
