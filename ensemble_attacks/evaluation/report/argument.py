"""Say what a run comes to: in one sentence for each cell, with what speaks against believing it."""

from __future__ import annotations

from typing import Any

from ensemble_attacks.diagnostics import Diagnosis
from ensemble_attacks.diagnostics.findings import FLAG
from ensemble_attacks.diagnostics.meanings import meaning_of, sources_of
from ensemble_attacks.evaluation.summary import called
from ensemble_attacks.names import split_options

STANDARD = {"autoattack": "AutoAttack's standard suite", "autoattack-rand": "AutoAttack's suite for random models"}
NOT_LOOKED_INTO = "whether the gradient is masked was not looked into"


def standard_of(cell: dict[str, Any]) -> str | None:
    """Return the attack of a cell that is a standard suite by itself, on all images; ``None`` where there is none."""
    for index, (name, row) in enumerate(cell["attacks"].items()):
        alone = not (cell["cascade"] and index)
        if split_options(name)[0] in STANDARD and alone and row["n"] == cell["n"] and not row.get("failed"):
            return name
    return None


def strongest_of(cell: dict[str, Any]) -> str | None:
    """Return the attack of a cell that leaves the lowest accuracy, the first of several; ``None`` where there is none."""
    return min(cell["attacks"], key=lambda name: cell["attacks"][name]["accuracy"], default=None)


def verdict(cell: dict[str, Any], diagnosis: Diagnosis | None) -> str:
    """Return what is to be said of a cell, as a sentence."""
    worst, standard, strongest = cell.get("worst_case"), standard_of(cell), strongest_of(cell)
    if worst is None or strongest is None:
        return "Nothing was found: all attacks were given up."
    low, high = (f"{100 * bound:.1f}" for bound in worst["interval"])
    share = f"the worst case is {100 * worst['accuracy']:.1f}% (95% interval {low} to {high}, {worst['n']} images)"
    if standard is not None:
        suite = STANDARD[split_options(standard)[0]]
        found = f"{suite} says {100 * cell['attacks'][standard]['accuracy']:.1f}%, {share}"
    else:
        found = f"T{share[1:]}; no standard suite was run beside"
    alone = cell["attacks"][strongest]
    by = called(strongest, alone, cell["n"])
    found += f"; the strongest attack, {by}, leaves {100 * alone['accuracy']:.1f}%" if len(cell["attacks"]) > 1 else ""
    disagreeing = max(row.get("disagreement", 0) for row in cell["attacks"].values())
    if disagreeing:
        found += f"; the model told the judge otherwise than the attack on {disagreeing} images"
    if diagnosis is None:
        return f"{found}; {NOT_LOOKED_INTO}."
    return f"{found}; flags: {', '.join(diagnosis.flags)}." if diagnosis.flags else f"{found}; no check is a flag."


def flags_of(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Return the flags of a diagnosis, with what they mean, what to do, and pieces of their sources with addresses."""
    found = []
    for check in diagnosis.checks:
        if check.verdict == FLAG:
            meaning = meaning_of(check.name)
            means = {"seen": meaning.seen, "remedy": meaning.remedy} if meaning else {"seen": "", "remedy": ""}
            found.append({"check": check, **means, "sources": list(sources_of(check))})
    return found
