"""Provide what attacks are made of (`ensemble_attacks.attacks.base`)."""

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.attacks.careful import CarefulAttack

__all__ = ["CarefulAttack", "DescentAttack"]
