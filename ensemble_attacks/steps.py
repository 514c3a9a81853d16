"""Provide the step rules (`ensemble_attacks.descent.steps`)."""

from ensemble_attacks.descent.steps import CheckpointSteps, ConstantSteps, CosineSteps, DecayingSteps, StepRule

__all__ = ["CheckpointSteps", "ConstantSteps", "CosineSteps", "DecayingSteps", "StepRule"]
