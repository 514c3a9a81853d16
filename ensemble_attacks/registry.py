"""Provide attacks by name (`ensemble_attacks.attacks.registry`)."""

from ensemble_attacks.attacks.foreign import craft
from ensemble_attacks.attacks.record import NamedAttack
from ensemble_attacks.attacks.registry import GROUP, find_attack, registered

__all__ = ["GROUP", "NamedAttack", "craft", "find_attack", "registered"]
