"""Provide the torchattacks side of every attack: checks, normalisation, model state, and the call into the one loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.descent import loop
from ensemble_attacks.descent.balls import make_ball
from ensemble_attacks.descent.look import Draws
from ensemble_attacks.descent.noise import generator_for, sample_keys
from ensemble_attacks.descent.objectives import Goal, expected
from ensemble_attacks.descent.stages import Stage, Trace
from ensemble_attacks.descent.steps import StepRule
from ensemble_attacks.models.adopted import AdoptedEnsemble, check_protocol
from ensemble_attacks.models.ask import as_module, ask, check_dtype
from ensemble_attacks.models.ensembles import check_members, member_probabilities
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.passes import uncounted
from ensemble_attacks.models.preserve import evaluating, preserved, private_random_state
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.models.view import Outputs, is_exact, look
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.validation import (
    check_count,
    check_images,
    check_label_range,
    check_labels,
    check_norm,
    check_positive,
    check_seed,
)

NORMALIZED_SLACK = 1e-5  # how far normalising and inverting may round an image out of [0, 1]


class CarefulAttack(Attack):
    """A torchattacks ``Attack`` that leaves everything as it found it, even after an exception.

    This holds for the model, the global random state, gradient mode, and its own normalisation. It can be called under
    ``torch.no_grad()``.
    """

    needs_members = False
    seed: int
    box: Box = UNIT

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name, as_module(model))

    def _check(self) -> None:
        """Raise on a setting that cannot be run.

        It is called on construction and, as settings may be changed, at each call.
        """

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        """Raise on images in [0, 1] or labels that cannot be attacked."""
        slack = 0.0
        if self.normalization_used is not None and isinstance(images, Tensor) and images.is_floating_point():
            slack = max(NORMALIZED_SLACK, 8 * torch.finfo(images.dtype).eps)
        check_images(images, slack=slack, box=self.box)
        check_labels(labels, images)
        if len(images):
            check_dtype(self.model, images)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Expect normalised images from now on, with this mean and standard deviation of each channel.

        Float64 arrays are taken, too, which would turn torchattacks' inputs to double.
        """
        super().set_normalization_used([float(m) for m in mean], [float(s) for s in std])

    def normalize(self, inputs: Tensor) -> Tensor:
        """Return images in [0, 1] normalised, in their own type, whatever torch's default is."""
        mean, std = (self.normalization_used[name].to(inputs) for name in ("mean", "std"))
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        """Return normalised images in [0, 1], in their own type, whatever torch's default is."""
        mean, std = (self.normalization_used[name].to(inputs) for name in ("mean", "std"))
        return inputs * std + mean

    def _as_taken(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as the model takes them: normalised as `get_logits` does."""
        return self.normalize(images) if self._normalization_applied is False else images

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the model's scores (N, K) of images in [0, 1], which are normalised where the model takes them so."""
        return ask(self.model, self._as_taken(inputs))

    def set_model(self, model: nn.Module) -> None:
        model = as_module(model)
        if self.needs_members:
            shown = model.other if isinstance(model, Surrogate) and model.other is not None else model
            check_members(shown, type(self).__name__)
        super().set_model(model)

    def _change_model_mode(self, given_training: Any) -> None:
        """Put the model into eval mode, unless ``set_model_training_mode`` says otherwise.

        Where ``eot_iter`` is set, the randomness that it averages over stays active.
        """
        if not self._model_training and getattr(getattr(self, "inner", self), "eot_iter", None) is not None:
            evaluating(self.model)
        else:
            super()._change_model_mode(given_training)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        self._check()
        normalized = self._normalization_applied
        try:
            with guarded(self.model, seed=getattr(self, "seed", 0) or 0, evaluate=False):
                return super().__call__(inputs, labels, *args, **kwargs)
        finally:
            self._set_normalization_applied(normalized)

    def save(
        self, data_loader: Any, save_path: Any = None, verbose: bool = True, return_verbose: bool = False, **kwargs: Any
    ) -> Any:
        """Run torchattacks' ``save``, with its arguments and results, and leave the model as it was.

        It predicts only where it reports: so it reports, to nobody, where it would not.
        """
        with preserved(self.model):
            report = super().save(data_loader, save_path, verbose, return_verbose or not verbose, **kwargs)
        return report if return_verbose else None


class DescentAttack(CarefulAttack):
    """A torchattacks ``Attack`` that runs in `ensemble_attacks.descent`.

    Subclasses say which stages to run (`_stages`) and by which step rule; everything that torchattacks users rely on
    (``MultiAttack``, ``set_normalization_used``, ``set_mode_targeted_*``, ``save``, ...) works as usual. Beyond
    torchattacks: inputs are checked, callers may be under ``torch.no_grad()``, the result does not depend on batch size or
    order, and nothing about the model or the global random state is left changed, even after an exception.

    Attributes:
        trace: a `Trace` to fill, or ``None``.
        eot_iter: the number of forward passes of every iterate of a random model, over which loss, gradient, success, best
            iterate and step size are means (Athalye et al. 2018, "Synthesizing Robust Adversarial Examples"). Where the
            model names its members and their probabilities, and the members are not random themselves, the mean is exact,
            and one pass of all of them. ``None``: the model has no randomness.
        draws_per_pass: how many of these go through the model as one batch; more than 1 only if it draws for each image by
            itself.
    """

    step_rule: type[StepRule]

    def __init__(
        self, name: str, model: nn.Module, *, norm: str, eps: float, steps: int, seed: int, batch_size: int | None
    ) -> None:
        super().__init__(name, model)
        self.norm, self.eps, self.steps, self.seed, self.batch_size = norm, eps, steps, seed, batch_size
        self.trace: Trace | None = None
        self.eot_iter: int | None = None
        self.draws_per_pass = 1
        self.supported_mode = ["default", "targeted"]

    def _check(self) -> None:
        check_norm(self.norm)
        check_positive("eps", self.eps)
        check_count("steps", self.steps)
        check_seed(self.seed)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if self.eot_iter is not None:
            check_count("eot_iter", self.eot_iter)
        check_count("draws_per_pass", self.draws_per_pass)

    def _stages(self, num_classes: int) -> list[Stage]:
        """Return the stages to run, of which the first may be an opening (`Stage`)."""
        raise NotImplementedError

    def _step_rule(self, x: Tensor, *, eps: float, steps: int) -> StepRule:
        return self.step_rule(x, eps=eps, steps=steps)

    def outputs(self, images: Tensor) -> Outputs:
        """Return what the loop sees of images in [0, 1], which are normalised as in `get_logits`."""
        return look(self.model, self._as_taken(images), inside=self.needs_members, expected=self.eot_iter is not None)

    def _draws(self, image: Tensor) -> Draws | None:
        """Return how to look at a random model; ``None`` where the expectation over its members is exact without draws."""
        if self.eot_iter is None or is_exact(self.model, self.outputs, image):
            return None
        return Draws(self.eot_iter, self.draws_per_pass)

    def _plan(self, num_classes: int) -> list[Stage]:
        """Return the stages to run on this model.

        They are those of `_stages`. Of a model that draws its members, each takes the mean over these where the attack does
        not look inside itself.
        """
        stages = self._stages(num_classes)
        if self.needs_members or self.eot_iter is None or member_probabilities(self.model) is None:
            return stages
        return [replace(stage, objective=expected(stage.objective)) for stage in stages]

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return a wrong class for each image, (N,), uniformly at random, keyed by (seed, image)."""
        scores_NK = self.get_output_with_eval_nograd(inputs)
        labels = scores_NK.argmax(1) if labels is None else labels.to(scores_NK.device)
        num_classes = scores_NK.shape[1]
        shifts = [
            torch.randint(1, num_classes, (), generator=generator_for(key, self.seed, -1), device="cpu")
            for key in sample_keys(inputs, self.box)
        ]
        return (labels + torch.stack(shifts).to(labels)) % num_classes

    def forward(self, images: Tensor, labels: Tensor, start: Tensor | None = None) -> Tensor:
        """Attack images, and return adversarial ones.

        Args:
            images: (N, C, H, W), floating point in [0, 1] (normalised after ``set_normalization_used``).
            labels: (N,), integer class indices.
            start: images in [0, 1] to start from, (N, C, H, W), projected into the ball around ``images``; ``None``: at
                random, or where the attack says, at ``images``.

        Returns:
            Adversarial images, shaped and typed like ``images``, inside the ball and the box, on the attack's device.

        Raises:
            TypeError, ValueError: Where an argument or setting cannot be used; nothing has been changed.
        """
        self._check_inputs(images, labels)
        device = images.device if self.device is None else self.device
        images = self.box.clamp(images.detach().clone().to(device))
        labels = labels.detach().clone().to(device).long()
        if not len(images):
            return images
        if start is not None:
            check_images(start, "start", box=self.box)
            if start.shape != images.shape:
                raise ValueError(f"start has shape {tuple(start.shape)}, images {tuple(images.shape)}: give one for each")
            start = make_ball(self.norm, images, self.eps, self.box).project(start.detach().to(images))
        if self.needs_members and not isinstance(self.model, Surrogate):
            with uncounted(self.model):
                check_protocol(self.model, self._as_taken(images), self.batch_size)
        with private_random_state(self.seed, self.model), uncounted(self.model), torch.no_grad():
            num_classes = self.outputs(images[:1]).scores_NK.shape[1]
        check_label_range(labels, num_classes)
        goal = Goal(labels)
        if self.targeted:
            aim = self.get_target_label(images, labels)
            self._change_model_mode(None)  # torchattacks' target functions may end in model.train()
            check_labels(aim, images, "target labels")
            goal = Goal(labels, aim.to(device).long(), only=True)
            check_label_range(aim, num_classes, "target labels")
        adversarial = loop.attack(
            self.outputs,
            images,
            goal,
            self._plan(num_classes),
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            step_rule=self._step_rule,
            seed=self.seed,
            start=start,
            draws=self._draws(images[:1]),
            batch_size=self.batch_size,
            trace=self.trace,
            box=self.box,
        )
        if self.needs_members and isinstance(self.model, AdoptedEnsemble):
            self.model.warn_of_mismatch(self._as_taken(adversarial), self.batch_size)
        return adversarial
