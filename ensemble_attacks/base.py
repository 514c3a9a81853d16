"""Provide what attacks are made of (`ensemble_attacks.attacks.base`)."""

from ensemble_attacks.attacks.base import CarefulAttack, DescentAttack

__all__ = ["CarefulAttack", "DescentAttack"]
