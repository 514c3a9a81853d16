"""Provide the conversion of other people's checkpoints (`defenses.zoo.convert`)."""

from defenses.zoo.convert import convert

__all__ = ["convert"]
