"""What an examination finds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ensemble_attacks.models.structure import Structure

OK, FLAG, NOTE = "ok", "flag", "note"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        figure, threshold: what was measured, and the value beyond which it is a flag.
        verdict: ``"flag"``, ``"ok"``, or ``"note"`` for what is only good to know.
        meaning: in words.
        next: the attack to run, by its name in the registry; empty if there is none to suggest.
        source: the paper.
    """

    name: str
    verdict: str
    figure: float
    threshold: float | None
    meaning: str
    next: str = ""
    source: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings of a model.

    Attributes:
        attacks: what the findings call for, cheapest first.
        passes: forward and backward passes per image that they cost.
    """

    structure: Structure
    checks: list[Check] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)
    passes: float = 0.0

    @property
    def flags(self) -> list[str]:
        """Names of the checks that are flags."""
        return [check.name for check in self.checks if check.verdict == FLAG]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def flag_if(found: bool, name: str, meaning: str, next_: str = "", source: str = "") -> Check:
    return Check(name, FLAG if found else OK, float(found), 0.0, meaning, next_ if found else "", source)


def measure(name: str, figure: float, threshold: float, meaning: str, next_: str = "", source: str = "") -> Check:
    """A flag where the figure is above the threshold (or not a number)."""
    return Check(name, OK if figure <= threshold else FLAG, figure, threshold, meaning, next_, source)


def measured(name: str, by_image: Tensor, threshold: float, meaning: str, next_: str, source: str) -> Check:
    """`_measure` of the mean over images; a note where it is not a number."""
    figure = by_image.double().mean().item()
    if math.isnan(figure):
        return Check(
            name, NOTE, 0.0, None, "the attack asks for no scores in the ball, so that this cannot be told", "", source
        )
    return measure(name, figure, threshold, meaning, next_, source)
