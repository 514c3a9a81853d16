"""Say what speaks against the result of a run of AutoAttack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ensemble_attacks.models.adopted import false_claims
from ensemble_attacks.models.ask import device_of
from ensemble_attacks.models.gradients import count_zero, scores_and_gradient
from ensemble_attacks.models.preserve import private_random_state
from ensemble_attacks.scores import are_probabilities, margin

SQUARE_HELPED = 0.002  # of the accuracy (the original's check_square_sr)
FAILED, FEW_CLASSES, LEFT_OUT = "failed", "few_classes", "left_out"
NON_FINITE, DISAGREEMENT = "non_finite", "disagreement"
INCOMPLETE = (FAILED, FEW_CLASSES, LEFT_OUT)  # flags of attacks that were asked for, and are not in the result


@dataclass(frozen=True)
class Flag:
    """A reason to read the result with care.

    Attributes:
        name: ``random``, ``probabilities``, ``zero_gradients``, ``square_helped``, ``outside_ball``, ``non_finite``,
            ``claim``, ``disagreement``, ``training_mode``; of an attack that did not run ``few_classes`` or ``left_out``,
            or, of one that raised, ``failed``.
        value: how much, or how many samples.
        message: what it means, and what to do.
    """

    name: str
    value: float
    message: str


def of_scores(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Iterator[Flag]:
    """Yield flags of scores that are probabilities, and of gradients of the margin that are exactly zero."""
    with private_random_state(seed, model):
        scores_NK, gradient = scores_and_gradient(model, x, lambda scores_NK: margin(scores_NK, y).sum())
    if are_probabilities(scores_NK):
        yield Flag("probabilities", len(x), "the scores are probabilities: return logits, lest gradients vanish")
    if vanished := count_zero(gradient, x):
        message = "of so many images the gradient is zero: attack a surrogate (BPDAIdentity, CrossMaxTransfer)"
        yield Flag("zero_gradients", vanished, message)


def of_claim(model: nn.Module, x: Tensor, batch_size: int, which: str) -> Iterator[Flag]:
    """Yield a flag of images on which an adopted ensemble predicts otherwise than its claimed members and vote."""
    if count := false_claims(model, x, batch_size, device_of(model, x.device)):
        message = f"of so many {which} the claimed members and vote predict another class: attacks on them are misled"
        yield Flag("claim", count, message)


def of_disagreement(count: int) -> Iterator[Flag]:
    """Yield a flag of images that an attack saw fool a model which is right when it is judged."""
    if count:
        message = (
            "of so many images that are robust when judged, the model says otherwise to the attack, with a gradient, or one "
            "by one: its robust accuracy is not to be believed"
        )
        yield Flag(DISAGREEMENT, count, message)


def of_stages(stages: dict[str, Tensor]) -> Iterator[Flag]:
    """Yield a flag where Square, which needs no gradient, found what the attacks before it had not."""
    order = list(stages)
    if "square" not in order[1:]:
        return
    before, after = stages[order[order.index("square") - 1]], stages["square"]
    helped = (before.sum() - after.sum()).item() / len(after)
    if helped > SQUARE_HELPED:
        message = "Square, which needs no gradient, lowered the accuracy: the gradients mislead, attack adaptively"
        yield Flag("square_helped", helped, message)
