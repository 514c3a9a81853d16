"""The trainer: data, augmentation, schedule, checkpoint, resume, progress, log. A recipe brings the loss and optimiser.

Randomness is keyed by (seed, epoch), so that a run that was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from defenses.draws import seed_draws
from ensemble_attacks.files import load_tensors, whole_file

logger = logging.getLogger(__name__)
KEPT = {"run", "ensemble", "optimizer", "schedule", "epoch", "seconds", "loss"}  # in a checkpoint
FEWEST_STEPS = 10  # below which the one-cycle schedule leaves a network untrained
TICKS = 100_000  # steps of the schedule that follows the clock
ROUND = 600  # seconds between its checkpoints, where an epoch takes longer
CHECK_EVERY = 20  # steps between looks at the loss, for which a GPU has to be waited for


@dataclass(frozen=True)
class Settings:
    """What the dataset decides, whatever the recipe.

    Attributes:
        pad, flip: augmentation (`augment`).
        eps: Linf radius of adversarial training, in pixel units of [0, 1].
        distillation_eps: of the images that DVERGE distils.
    """

    pad: int
    flip: bool
    eps: float
    distillation_eps: float


@dataclass(frozen=True, eq=False)
class Batch:
    """What a recipe's loss sees of one step.

    Attributes:
        ensemble: an `Ensemble`, or a self-ensemble, in training mode.
        x, y: augmented images (N, C, H, W) in [0, 1] and labels (N,).
        other_images: draws as many images of a second, independent stream.
        generator: for any other draw of this step.
        epoch_seed: for draws that hold for the whole epoch.
        data: the dataset's settings.
        amp: whether networks run in bfloat16.
    """

    ensemble: Any
    x: Tensor
    y: Tensor
    other_images: Callable[[], Tensor]
    generator: torch.Generator
    epoch_seed: int
    data: Settings
    amp: bool = False

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.amp)

    def logits(self, x: Tensor, member: int | None = None) -> Tensor:
        """Logits in float32 of all members, (M, N, K), or of one, (N, K)."""
        with self.autocast():
            scores = self.ensemble.member_logits(x) if member is None else self.ensemble.members[member](x)
        return scores.float()

    @contextmanager
    def crafting(self) -> Iterator[None]:
        """Networks in eval mode, so that the images being made leave no trace in the batch statistics."""
        self.ensemble.eval()
        try:
            yield
        finally:
            self.ensemble.train()


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one defense's training from another's.

    Attributes:
        loss: what to minimise, a scalar.
        max_lr: peak of the one-cycle schedule.
        negative_slope: of the members' leaky ReLU; 0 is ReLU.
        start_from: the recipe whose weights training starts from; ``None``: random ones.
        prefix: of the architecture, where it is more than the member's network.
        fewest_members: that make sense.
    """

    name: str
    loss: Callable[[Batch], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    max_lr: float
    summary: str
    negative_slope: float = 0.0
    start_from: str | None = None
    prefix: str = ""
    fewest_members: int = 2


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4, eps=1e-7)


