"""Find for every image the smallest radius at which an attack succeeds, by a search over the attack's own radius.

What holds at one radius is the robust accuracy there; the distances of these images are the whole curve of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.attacks.composed import ComposedAttack
from ensemble_attacks.descent.stages import NEVER, Trace
from ensemble_attacks.models.ask import ask
from ensemble_attacks.norms import NORMS
from ensemble_attacks.validation import check_count

FIRST = 64  # into how many parts the largest radius is divided by the first one tried
LONG = 5  # searches at the end with all of the attack's steps
DISTRUSTED = 0.5  # of the radius found: the attack's failures beyond it, with few steps, are no proof
RESOLVED = 5e-3  # of the radius found: what the search stops at


class MinimalNorm(ComposedAttack):
    r"""A search for the smallest perturbation by which another attack succeeds.

    The radius, which is each image's own, begins at a 64th of the attack's ``eps``, is doubled until the attack succeeds,
    and bisected between the largest failure and the distance of the image found. An attack of this package's loop begins
    each time at the last image, put into the new ball, and takes ``short`` steps, and all of its own in the last five
    searches, which begin at half of the radius found, as a failure is no proof. Other attacks are run as they are, on all
    images of the same radius at once.

    Arguments:
        attack (Attack): the attack, whose ``eps`` is the largest radius; norm, seed and all else are its own.
        searches (int): how often the attack is run at most. (Default: 14)
        short (int): gradient steps of each descent in all but the last searches, where it has ``steps``. (Default: 20)

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images: of each the nearest that succeeded; where none did, the attack's last within ``eps``

    Examples::
        >>> from ensemble_attacks import PGD, MinimalNorm
        >>> images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> attack = MinimalNorm(PGD(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), eps=0.5, steps=10, n_restarts=1))
        >>> attack(images, labels).shape
        torch.Size([5, 3, 2, 2])
    """

    def __init__(self, attack: Attack, *, searches: int = 14, short: int = 20) -> None:
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be a torchattacks Attack, got {type(attack).__name__}")
        super().__init__("MinimalNorm", attack.model)
        self.inner, self.searches, self.short = attack, searches, short
        self.supported_mode = attack.supported_mode
        self._check()

    def _check(self) -> None:
        super()._check()
        check_count("searches", self.searches, at_least=LONG + 1)
        check_count("short", self.short)
        if not isinstance(getattr(self.inner, "eps", None), float | int):
            raise ValueError(f"{type(self.inner).__name__} has no eps that is a number: there is no radius to search")

    def set_model(self, model: nn.Module) -> None:
        super().set_model(model)
        if "inner" in vars(self):
            self.inner.set_model(model)

    def _attack(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, num_classes: int, *args: Any, **options: Any
    ) -> Tensor:
        largest, norm = float(self.inner.eps), getattr(self, "norm", "Linf")
        low_N = images.new_zeros(len(images), dtype=torch.double)
        high_N, best, last = torch.full_like(low_N, torch.inf), images.clone(), images.clone()
        for search in range(self.searches):
            long = search >= self.searches - LONG
            if search == self.searches - LONG:
                low_N = torch.where(high_N.isfinite(), low_N.minimum(DISTRUSTED * high_N), low_N)
            unknown = (2 * low_N).clamp(largest / FIRST, largest)
            radius_N = torch.where(high_N.isfinite(), (low_N + high_N) / 2, unknown)
            open_N = torch.where(high_N.isfinite(), high_N - low_N > RESOLVED * high_N, low_N < largest)
            rows = torch.nonzero(open_N).squeeze(-1)
            if not len(rows):
                continue
            own = None if targets is None else targets[rows]
            found, fooled = self._searched(images[rows], labels[rows], own, radius_N[rows], last[rows], long)
            distance_N = NORMS[norm].size(found.double() - images[rows].double())
            last[rows] = found
            nearer = fooled & (distance_N < high_N[rows])
            best[rows[nearer]] = found[nearer]
            high_N[rows[nearer]] = distance_N[nearer]
            low_N[rows[~fooled]] = radius_N[rows[~fooled]]
        return torch.where(high_N.isfinite().view(-1, *[1] * (images.dim() - 1)), best, last)

    def _searched(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, radius_N: Tensor, start: Tensor, long: bool
    ) -> tuple[Tensor, Tensor]:
        """Return what the attack makes of images at their radii, and whether it succeeds, (N,) bool."""
        if isinstance(self.inner, DescentAttack):
            return self._descended(self.inner, images, labels, targets, radius_N, start, long)
        found, largest = images.clone(), self.inner.eps
        try:
            for radius in radius_N.unique().tolist():
                rows = torch.nonzero(radius_N == radius).squeeze(-1)
                self.inner.eps = radius
                own = None if targets is None else targets[rows]
                found[rows] = self._run(self.inner, images[rows], labels[rows], own).to(found)
        finally:
            self.inner.eps = largest
        return found, self._succeeded(found, labels, targets)

    def _descended(
        self,
        part: DescentAttack,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        radius_N: Tensor,
        start: Tensor,
        long: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the same of an attack of this package's loop, which takes a radius for each image, and a start."""
        steps, trace = part.steps, part.trace
        try:
            part.shares_N, part.trace = radius_N / float(part.eps), Trace()  # type: ignore[arg-type]
            part.steps = steps if long else min(self.short, steps)
            found = self._run(part, images, labels, targets, start=start)
            return found, torch.cat(part.trace.fooled_in) < NEVER
        finally:
            part.shares_N, part.trace, part.steps = None, trace, steps

    @torch.no_grad()
    def _succeeded(self, images: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        parts = images.split(getattr(self, "batch_size", None) or len(images))
        answers = torch.cat([ask(self.model, self._as_taken(part)).argmax(1) for part in parts])
        return answers != labels if targets is None else answers == targets
