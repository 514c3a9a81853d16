"""Record what an examination finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ensemble_attacks.errors import out_of_memory, reason
from ensemble_attacks.models.structure import Structure

OK, FLAG, NOTE = "ok", "flag", "note"


@dataclass(frozen=True)
class Check:
    """A record of one finding.

    Attributes:
        name: the name of the check.
        figure, threshold: what was measured, and the value beyond which it is a flag.
        verdict: ``"flag"``, ``"ok"``, or ``"note"`` for what is only good to know.
        meaning: what the figure is, in words.
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
    """A record of all findings of a model.

    Attributes:
        structure: what the model shows of itself.
        checks: the findings.
        attacks: the attacks that the findings call for, cheapest first.
        passes: the forward and backward passes per image that the findings cost.
    """

    structure: Structure
    checks: list[Check] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)
    passes: float = 0.0

    @property
    def flags(self) -> list[str]:
        """Return the names of the checks that are flags."""
        return [check.name for check in self.checks if check.verdict == FLAG]

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis as a dictionary, for JSON."""
        return asdict(self)


def attempted(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Yield checks; where one raises, yield in its place, and that of those behind it, a flag that says why."""
    try:
        yield from checks
    except Exception as error:  # whatever the model raises on images that a check makes
        if out_of_memory(error):
            raise
        yield Check(name, FLAG, 0.0, None, f"it cannot be looked into: {reason(error)}")


def flag_if(found: bool, name: str, meaning: str, next_: str = "", source: str = "") -> Check:
    return Check(name, FLAG if found else OK, float(found), 0.0, meaning, next_ if found else "", source)


def measure(name: str, figure: float, threshold: float, meaning: str, next_: str = "", source: str = "") -> Check:
    """Return a check that is a flag where the figure is above the threshold (or not a number)."""
    return Check(name, OK if figure <= threshold else FLAG, figure, threshold, meaning, next_, source)


def measured(name: str, by_image: Tensor, threshold: float, meaning: str, next_: str, source: str) -> Check:
    """Return the check that `measure` makes of the mean over images; a note where it is not a number."""
    figure = by_image.double().mean().item()
    if math.isnan(figure):
        return Check(
            name, NOTE, 0.0, None, "the attack asks for no scores in the ball, so that this cannot be told", "", source
        )
    return measure(name, figure, threshold, meaning, next_, source)
