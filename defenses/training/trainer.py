"""The trainer: data, augmentation, schedule, checkpoint, resume, progress, log. A recipe brings the loss and optimiser.

Randomness is keyed by (seed, epoch), so that a run that was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ensemble_attacks.ensembles import Ensemble

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one defense's training from another's."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]  # (logits_MNK, labels) -> scalar
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    max_lr: float  # peak of the one-cycle schedule
    summary: str


def augment(images: Tensor, *, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random shifts by up to ``pad`` pixels (filled with zeros) and, with ``flip``, mirror images. (N, C, H, W)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    top = torch.randint(2 * pad + 1, (n, 1, 1, 1), generator=generator)
    left = torch.randint(2 * pad + 1, (n, 1, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height).view(1, 1, -1, 1), left + torch.arange(width).view(1, 1, 1, -1)
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
    samples, channels = torch.arange(n).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return padded[samples, channels, rows, columns]


def train(
    recipe: Recipe,
    ensemble: Ensemble,
    images: Tensor,
    labels: Tensor,
    *,
    out: Path,
    epochs: int,
    batch_size: int = 128,
    seed: int = 0,
    pad: int = 4,
    flip: bool = True,
    device: str | torch.device = "cpu",
    amp: bool = False,
) -> dict[str, float]:
    """Train ``ensemble`` in place by ``recipe``, with a checkpoint in ``out`` after every epoch; resumes from it.

    Returns:
        ``{"seconds": training time over all sittings, "loss": mean loss of the last epoch}``.

    Raises:
        ValueError: ``out`` holds the checkpoint of another run.
        FloatingPointError: the loss is not finite; the last good checkpoint stays.
    """
    run = {
        "recipe": recipe.name,
        "parameters": [list(p.shape) for p in ensemble.parameters()],
        "images": list(images.shape),
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "amp": amp,
    }
    checkpoint = out / "checkpoint.pt"
    state = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint.exists() else None
    if state is not None and state["run"] != run:
        differ = ", ".join(key for key in run if state["run"][key] != run[key])
        raise ValueError(f"out {str(out)!r} holds a run with other {differ}: choose another folder, or remove this one")
    out.mkdir(parents=True, exist_ok=True)
    ensemble = ensemble.to(torch.device(device)).to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer(ensemble.parameters())
    steps = len(images) // batch_size  # the last, short batch is left out: it would upset the batch statistics
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.max_lr, epochs=epochs, steps_per_epoch=steps, pct_start=0.3, cycle_momentum=False
    )
    start, seconds, mean_loss = 0, 0.0, float("nan")
    if state is not None:
        ensemble.load_state_dict(state["ensemble"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, seconds, mean_loss = state["epoch"], state["seconds"], state["loss"]
        logger.info("resuming %s after epoch %d of %d", out, start, epochs)

    for epoch in range(start, epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=generator)[: steps * batch_size].view(steps, batch_size)
        ensemble.train()
        began, total, correct = time.monotonic(), 0.0, 0.0
        for batch in tqdm(order, desc=f"{recipe.name} epoch {epoch + 1}/{epochs}", disable=None, leave=False):
            x = augment(images[batch], pad=pad, flip=flip, generator=generator)
            x, y = x.to(device, memory_format=torch.channels_last), labels[batch].to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                logits_MNK = ensemble.member_logits(x).float()
            loss = recipe.loss(logits_MNK, y)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of {recipe.name!r} became {loss.item()} in epoch {epoch + 1}: lower max_lr "
                    f"(now {recipe.max_lr}); the last good checkpoint is {checkpoint}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            correct += (logits_MNK.argmax(-1) == y).float().mean(0).sum().item()
        seconds += time.monotonic() - began
        mean_loss = total / steps
        state = {
            "run": run,
            "ensemble": ensemble.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": {k: v for k, v in schedule.state_dict().items() if not callable(v)},
            "epoch": epoch + 1,
            "seconds": seconds,
            "loss": mean_loss,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        row: dict[str, float] = {"epoch": epoch + 1, "loss": round(mean_loss, 4), "seconds": round(seconds, 1)}
        row["member_train_accuracy"] = round(correct / (steps * batch_size), 4)
        with (out / "train.log").open("a") as log:
            log.write(json.dumps(row) + "\n")
        logger.info("%s", row)
    return {"seconds": seconds, "loss": mean_loss}
