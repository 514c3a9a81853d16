"""Choose the attacks that a run of AutoAttack consists of, and leave out, with a flag, what cannot attack this model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torchattacks.attack import Attack

from ensemble_attacks.attacks.registry import find_attack
from ensemble_attacks.diagnostics import FEWEST_DIAGNOSED, diagnose
from ensemble_attacks.diagnostics.advice import adaptive_attacks
from ensemble_attacks.errors import out_of_memory, reason
from ensemble_attacks.hosts.flags import FEW_CLASSES, LEFT_OUT
from ensemble_attacks.hosts.original import STANDARD
from ensemble_attacks.hosts.slots import SLOTS
from ensemble_attacks.models.structure import Structure

Name: TypeAlias = str | Attack
ORIGINAL = ("standard", "plus", "rand")
VERSIONS = (*ORIGINAL, "ensemble", "adaptive", "auto", "custom")
LOOKING = ("adaptive", "auto")  # versions that look at the model before they choose
ENSEMBLE = ("mora-mt", *STANDARD)
DIAGNOSED = 64  # images that a diagnosis looks at


def choose(adversary: Any, structure: Structure, x: Tensor, y: Tensor) -> Sequence[Name]:
    """Return the attacks of an adversary's version for a model of this structure."""
    if adversary.version not in LOOKING:
        return adversary.attacks_to_run  # type: ignore[no-any-return]
    if adversary.version == "adaptive" or adversary.norm != "Linf" or len(x) < FEWEST_DIAGNOSED:
        return adaptive_attacks(structure)
    few = slice(DIAGNOSED)
    try:
        diagnosis = diagnose(adversary.model, x[few], y[few], eps=adversary.epsilon, seed=adversary.seed or 0)
    except Exception as error:  # whatever the model raises on images that a check makes
        if out_of_memory(error):
            raise
        adversary._flag(LEFT_OUT, len(x[few]), f"the diagnosis is left out: {reason(error)}")
        return adaptive_attacks(structure)
    adversary.diagnosis = diagnosis
    for check in diagnosis.checks:
        if check.verdict == "flag":
            next_ = f" -> {check.next}" if check.next else ""
            adversary._say(f"{check.name} ({check.figure:.2f}): {check.meaning}{next_}")
    adversary._say(f"so these are run: {', '.join(diagnosis.attacks)}")
    return diagnosis.attacks


def fitting(adversary: Any, names: Sequence[Name], structure: Structure, images: Tensor) -> dict[str, Name]:
    """Return those of the attacks that can attack images like these, by what they are called, and flag the others.

    Raises:
        TypeError, ValueError: Where an attack that the user named needs what the model does not have, or settings that it
            cannot take; where no attack is left.
    """
    chosen: dict[str, Name] = {}
    left: list[str] = []
    for name in names:
        if isinstance(name, str) and (why := _misfit(adversary, name, structure, images)):
            few = structure.classes < find_attack(name).fewest_classes
            adversary._flag(*(FEW_CLASSES, structure.classes) if few else (LEFT_OUT, 1), f"{name} is left out: {why}")
            left.append(f"{name}: {why}")
            continue
        called = name.attack if isinstance(name, Attack) else name
        twins = sum(other.partition("#")[0] == called for other in chosen)
        chosen[f"{called}#{twins + 1}" if twins else called] = name
    if not chosen:
        raise ValueError(f"no attack is left to run ({'; '.join(left)}): choose others in attacks_to_run")
    return chosen


def _misfit(adversary: Any, name: str, structure: Structure, images: Tensor) -> str:
    """Return why an attack cannot be run on images (N, ...); empty where it can."""
    record = find_attack(name)
    if why := record.misfit(structure.classes, adversary.norm, images.shape[1:]):
        return why
    if name in SLOTS:
        return ""
    try:
        record.check(adversary.model, name)
        adversary._make(name, len(images))
    except (TypeError, ValueError) as error:
        if adversary.version not in LOOKING:  # the user's choice, not ours
            raise
        return reason(error)
    return ""
