"""Define what a training is made of: the recipe, what its loss sees, and the plan of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

TICKS = 100_000  # steps of the schedule that follows the clock
ROUND = 600  # seconds between its checkpoints, where an epoch takes longer


@dataclass(frozen=True)
class Settings:
    """A record of what the dataset decides, whatever the recipe.

    Attributes:
        pad, flip: the augmentation (`augment`).
        eps: the Linf radius of adversarial training, in pixel units of [0, 1].
        distillation_eps: the Linf radius of the images that DVERGE distils, in the same units.
    """

    pad: int
    flip: bool
    eps: float
    distillation_eps: float


@dataclass(frozen=True, eq=False)
class Batch:
    """A record of what a recipe's loss sees of one step.

    Attributes:
        ensemble: an `Ensemble`, or a self-ensemble, in training mode.
        x, y: augmented images (N, C, H, W) in [0, 1] and labels (N,).
        other_images: draws as many images of a second, independent stream.
        generator: the generator of any other draw of this step.
        epoch_seed: the seed of draws that hold for the whole epoch.
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
        """Return the logits in float32 of all members, (M, N, K), or of one, (N, K)."""
        with self.autocast():
            scores = self.ensemble.member_logits(x) if member is None else self.ensemble.members[member](x)
        return scores.float()

    @contextmanager
    def crafting(self) -> Iterator[None]:
        """Put the networks into eval mode within the context.

        Images that are made there leave no trace in the batch statistics.
        """
        self.ensemble.eval()
        try:
            yield
        finally:
            self.ensemble.train()


@dataclass(frozen=True)
class Recipe:
    """A record of what distinguishes one defense's training from another's.

    Attributes:
        name: the name by which it is asked for.
        loss: the function from a `Batch` to what is minimised, a scalar.
        optimizer: makes the optimiser of the parameters.
        max_lr: the peak of the one-cycle schedule.
        summary: what the defense is, for its card.
        negative_slope: the slope of the members' leaky ReLU; 0 is ReLU.
        start_from: the recipe whose weights training starts from; ``None``: random ones.
        prefix: what stands before the network's name in that of the architecture, where this is more than the member's
            network.
        fewest_members: the smallest number of members that makes sense.
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


@dataclass(frozen=True)
class Plan:
    """A plan of one run of a recipe.

    Attributes:
        recipe: the recipe.
        data: the dataset's settings.
        epochs: the number of epochs, but for ``minutes``.
        batch_size: the number of images per step.
        seed: the seed of all randomness of the training.
        start_from: what the ensemble's weights are, to tell this run from others.
        amp: whether to run the networks in bfloat16 autocast.
        minutes: the minutes of training, over all sittings, in place of ``epochs``: the schedule follows the clock, so that
            the run ends in time on whatever machine, however busy; what it ends with is not reproducible.
    """

    recipe: Recipe
    data: Settings
    epochs: int = 30
    batch_size: int = 128
    seed: int = 0
    start_from: str | None = None
    amp: bool = False
    minutes: float | None = None

    def identity(self, ensemble: nn.Module, images: Tensor) -> dict[str, Any]:
        """Return what a checkpoint must have in common with this run."""
        return {
            "recipe": self.recipe.name,
            "parameters": [list(p.shape) for p in ensemble.parameters()],
            "images": list(images.shape),
            "epochs": self.epochs if self.minutes is None else None,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "start_from": self.start_from,
            "max_lr": self.recipe.max_lr,
            "amp": self.amp,
            **asdict(self.data),
            **({} if self.minutes is None else {"minutes": self.minutes}),
        }

    def for_card(self) -> dict[str, Any]:
        """Return what a card says of the run, for people."""
        return {
            "recipe": self.recipe.name,
            "start_from": self.start_from,
            "max_lr": self.recipe.max_lr,
            "schedule": "one cycle, peak at 30%",
            **({"epochs": self.epochs} if self.minutes is None else {"minutes": self.minutes}),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": "bfloat16 autocast" if self.amp else "float32",
            **asdict(self.data),
        }

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
        """Return the schedule of the learning rate; ``steps`` is the number of steps of an epoch."""
        total = self.epochs * steps if self.minutes is None else TICKS
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.recipe.max_lr, total_steps=total, pct_start=0.3, cycle_momentum=False
        )

    def going(self, epoch: float, seconds: float) -> bool:
        """Tell whether there is anything left to do, after so many epochs and seconds."""
        return epoch < self.epochs if self.minutes is None else seconds < 60 * self.minutes

    def advance(self, schedule: torch.optim.lr_scheduler.OneCycleLR, seconds: float) -> None:
        """Move the schedule on, after a step."""
        if self.minutes is not None:
            schedule.last_epoch = min(int(seconds / (60 * self.minutes) * TICKS), TICKS) - 1
        schedule.step()

    def left(self, epoch: float, seconds: float) -> float:
        """Return the seconds that the rest will take."""
        return seconds / epoch * (self.epochs - epoch) if self.minutes is None else 60 * self.minutes - seconds
