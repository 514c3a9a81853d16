"""Provide AutoAttack, with any attack in it (`ensemble_attacks.hosts.autoattack`)."""

from ensemble_attacks.hosts.autoattack import DRAWS, SLOTS, VERSIONS, AutoAttack, Flag
from ensemble_attacks.hosts.state import State

__all__ = ["DRAWS", "SLOTS", "VERSIONS", "AutoAttack", "Flag", "State"]
