"""Turn units into a summary: what was found, and nothing that another run of the same would change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.errors import LedgerError
from ensemble_attacks.evaluation.ledger import ATTEMPTS, SUMMARY, Ledger, Result
from ensemble_attacks.evaluation.units import CLEAN, Unit, by_cell, canonical, cells_of, chain_of, count_chains
from ensemble_attacks.files import is_file, read_whole, write_whole
from ensemble_attacks.judge import Judgement, wilson_interval

# counts of images that left the ball; that the attack, and not the judge, saw fooled; at which attacks see no gradient
TOLD = ("outside", "disagreement", "zero_gradients")


def row_of(
    judgement: Judgement,
    stages: dict[str, tuple[Tensor, int, int]],
    forwards: int,
    backwards: int,
    told: dict[str, Any],
) -> dict[str, Any]:
    """Return an attack's row of a summary; ``told`` is what a reader has to know beside (`told_of`)."""
    n = len(judgement.robust)
    row = judgement.summary() | {"forwards_per_image": forwards / n, "backwards_per_image": backwards / n} | told
    parts = {
        name: {"robust": int(robust.sum()), "forwards_per_image": ahead / n, "backwards_per_image": back / n}
        for name, (robust, ahead, back) in stages.items()
    }
    return row | ({"stages": parts} if parts else {})


def told_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a reader has to know beside an attack's verdicts, where there is any, from the numbers of its ranges.

    It has the counts of `TOLD`, and ``failed``: by part of a suite that could not be run, why.
    """
    counts = {kind: sum(part.get(kind, 0) for part in parts) for kind in TOLD}
    failed = {name: why for part in parts for name, why in part.get("failed", {}).items()}
    return {kind: count for kind, count in counts.items() if count} | ({"failed": failed} if failed else {})


@dataclass(frozen=True, eq=False)
class Standing:
    """A record of how N samples stand after some attacks, the clean images being the first.

    Attributes:
        right: (N,), float64: the share of right draws under the worst of them; 0 where its scores decided nothing, so that
            no worst case lies above a single attack.
        fooled, invalid: (N,) bool: whether any of them fooled it; whether the scores of any version decided nothing.
    """

    right: Tensor
    fooled: Tensor
    invalid: Tensor

    @classmethod
    def of(cls, n: int) -> Standing:
        """Return the standing of ``n`` samples before all."""
        return cls(torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool))

    def after(self, rows: Tensor, judgement: Judgement) -> Standing:
        """Return the standing after one more attack, which took the samples of ``rows``."""
        right, fooled, invalid = self.right.clone(), self.fooled.clone(), self.invalid.clone()
        right[rows] = right[rows].minimum(judgement.correct.double().mean(0))
        fooled[rows] |= judgement.fooled
        invalid[rows] |= judgement.invalid
        return Standing(right, fooled, invalid)

    @classmethod
    def joined(cls, parts: Sequence[Standing]) -> Standing:
        """Return the standing of the samples of several ranges."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("right", "fooled", "invalid")))

    @property
    def left(self) -> Tensor:
        """Return the samples that a cascade goes on with: none has fooled them; invalid is no success."""
        return torch.nonzero(~self.fooled).squeeze(-1)


def worst_case(standing: Standing) -> dict[str, Any]:
    """Return the row of the worst case; ``invalid`` are the samples that nothing fooled, but whose scores are unsound."""
    return share_row(standing.right) | {"invalid": int((standing.invalid & ~standing.fooled).sum())}


def share_row(right: Tensor) -> dict[str, Any]:
    """Return a row of every sample's share of right draws, (N,)."""
    interval = wilson_interval(right.sum().item(), len(right))
    robust = int((right > 0.5).sum())
    return {"n": len(right), "robust": robust, "accuracy": right.mean().item(), "interval": list(interval)}


LIGHT = ("rows", "robust", "invalid", "correct", "right", "margin")  # tensors that a summary needs, not the images
NOT_SHOWN = ("code", "made", "origin", "batch_size")  # of a cell, in a summary
VOLATILE = ("seconds", "finished")  # numbers of a unit that the same run again would change
Read = Callable[[Unit], Result | None]


def summarise(ledger: Ledger) -> dict[str, Any]:
    """Read all units, write ``summary.json``, and return it: what was found, and nothing that another run would change."""
    summary = summary_of(ledger.manifest, ledger.read)
    data = summary_bytes(summary)
    path = ledger.folder / SUMMARY
    if not is_file(path) or path.stat().st_size != len(data) or read_whole(path) != data:
        write_whole(path, data)
    return summary


def summary_bytes(summary: dict[str, Any]) -> bytes:
    return json.dumps(summary, indent=2).encode() + b"\n"


def summary_of(manifest: dict[str, Any], read: Read) -> dict[str, Any]:
    """Return the summary of a run whose units are ``read`` one by one; nothing is written."""
    cells = []
    for cell, chains in by_cell(manifest):
        shown = {key: value for key, value in cell.listed.items() if key not in NOT_SHOWN}
        cells.append({**shown, **_summary_of(read, chains)})
    return {"version": manifest["code"].partition("+")[0], "cells": cells}


