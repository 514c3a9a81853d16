"""Run the checks, by what they look at: structure, gradients, and how attacks behave.

Sources: [C19] Carlini et al., "On Evaluating Adversarial Robustness", arXiv:1902.06705. [A18] Athalye et al., "Obfuscated
Gradients Give a False Sense of Security", ICML 2018. [P22] Pintor et al., "Indicators of Attack Failure", NeurIPS 2022, I1
to I6. [Z22] Zimmermann et al., "Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022. [CH20] Croce &
Hein, AutoAttack, ICML 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.data import as_tensors
from ensemble_attacks.diagnostics.advice import attacks_for
from ensemble_attacks.diagnostics.examination import ALONE, FEWEST_DIAGNOSED, Examination
from ensemble_attacks.diagnostics.findings import FLAG, Diagnosis, attempted
from ensemble_attacks.diagnostics.of_attacks import of_attacks, of_one_attack
from ensemble_attacks.diagnostics.of_gradients import of_gradients
from ensemble_attacks.diagnostics.of_structure import of_structure
from ensemble_attacks.models.ask import as_module, beside, check_dtype
from ensemble_attacks.models.boxed import seen_from_unit_box, share_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.preserve import in_training
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.validation import (
    check_count,
    check_eps,
    check_images,
    check_label_range,
    check_labels,
    check_radius,
    check_seed,
)


def diagnose(
    model: nn.Module,
    x: Any,
    y: Tensor | None = None,
    *,
    eps: float | Tensor,
    seed: int = 0,
    attack: Callable[[nn.Module, float], Attack] | None = None,
    box: Box = UNIT,
    alone: int = ALONE,
    on_pass: Callable[[int], object] | None = None,
) -> Diagnosis:
    """Look for reasons not to believe a robust accuracy in Linf.

    Args:
        model: images in the box -> scores (N, K).
        x, y: some images (N, ...), such as (N, C, H, W), and their classes (N,), 64 are enough; or, without ``y``, a
            ``Dataset`` or ``DataLoader``.
        eps: radius of the ball, in the units of the images, or of each feature, the same share of the box's width.
        seed: the seed of all randomness.
        attack: makes the attack whose failures are looked into, as in `indicators`. (Default: PGD, 50 steps; EOTAPGD for a
            random model)
        box: the values that images can take. What is looked at in another than [0, 1] is the model as seen from there, and
            so is what ``attack`` gets.
        alone: the number of images on which the attack is looked into one by one, which takes the most time.
        on_pass: called with the number of images of each forward and backward pass, to show how far it is.

    Returns:
        The checks, and the attacks that they call for.

    Raises:
        TypeError, ValueError: Where arguments are unusable.
    """
    model, (x, y) = as_module(model), as_tensors(x, y)
    check_images(x, "x", box=box)
    check_labels(y, x, "y")
    check_eps(eps)
    check_seed(seed)
    if len(x):
        check_radius(eps, "Linf", x[0], box)
    check_count("the number of images", len(x), at_least=FEWEST_DIAGNOSED)
    check_count("alone", alone)
    if box != UNIT or isinstance(eps, Tensor):
        eps = share_of(eps, box, "the checks")
        model, x = seen_from_unit_box(model, x, box)
    was_training = in_training(model)
    with guarded(model, seed=seed):
        x, y = beside(model, x.detach().clone()), beside(model, y.clone()).long()
        check_dtype(model, x, "x")
        examined = Examination(model, x, y, eps, seed, attack, alone, on_pass)
        check_label_range(y, examined.structure.classes, "y")
        checks = [*attempted("structure", of_structure(examined, was_training))]
        checks += attempted("gradients", of_gradients(examined))
        checks += attempted("attacks", of_attacks(examined))
        checks += attempted("attack", of_one_attack(examined))
    attacks = attacks_for(examined.structure, [check for check in checks if check.verdict == FLAG])
    return Diagnosis(examined.structure, checks, attacks, examined.passes())