def input_gradients(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every member's logits (M, N, K) and gradient of its cross-entropy with respect to the image (M, N, C, H, W), through
    which a loss can be differentiated.
    """
    inputs = [x.detach().clone().requires_grad_() for _ in batch.ensemble.members]
    logits = [batch.logits(own, member) for member, own in enumerate(inputs)]
    total = torch.stack([F.cross_entropy(logits_NK, batch.y, reduction="sum") for logits_NK in logits]).sum()
    return torch.stack(logits), torch.stack(torch.autograd.grad(total, inputs, create_graph=True))


def pair_cosines(gradients_MN: Tensor) -> Tensor:
    """The cosines between the members' input gradients (M, N, ...), one row a pair of members, (M (M - 1) / 2, N)."""
    flat_MND = gradients_MN.flatten(2)
    pairs = combinations(range(len(flat_MND)), 2)
    return torch.stack([F.cosine_similarity(flat_MND[a], flat_MND[b], dim=-1) for a, b in pairs])


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
    return padded[tuple(index.to(images.device) for index in (samples, channels, rows, columns))]


def train(
    recipe: Recipe,
    ensemble: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    out: Path,
    epochs: int,
    data: Settings,
    batch_size: int = 128,
    seed: int = 0,
    start_from: str | None = None,
    device: str | torch.device = "cpu",
    amp: bool = False,
    minutes: float | None = None,
) -> dict[str, float]:
    """Train ``ensemble`` in place by ``recipe``, with a checkpoint in ``out`` after every epoch (with ``minutes``, every ten
    minutes at least); resumes from it.

    Args:
        start_from: what the ensemble's weights are, to tell this run from others.
        amp: run the networks in bfloat16 autocast.
        minutes: of training, over all sittings, in place of ``epochs``: the schedule follows the clock, so that the run ends
            in time on whatever machine, however busy; what it ends with is not reproducible.

    Returns:
        ``{"seconds": training time over all sittings, "loss": mean loss of the last epoch, "epochs": as many as were run}``.

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
        "start_from": start_from,
        "max_lr": recipe.max_lr,
        "amp": amp,
        **asdict(data),
        **({} if minutes is None else {"epochs": None, "minutes": minutes}),
    }
    if batch_size > len(images):
        raise ValueError(f"batch_size is {batch_size}, but there are {len(images)} images: choose a smaller one")

    checkpoint = out / "checkpoint.pt"
    state = _read(checkpoint) if checkpoint.exists() else None
    if state is not None and state["run"] != run:
        differ = ", ".join(key for key in run if state["run"].get(key) != run[key])
        raise ValueError(f"out {str(out)!r} holds a run with other {differ}: choose another folder, or remove this one")
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    ensemble = ensemble.to(device).to(memory_format=torch.channels_last)
    images, labels = images.to(device), labels.to(device)
    optimizer = recipe.optimizer(ensemble.parameters())
    steps = len(images) // batch_size  # the last, short batch is left out: it would upset the batch statistics
    if minutes is None and epochs * steps < FEWEST_STEPS:
        logger.warning("%d steps in all are too few to train with: more epochs, or a smaller batch_size", epochs * steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.max_lr,
        total_steps=epochs * steps if minutes is None else TICKS,
        pct_start=0.3,
        cycle_momentum=False,
    )
    rounds, epoch, seconds, mean_loss = 0, 0.0, 0.0, float("nan")
    if state is not None:
        ensemble.load_state_dict(state["ensemble"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        epoch, seconds, mean_loss = state["epoch"], state["seconds"], state["loss"]
        rounds = state.get("rounds", int(epoch))
        logger.info("resuming %s after %g epochs", out, epoch)

    def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=generator)[: steps * batch_size].view(steps, batch_size).to(device)
        for rows in order:
            x = augment(images[rows], pad=data.pad, flip=data.flip, generator=generator)
            yield x.contiguous(memory_format=torch.channels_last), labels[rows]

    def diverged(what: str, epoch: int) -> FloatingPointError:
        kept = f"; the weights after epoch {epoch} are kept in {checkpoint}" if epoch else ""
        remedy = f"train again in another folder with a lower max_lr (now {recipe.max_lr:g})"
        return FloatingPointError(f"{recipe.name!r} diverged in epoch {epoch + 1}, its {what}: {remedy}{kept}")

    def in_time(spent: float) -> bool:
        """Is there time left? Moves the schedule to where it is to be."""
        if minutes is not None:
            schedule.last_epoch = min(int(spent / (60 * minutes) * TICKS), TICKS) - 1
        schedule.step()
        return minutes is None or spent < 60 * minutes

    going = epoch < epochs if minutes is None else seconds < 60 * minutes
    bar = tqdm(desc=recipe.name, total=epochs * steps if minutes is None else None, initial=int(epoch * steps), disable=None)
    while going:
        streams = [torch.Generator().manual_seed(3 * (seed * 1_000_003 + rounds) + stream) for stream in range(3)]
        others = batches(streams[1])
        seed_draws(ensemble, streams[2].initial_seed(), device)
        ensemble.train()
        began, taken, total = time.monotonic(), 0, torch.zeros((), dtype=torch.float64, device=device)
        for x, y in batches(streams[0]):
            loss = recipe.loss(
                Batch(ensemble, x, y, lambda: next(others)[0], streams[2], streams[2].initial_seed(), data, amp)  # noqa: B023
            )
            optimizer.zero_grad()
            loss.backward()
            total, taken = total + loss.detach(), taken + 1
            looks = taken % CHECK_EVERY == 0 or taken == steps or device.type == "cpu"
            if looks and not torch.isfinite(total):
                raise diverged(f"loss became {loss.item()}", int(epoch))
            optimizer.step()
            bar.update()
            spent = time.monotonic() - began
            if not (going := in_time(seconds + spent)) or (minutes is not None and spent > ROUND):
                break
        if not finite(ensemble.state_dict()):
            raise diverged("weights are no longer finite", int(epoch))
        seconds += time.monotonic() - began
        mean_loss = total.item() / taken
        rounds, epoch = rounds + 1, epoch + taken / steps
        state = {
            "run": run,
            "rounds": rounds,
            "ensemble": ensemble.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": {k: v for k, v in schedule.state_dict().items() if not callable(v)},
            "epoch": int(epoch) if minutes is None else epoch,
            "seconds": seconds,
            "loss": mean_loss,
        }
        with whole_file(checkpoint) as file:
            torch.save(state, file)
        row = {"epoch": round(epoch, 2), "loss": round(mean_loss, 4), "seconds": round(seconds, 1)}
        with (out / "train.log").open("a") as log:
            log.write(json.dumps(row) + "\n")
        left = 60 * minutes - seconds if minutes is not None else seconds / epoch * (epochs - epoch)
        logger.info("epoch %g: loss %.4f, %s left", round(epoch, 2), mean_loss, timedelta(seconds=round(left)))
        going = going and (minutes is not None or epoch < epochs)
    bar.close()
    return {"seconds": seconds, "loss": mean_loss, "epochs": int(epoch) if minutes is None else epoch}


def finite(state: dict[str, Tensor]) -> bool:
    """Is there no NaN and no infinity in it?"""
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def _read(checkpoint: Path) -> dict[str, Any]:
    """What `train` keeps after every epoch; ValueError for a file that it did not write."""
    try:
        state = load_tensors(checkpoint)
    except ValueError as error:
        raise ValueError(f"{str(checkpoint)!r} cannot be read ({error}): remove it to train anew") from None
    if not isinstance(state, dict) or not state.keys() >= KEPT:
        raise ValueError(f"{str(checkpoint)!r} is no checkpoint of a training: choose another folder (out), or remove it")
    return state
