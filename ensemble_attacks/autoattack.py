"""Provide AutoAttack, with any attack in it (`ensemble_attacks.hosts.autoattack`)."""

from ensemble_attacks.hosts.autoattack import DRAWS, AutoAttack
from ensemble_attacks.hosts.choice import VERSIONS
from ensemble_attacks.hosts.flags import Flag
from ensemble_attacks.hosts.slots import SLOTS
from ensemble_attacks.hosts.state import State

__all__ = ["DRAWS", "SLOTS", "VERSIONS", "AutoAttack", "Flag", "State"]
