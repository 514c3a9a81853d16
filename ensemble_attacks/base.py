"""The torchattacks side of every attack: checks, normalisation, model state, and the call into the one loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks import descent
from ensemble_attacks.descent import Outputs, Stage, Trace
from ensemble_attacks.ensembles import AdoptedEnsemble, check_members
from ensemble_attacks.noise import generator_for, sample_keys
from ensemble_attacks.objectives import best_other, gather, margin
from ensemble_attacks.preserve import preserved, private_random_state
from ensemble_attacks.steps import StepRule
from ensemble_attacks.validation import (
    check_count,
    check_images,
    check_label_range,
    check_labels,
    check_norm,
    check_positive,
)

NORMALIZED_SLACK = 1e-5  # how far normalising and inverting may round an image out of [0, 1]


def lead(outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
    """By how much the best other class, or the one aimed at, leads the label's score, (N,): ``max_{j != y} z_j - z_y`` or
    ``z_t - z_y``.
    """
    if targets is None:
        return -margin(outputs.scores_NK, labels)
    return gather(outputs.scores_NK, targets) - gather(outputs.scores_NK, labels)


class DescentAttack(Attack):
    """A torchattacks ``Attack`` that runs in `ensemble_attacks.descent`.

    Subclasses say which stages to run (`_stages`) and by which step rule; everything that torchattacks users rely on
    (``MultiAttack``, ``set_normalization_used``, ``set_mode_targeted_*``, ``save``, ...) works as usual. Beyond
    torchattacks: inputs are checked, callers may be under ``torch.no_grad()``, the result does not depend on batch size or
    order, and nothing about the model or the global random state is left changed, even after an exception.

    Attributes:
        trace: a `Trace` to fill, or ``None``.
    """

    needs_members = False
    step_rule: type[StepRule]

    def __init__(
        self, name: str, model: nn.Module, *, norm: str, eps: float, steps: int, seed: int, batch_size: int | None
    ) -> None:
        super().__init__(name, model)
        self.norm, self.eps, self.steps, self.seed, self.batch_size = norm, eps, steps, seed, batch_size
        self.trace: Trace | None = None
        self.supported_mode = ["default", "targeted"]

    def _check(self) -> None:
        """Raise on a setting that cannot be run. Called on construction and, as settings may be changed, at each call."""
        check_norm(self.norm)
        check_positive("eps", self.eps)
        check_count("steps", self.steps)
        check_count("seed", self.seed, at_least=0)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def _stages(self, num_classes: int) -> list[Stage]:
        raise NotImplementedError

    def _step_rule(self, x: Tensor, *, eps: float, steps: int) -> StepRule:
        return self.step_rule(x, eps=eps, steps=steps)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Expect normalised images. Also takes float64 arrays, which would turn torchattacks' inputs to double."""
        super().set_normalization_used([float(m) for m in mean], [float(s) for s in std])

    def set_model(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: wrap the callable in one")
        if self.needs_members:
            check_members(model, type(self).__name__)
        super().set_model(model)

    def outputs(self, images: Tensor) -> Outputs:
        """Scores, and members' logits where the attack needs them, of images in [0, 1]; normalises as `get_logits` does."""
        if not self.needs_members:
            return Outputs(self.get_logits(images))
        if self._normalization_applied is False:
            images = self.normalize(images)
        logits_MNK = self.model.member_logits(images)
        return Outputs(self.model.aggregate(logits_MNK), logits_MNK)

    @staticmethod
    def rivals(outputs: Outputs, aim: Tensor | None) -> Tensor:
        """What a targeted attack has to overtake: the best class that is not the one aimed at, (N,)."""
        assert aim is not None
        return best_other(outputs.scores_NK.detach(), aim)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """A wrong class, uniformly at random for each image, by (seed, image)."""
        scores_NK = self.get_output_with_eval_nograd(inputs)
        labels = scores_NK.argmax(1) if labels is None else labels.to(scores_NK.device)
        num_classes = scores_NK.shape[1]
        shifts = [
            torch.randint(1, num_classes, (), generator=generator_for(key, self.seed, -1)) for key in sample_keys(inputs)
        ]
        return (labels + torch.stack(shifts).to(labels)) % num_classes

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Attack.

        Args:
            images: (N, C, H, W), floating point in [0, 1] (normalised after ``set_normalization_used``).
            labels: (N,), integer class indices.

        Returns:
            Adversarial images, shaped and typed like ``images``, inside the ball and the box, on the attack's device.

        Raises:
            TypeError, ValueError: an argument or setting that cannot be used; nothing has been changed.
        """
        check_images(images, slack=0.0 if self.normalization_used is None else NORMALIZED_SLACK)
        check_labels(labels, images)
        device = images.device if self.device is None else self.device
        images = images.detach().clone().to(device).clamp(0, 1)
        labels = labels.detach().clone().to(device).long()
        if not len(images):
            return images
        aim = None
        if self.targeted:
            with torch.no_grad():
                check_label_range(labels, self.get_logits(images[:1]).shape[-1])
            aim = self.get_target_label(images, labels)
            self._change_model_mode(None)  # torchattacks' target functions may end in model.train()
            check_labels(aim, images, "target labels")
            aim = aim.to(device).long()
        adversarial = descent.attack(
            self.outputs,
            images,
            labels,
            self._stages,
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            step_rule=self._step_rule,
            seed=self.seed,
            aim=aim,
            batch_size=self.batch_size,
            trace=self.trace,
        )
        if self.needs_members and isinstance(self.model, AdoptedEnsemble):
            self.model.warn_of_mismatch(self.normalize(adversarial) if self._normalization_applied is False else adversarial)
        return adversarial

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        self._check()
        normalized = self._normalization_applied
        try:
            with (
                preserved(self.model),
                private_random_state(self.seed),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                return super().__call__(inputs, labels, *args, **kwargs)
        finally:
            self._set_normalization_applied(normalized)

    def save(
        self, data_loader: Any, save_path: Any = None, verbose: bool = True, return_verbose: bool = False, **kwargs: Any
    ) -> Any:
        """torchattacks' ``save``, which predicts only where it reports: so it reports, to nobody, where it would not."""
        with preserved(self.model):
            report = super().save(data_loader, save_path, verbose, return_verbose or not verbose, **kwargs)
        return report if return_verbose else None
