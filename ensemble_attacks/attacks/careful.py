"""Provide the torchattacks side of every attack: checks, normalisation, model state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.descent.noise import generator_for, sample_keys
from ensemble_attacks.models.ask import as_module, ask, check_dtype, classes_of
from ensemble_attacks.models.ensembles import check_members
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.passes import uncounted
from ensemble_attacks.models.preserve import evaluating, preserved, private_random_state
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.norms import NORMS, Box
from ensemble_attacks.validation import (
    check_count,
    check_images,
    check_label_range,
    check_labels,
    check_mask,
    check_radius,
)

NORMALIZED_SLACK = 1e-5  # how far normalising and inverting may round an image out of [0, 1]


class CarefulAttack(Attack):
    """A torchattacks ``Attack`` whose every call is checked before any work, and leaves everything as it found it.

    Subclasses say what they do with images, labels and targets that can be used (`_attack`); what all attacks promise is
    kept here. Beyond torchattacks: images, labels, settings, and what the model answers are checked; callers may be under
    ``torch.no_grad()``; targets chosen at random belong to the image, whatever batch it is in; the model, the global random
    state, gradient mode and the attack's own normalisation are left as they were, even after an exception.

    Attributes:
        box: the values that inputs can take.
        mask: what may move, bool, of one input (...) or of each; ``None``: all.
    """

    needs_members = False
    seed: int
    box: Box
    mask: Tensor | None

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name, as_module(model))

    def _check(self) -> None:
        """Raise on a setting that cannot be run.

        It is called on construction and, as settings may be changed, at each call.
        """

    def _check_inputs(self, images: Tensor, labels: Tensor, **options: Any) -> None:
        """Raise on images in the box or labels that cannot be attacked."""
        slack = 0.0
        if self.normalization_used is not None and isinstance(images, Tensor) and images.is_floating_point():
            slack = max(NORMALIZED_SLACK, 8 * torch.finfo(images.dtype).eps)
        check_images(images, slack=slack, box=self.box)
        check_labels(labels, images)
        if len(images):
            if (eps := getattr(self, "eps", None)) is not None and (norm := getattr(self, "norm", None)) in NORMS:
                check_radius(eps, norm, images[0], self.box)
            check_mask(self.mask, images)
            check_dtype(self.model, images)

    def _num_classes(self, images: Tensor) -> int:
        """Return how many classes the model has, by what it answers on the first images.

        Raises:
            TypeError, ValueError: Where its answers are no scores.
        """
        shown = [self.model.target, self.model] if isinstance(self.model, Surrogate) else [self.model]
        with private_random_state(self._own_seed, self.model), uncounted(self.model):
            counts = [classes_of(model, self._as_taken(images[:2])) for model in shown]
        if counts[0] != counts[-1]:
            raise ValueError(
                f"the surrogate scores {counts[-1]} classes, the model {counts[0]}: pass a function (M, N, K) -> (N, K) "
                "that maps them, or attack with MORA or apgd-ce"
            )
        return counts[0]

    @property
    def _own_seed(self) -> int:
        return getattr(self, "seed", 0) or 0

    def _targets(self, images: Tensor, labels: Tensor, num_classes: int) -> Tensor | None:
        """Return the classes to reach, (N,); ``None``: the attack is not targeted."""
        if not self.targeted:
            return None
        aim = self.get_target_label(images.clone(), labels.clone())
        self._change_model_mode(None)  # torchattacks' target functions may end in model.train()
        check_labels(aim, images, "target labels")
        check_label_range(aim, num_classes, "target labels")
        return aim.to(images.device).long()

    def forward(self, images: Tensor, labels: Tensor, *args: Any, **options: Any) -> Tensor:
        """Attack images, and return adversarial ones.

        Args:
            images: (N, ...), such as (N, C, H, W), floating point in the box (normalised after ``set_normalization_used``).
            labels: (N,), integer class indices.
            args, options: what else the attack takes.

        Returns:
            Adversarial images, shaped and typed like ``images``, inside the ball and the box, on the attack's device.

        Raises:
            TypeError, ValueError: Where an argument or setting cannot be used, or the model answers no scores; nothing has
                been changed.
        """
        self._check_inputs(images, labels, *args, **options)
        device = images.device if self.device is None else self.device
        images, labels = (t.clone() if t.is_inference() else t for t in (images.detach(), labels.detach()))
        images, labels = images.to(device), labels.to(device).long()
        if self.normalization_used is not None:  # else it has been checked that they are inside
            images = self.box.inside(images)
        if not len(images):
            return images.clone()
        num_classes = self._num_classes(images)
        check_label_range(labels, num_classes)
        targets = self._targets(images, labels, num_classes)
        return self._attack(images, labels, targets, num_classes, *args, **options)

    def _attack(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, num_classes: int, *args: Any, **options: Any
    ) -> Tensor:
        """Return adversarial images, (N, ...), of images in the box that are left as they are.

        The classes to leave are the ``labels``, those to reach the ``targets``, if there are any; all on the images' device.
        """
        raise NotImplementedError

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

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return the model's scores (N, K) in eval mode, batch by batch."""
        batch_size = getattr(self, "batch_size", None) or max(len(inputs), 1)
        scores = super().get_output_with_eval_nograd
        return torch.cat([scores(part) for part in inputs.split(batch_size)])

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Aim at the wrong class of the ``kth_min``-th lowest score, 1 the lowest.

        Raises:
            TypeError, ValueError: Where ``kth_min`` is no whole number of at least 1.
        """
        check_count("kth_min", kth_min)
        super().set_mode_targeted_least_likely(kth_min, quiet)

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the wrong class of the ``kth_min``-th lowest score of each image, (N,).

        Raises:
            ValueError: Where ``kth_min`` is more than there are wrong classes.
        """
        num_classes = self._num_classes(inputs)
        if self._kth_min >= num_classes:
            raise ValueError(
                f"kth_min is {self._kth_min}, but the model scores {num_classes} classes, of which {num_classes - 1} are "
                f"wrong: use at most {num_classes - 1}"
            )
        return super().get_least_likely_label(inputs, labels)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return a wrong class for each image, (N,), uniformly at random, keyed by (seed, image)."""
        scores_NK = self.get_output_with_eval_nograd(inputs)
        labels = scores_NK.argmax(1) if labels is None else labels.to(scores_NK.device)
        num_classes = scores_NK.shape[1]
        shifts = [
            torch.randint(1, num_classes, (), generator=generator_for(key, self._own_seed, -1), device="cpu")
            for key in sample_keys(inputs, self.box)
        ]
        return (labels + torch.stack(shifts).to(labels)) % num_classes

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
            with guarded(self.model, seed=self._own_seed, evaluate=False):
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