def _summary_of(read: Read, chains: list[list[Unit]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    missing: list[str] = []
    standings: dict[int, Standing] = {}  # of the ranges of which anything is there
    for units in zip(*chains, strict=True):
        results = [_light(read(unit)) for unit in units]
        missing += [unit.name for unit, result in zip(units, results, strict=True) if result is None]
        there = {index: result for index, result in enumerate(results) if result is not None}
        if there:
            rows[units[0].attack] = _row(list(there.values()), units[0].cell.cascade)
        for index, result in there.items():
            start, stop = units[index].range
            standing = standings.get(index, Standing.of(stop - start))
            standings[index] = standing.after(result.tensors["rows"], verdict_of(result))
    summary: dict[str, Any] = {"clean": rows.pop(CLEAN, None), "attacks": rows}
    if standings:
        summary["worst_case"] = worst_case(Standing.joined([standings[index] for index in sorted(standings)]))
    return summary | ({"missing": missing} if missing else {})


def finished(ledger: Ledger) -> dict[str, Any]:
    """Return the summary of a run in which nothing is left to do; what was given up is ``missing`` in it (`lacking`).

    Raises:
        LedgerError: Where there is, or nothing was found at all; the message says what is missing.
    """
    summary = summary_of(ledger.manifest, ledger.read)
    missing = {name for cell in summary["cells"] for name in cell.get("missing", [])}
    for index in range(count_chains(ledger.manifest)) if missing else ():
        for unit in chain_of(ledger.manifest, index):
            if unit.name not in missing:
                continue
            if ledger.failures(unit) < ATTEMPTS:
                raise LedgerError(f"{ledger.folder} is not finished: {unit.name} is missing, run it again")
            if unit.cell.cascade:
                break  # what follows depends on it
    if not any("worst_case" in cell for cell in summary["cells"]):
        raise LedgerError(f"{ledger.folder} holds nothing: all was given up, run it again (ensemble-attacks resume)")
    return summary


def lacking(manifest: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """Return a line for each attack of each cell that is not there on all images: on how many it is."""
    lines = []
    for cell, shown in zip(cells_of(manifest), summary["cells"], strict=True):
        rows = {CLEAN: shown["clean"], **shown["attacks"]}
        for name in (CLEAN, *manifest["sweep"]["attacks"]) if shown.get("missing") else ():
            if (n := (rows.get(name) or {"n": 0})["n"]) < cell.n:
                lines.append(f"{cell.title}: {name} is there on {n} of {cell.n} images, it failed on the others")
    return lines


def called(name: str, row: dict[str, Any], n: int) -> str:
    """Return an attack's name for a table of ``n`` images, with what is lacking: parts of a suite, or images."""
    parts = f" (without {', '.join(row['failed'])})" if row.get("failed") else ""
    return name + parts + (f" (on {row['n']} of {n} images)" if row["n"] < n else "")


def verdict_of(result: Result) -> Judgement:
    """Return the judge's verdict that a unit holds."""
    robust, invalid = (result.tensors[key].bool() for key in ("robust", "invalid"))
    return Judgement(robust, ~robust & ~invalid, invalid, result.tensors["correct"].bool(), result.tensors["margin"])


def run_digest(ledger: Ledger) -> str:
    """Return a hash of all that a run stands on and found, which the same run again has, too, and a paper can quote.

    It is over the manifest, apart from where things lie, and every unit's images, verdicts and numbers, apart from its
    times; what is missing counts as missing.
    """
    state = sha256(canonical(ledger.manifest | {"places": None}))
    for index in range(count_chains(ledger.manifest)):
        for unit in chain_of(ledger.manifest, index):
            info = ledger.info(unit)
            lasting = info and {key: value for key, value in info.items() if key not in VOLATILE}
            state.update(canonical([unit.identity, lasting]))
    return state.hexdigest()[:32]


def _light(result: Result | None) -> Result | None:
    if result is None:
        return None
    kept = {key: value.clone() for key, value in result.tensors.items() if key in LIGHT or key.startswith("stage ")}
    return Result(kept, result.info)


def _row(results: list[Result], cascade: bool) -> dict[str, Any]:
    joined = {key: torch.cat([r.tensors[key] for r in results], -1) for key in LIGHT}
    forwards, backwards = (sum(result.info[kind] for result in results) for kind in ("forwards", "backwards"))
    told = told_of([result.info for result in results])
    judgement = verdict_of(Result(joined, {}))
    if cascade:  # robust under this attack and all before it
        right = joined["right"]
        n = len(right)
        row = share_row(right) | {"attacked": len(judgement.robust), "invalid": int(judgement.invalid.sum())} | told
        return row | {"forwards_per_image": forwards / n, "backwards_per_image": backwards / n}
    stages: dict[str, tuple[Tensor, int, int]] = {}
    order = merged(list(result.info["stages"]) for result in results)
    for index, part in enumerate(order):
        last = [_until(result.info["stages"], order[: index + 1]) for result in results]
        flags = torch.cat([result.tensors[f"stage {at}"] for result, at in zip(results, last, strict=True)])
        ahead, back = (sum(r.info["stages"][at][k] for r, at in zip(results, last, strict=True)) for k in (0, 1))
        stages[part] = (flags.bool(), ahead, back)
    return row_of(judgement, stages, forwards, backwards, told)


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
    for index in range(count_chains(ledger.manifest)):
        for unit in chain_of(ledger.manifest, index):
            if (info := ledger.info(unit)) is not None:
                key = f"{unit.cell.key} {unit.attack}"
                spent[key] = spent.get(key, 0.0) + info["seconds"]
    return spent
