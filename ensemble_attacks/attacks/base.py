"""Provide the attacks that run in the one loop (`ensemble_attacks.descent`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks.careful import CarefulAttack
from ensemble_attacks.descent import loop
from ensemble_attacks.descent.look import Draws
from ensemble_attacks.descent.objectives import Goal, expected
from ensemble_attacks.descent.stages import Stage, Trace
from ensemble_attacks.descent.steps import StepRule
from ensemble_attacks.models.adopted import CHECKED, AdoptedEnsemble, check_claim, check_protocol
from ensemble_attacks.models.ask import member_probabilities
from ensemble_attacks.models.passes import uncounted
from ensemble_attacks.models.preserve import private_random_state
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.models.view import Outputs, is_exact, look
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.scores import per_sample
from ensemble_attacks.validation import (
    check_count,
    check_eps,
    check_images,
    check_norm,
    check_seed,
)

LOG_EXPECTED = "log-expected"  # the loss whose name several attacks know


class DescentAttack(CarefulAttack):
    """A torchattacks ``Attack`` that runs in `ensemble_attacks.descent`.

    Subclasses say which stages to run (`_stages`) and by which step rule; everything that torchattacks users rely on
    (``MultiAttack``, ``set_normalization_used``, ``set_mode_targeted_*``, ``save``, ...) works as usual. The result does not
    depend on batch size or order, and what a call needs beyond the images it returns grows with ``batch_size`` alone.

    Attributes:
        trace: a `Trace` to fill, or ``None``.
        eot_iter: the number of forward passes of every iterate of a random model, over which loss, gradient, success, best
            iterate and step size are means (Athalye et al. 2018, "Synthesizing Robust Adversarial Examples"). Where the
            model names its members and their probabilities, and the members are not random themselves, the mean is exact,
            and one pass of all of them. ``None``: the model has no randomness.
        draws_per_pass: how many of these go through the model as one batch; more than 1 only if it draws for each image by
            itself.
        shares_N: the share of eps that each image's ball has, (N,), while a search over radii says it (`MinimalNorm`);
            ``None``: all of it.
    """

    step_rule: type[StepRule]

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        norm: str,
        eps: float | Tensor,
        steps: int,
        seed: int,
        batch_size: int | None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(name, model)
        self.box, self.mask = box, mask
        self.norm, self.eps, self.steps, self.seed, self.batch_size = norm, eps, steps, seed, batch_size
        self.trace: Trace | None = None
        self.eot_iter: int | None = None
        self.draws_per_pass = 1
        self.shares_N: Tensor | None = None
        self.supported_mode = ["default", "targeted"]

    def _check(self) -> None:
        check_norm(self.norm)
        check_eps(self.eps)
        check_count("steps", self.steps)
        check_seed(self.seed)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if self.eot_iter is not None:
            check_count("eot_iter", self.eot_iter)
        check_count("draws_per_pass", self.draws_per_pass)

    @property
    def _of_expectation(self) -> bool:
        """Tell whether what is climbed is a loss of the expected probability, and no loss of each draw."""
        return getattr(self, "loss", None) == LOG_EXPECTED

    def _stages(self, num_classes: int) -> list[Stage]:
        """Return the stages to run, of which the first may be an opening (`Stage`)."""
        raise NotImplementedError

    def _step_rule(self, x: Tensor, *, eps: float, steps: int) -> StepRule:
        return self.step_rule(x, eps=eps, steps=steps)

    def outputs(self, images: Tensor) -> Outputs:
        """Return what the loop sees of images in [0, 1], which are normalised as in `get_logits`."""
        return look(self.model, self._as_taken(images), inside=self.needs_members, expected=self.eot_iter is not None)

    def _radius(self, images: Tensor) -> tuple[float, Tensor | None]:
        """Return the ball's radius, and the scale that it is in (`Ball`): eps for each feature, 0 where nothing may move."""
        eps, scale = (1.0, self.eps) if isinstance(self.eps, Tensor) else (self.eps, None)
        if self.mask is not None:
            scale = self.mask.double() if scale is None else scale.to(self.mask.device) * self.mask
        if self.shares_N is not None:
            shares = per_sample(self.shares_N, images).expand_as(images)
            scale = shares if scale is None else scale.to(shares.device) * shares
        return eps, scale

    def _draws(self, image: Tensor) -> Draws | None:
        """Return how to look at a random model; ``None`` where the expectation over its members is exact without draws."""
        if self.eot_iter is None or is_exact(self.model, self.outputs, image):
            return None
        return Draws(self.eot_iter, self.draws_per_pass)

    def _plan(self, num_classes: int) -> list[Stage]:
        """Return the stages to run on this model.

        They are those of `_stages`. Of a model that draws its members, each takes the mean over these where the attack does
        not look inside itself, nor at the expected probability.
        """
        stages = self._stages(num_classes)
        inside = self.needs_members or self._of_expectation
        if inside or self.eot_iter is None or member_probabilities(self.model) is None:
            return stages
        return [replace(stage, objective=expected(stage.objective)) for stage in stages]

    def _goal(self, images: Tensor, labels: Tensor, targets: Tensor | None) -> Goal:
        """Return what the attack is after: to leave the labels, or to reach the targets."""
        return Goal(labels) if targets is None else Goal(labels, targets, only=True)

    def _check_inputs(self, images: Tensor, labels: Tensor, start: Tensor | None = None, **options: Any) -> None:
        super()._check_inputs(images, labels)
        if start is not None:
            check_images(start, "start", box=self.box)
            if start.shape != images.shape:
                raise ValueError(f"start has shape {tuple(start.shape)}, images {tuple(images.shape)}: give one for each")

    def _num_classes(self, images: Tensor) -> int:
        with uncounted(self.model):
            if self.needs_members and not isinstance(self.model, Surrogate):
                check_protocol(self.model, self._as_taken(images), self.batch_size)
            else:
                check_claim(self.model, self._as_taken(images), self.batch_size or CHECKED, images.device)
        super()._num_classes(images)
        with private_random_state(self.seed, self.model), uncounted(self.model), torch.no_grad():
            return self.outputs(images[:1]).scores_NK.shape[1]

    def _attack(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        num_classes: int,
        start: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return adversarial images (N, ...).

        They begin at ``start``, images in the box, (N, ...), projected into the ball around ``images``; ``None``: at
        random, or where the attack says, at ``images``.
        """
        eps, scale = self._radius(images)
        adversarial = loop.attack(
            self.outputs,
            images,
            self._goal(images, labels, targets),
            self._plan(num_classes),
            norm=self.norm,
            eps=eps,
            steps=self.steps,
            step_rule=self._step_rule,
            seed=self.seed,
            start=None if start is None else start.detach().to(images),
            draws=self._draws(images[:1]),
            batch_size=self.batch_size,
            trace=self.trace,
            box=self.box,
            scale=scale,
        )
        if self.needs_members and isinstance(self.model, AdoptedEnsemble):
            self.model.warn_of_mismatch(self._as_taken(adversarial), self.batch_size)
        return adversarial


@contextmanager
def tracing(attack: object) -> Iterator[Trace | None]:
    """Yield the trace of an attack of this kind within the context, by which it says what it saw; ``None`` of any other."""
    if not isinstance(attack, DescentAttack):
        yield None
        return
    own, attack.trace = attack.trace, Trace()
    try:
        yield attack.trace
    finally:
        attack.trace = own
