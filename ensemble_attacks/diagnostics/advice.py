"""Choose the attacks that a model asks for, from its structure and from what a diagnosis flags."""

from __future__ import annotations

from ensemble_attacks.attacks.registry import RECORDS
from ensemble_attacks.diagnostics.findings import Check
from ensemble_attacks.models.structure import Structure


def adaptive_attacks(structure: Structure) -> list[str]:
    """Return the attacks that a structure asks for, cheapest first, by the names of the registry and of AutoAttack."""
    names = []
    if structure.frontend:
        names += ["bpda"]
    if structure.members:
        names += ["bpda-mora"] if structure.frontend else []
        names += ["expected-apgd", "mora", "lca"] if structure.known_draws else ["mora"]
    if structure.own_aggregation:
        names += ["crossmax-transfer"]
    if structure.random:
        return [*names, "eot-apgd"]
    targeted = ["apgd-t"] if structure.classes > 3 else []
    return [*names, "apgd-ce", *targeted, "fab-t", "square"]


def attacks_for(structure: Structure, flags: list[Check]) -> list[str]:
    """Return the adaptive suite that a structure and its flags call for, cheapest first."""
    asked = {flag.next for flag in flags if flag.next}
    asked |= {"square" for flag in flags if flag.name == "zero_gradients"}  # what passes one part by may meet another
    chosen = (set(adaptive_attacks(structure)) - {"fab-t", "square"}) | asked
    return [name for name, record in RECORDS.items() if name in chosen and (structure.members or not record.needs_members)]
