"""Provide the loop that every attack runs, and what it is made of."""

from ensemble_attacks.descent.stages import CLOSEST, Stage, Trace
from ensemble_attacks.models.view import Outputs

__all__ = ["CLOSEST", "Outputs", "Stage", "Trace"]
