"""Turn units into a summary: what was found, and nothing that another run of the same would change."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.evaluation.ledger import SUMMARY, Ledger, Result
from ensemble_attacks.evaluation.units import CLEAN, Unit, by_cell, chains_of
from ensemble_attacks.files import write_whole
from ensemble_attacks.judge import Judgement, wilson_interval
from ensemble_attacks.version import __version__


def row_of(
    judgement: Judgement,
    stages: dict[str, tuple[Tensor, int, int]],
    forwards: int,
    backwards: int,
    outside: int = 0,
    failed: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return an attack's row of a summary; ``failed`` tells of parts that could not be run."""
    n = len(judgement.robust)
    row: dict[str, Any] = {**judgement.summary(), "forwards_per_image": forwards / n, "backwards_per_image": backwards / n}
    row |= {"outside": outside} if outside else {}
    row |= {"failed": failed} if failed else {}
    parts = {
        name: {"robust": int(robust.sum()), "forwards_per_image": ahead / n, "backwards_per_image": back / n}
        for name, (robust, ahead, back) in stages.items()
    }
    return row | ({"stages": parts} if parts else {})


def share_right(judgement: Judgement, before: Tensor) -> Tensor:
    """Return the share of right draws of every sample, (N,); as ``before`` where it is invalid, which is no success."""
    return torch.where(judgement.invalid, before, judgement.correct.double().mean(0))


def worst_case(right: Tensor) -> dict[str, Any]:
    """Return the row of the worst case, from every sample's share of right draws (N,) under its worst attack."""
    interval = wilson_interval(right.sum().item(), len(right))
    robust = int((right > 0.5).sum())
    return {"n": len(right), "robust": robust, "accuracy": right.mean().item(), "interval": list(interval)}


LIGHT = ("robust", "invalid", "correct", "right", "margin")  # tensors that a summary needs, not the images


def summarise(ledger: Ledger) -> dict[str, Any]:
    """Read all units, write ``summary.json``, and return it: what was found, and nothing that another run would change."""
    cells = []
    for cell, chains in by_cell(ledger.manifest):
        shown = {key: value for key, value in asdict(cell).items() if key not in ("code", "batch_size")}
        cells.append({**shown, **_summary_of(ledger, chains)})
    summary = {"version": __version__, "cells": cells}
    data = json.dumps(summary, indent=2).encode() + b"\n"
    path = ledger.folder / SUMMARY
    if not path.exists() or path.read_bytes() != data:
        write_whole(path, data)
    return summary


def _summary_of(ledger: Ledger, chains: list[list[Unit]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    missing: list[str] = []
    rights: list[Tensor] = []
    for units in zip(*chains, strict=True):
        results = [_light(ledger.read(unit)) for unit in units]
        missing += [unit.name for unit, result in zip(units, results, strict=True) if result is None]
        there = [result for result in results if result is not None]
        if len(there) == len(results):
            rows[units[0].attack] = _row(there, units[0].cell.cascade)
            rights.append(torch.cat([result.tensors["right"] for result in there]))
    clean = rows.pop(CLEAN, None)
    summary: dict[str, Any] = {"clean": clean, "attacks": rows}
    if rights:
        summary["worst_case"] = worst_case(torch.stack(rights).amin(0))
    return summary | ({"missing": missing} if missing else {})


def _light(result: Result | None) -> Result | None:
    if result is None:
        return None
    kept = {key: value.clone() for key, value in result.tensors.items() if key in LIGHT or key.startswith("stage ")}
    return Result(kept, result.info)


def _row(results: list[Result], cascade: bool) -> dict[str, Any]:
    joined = {key: torch.cat([r.tensors[key] for r in results], -1) for key in LIGHT}
    robust, invalid = joined["robust"].bool(), joined["invalid"].bool()
    forwards, backwards = (sum(result.info[kind] for result in results) for kind in ("forwards", "backwards"))
    outside = sum(result.info.get("outside", 0) for result in results)
    failed = {part: why for result in results for part, why in result.info.get("failed", {}).items()}
    if cascade:  # robust under this attack and all before it
        right = joined["right"]
        n = len(right)
        row = worst_case(right) | {"attacked": len(robust), "invalid": int(invalid.sum())}
        row |= {"outside": outside} if outside else {}
        row |= {"failed": failed} if failed else {}
        return row | {"forwards_per_image": forwards / n, "backwards_per_image": backwards / n}
    judgement = Judgement(robust, ~robust & ~invalid, invalid, joined["correct"].bool(), joined["margin"])
    stages: dict[str, tuple[Tensor, int, int]] = {}
    order = merged(list(result.info["stages"]) for result in results)
    for index, part in enumerate(order):
        last = [_until(result.info["stages"], order[: index + 1]) for result in results]
        flags = torch.cat([result.tensors[f"stage {at}"] for result, at in zip(results, last, strict=True)])
        ahead, back = (sum(r.info["stages"][at][k] for r, at in zip(results, last, strict=True)) for k in (0, 1))
        stages[part] = (flags.bool(), ahead, back)
    return row_of(judgement, stages, forwards, backwards, outside, failed)


def merged(lists: Iterable[list[str]]) -> list[str]:
    """Return every name once, each behind those that it is behind in its own list."""
    order: list[str] = []
    for names in lists:
        at = 0
        for name in names:
            if name not in order:
                order.insert(at, name)
            at = order.index(name) + 1
    return order


def _until(stages: dict[str, Any], parts: list[str]) -> str:
    """Return the last of these parts that was run, as a range may have skipped some; its first one if none of them was."""
    return next((part for part in reversed(parts) if part in stages), next(iter(stages)))


def seconds_of(ledger: Ledger) -> dict[str, float]:
    """Return the seconds that each attack took in each cell, over all ranges, by ``model vote eps seed attack``."""
    spent: dict[str, float] = {}
    for unit in (unit for chain in chains_of(ledger.manifest) for unit in chain):
        if (info := ledger.info(unit)) is not None:
            key = f"{unit.cell.key} {unit.attack}"
            spent[key] = spent.get(key, 0.0) + info["seconds"]
    return spent
