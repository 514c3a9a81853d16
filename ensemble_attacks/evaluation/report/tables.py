"""Turn the comparison into rows, and rows into CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemble_attacks.evaluation.summary import called
from ensemble_attacks.evaluation.units import CLEAN

WORST = "worst of draws %"  # of a random model: the images that are right in every draw
COLUMNS = (
    *("model", "vote", "eps", "seed", "attack", "robust %", "low", "high", WORST, "invalid", "outside", "disagreement"),
    *("passes / image", "seconds"),
)
TOLD = ("invalid", "outside", "disagreement")


def title_of(manifest: dict[str, Any]) -> str:
    """Return what a run is called in its report and on its card."""
    sweep = manifest["sweep"]
    return f"{', '.join(sweep['models'])} on {sweep['n']} images of {sweep['dataset']}"


def table_rows(summary: dict[str, Any], seconds: dict[str, float]) -> list[tuple[Any, ...]]:
    """Return the comparison, with a row for each attack of each cell, in the order of `COLUMNS`."""
    rows: list[tuple[Any, ...]] = []
    for cell in summary["cells"]:
        start = tuple(cell[key] for key in ("model", "vote", "eps", "seed"))
        for name, row in {CLEAN: cell["clean"], **cell["attacks"], "worst case": cell.get("worst_case")}.items():
            if row is None:  # given up on all images
                continue
            low, high = row["interval"]
            passes = row.get("forwards_per_image", 0) + row.get("backwards_per_image", 0)
            spent = seconds.get(" ".join(map(str, (*start, name))), 0.0)
            figures = tuple(round(value, 1) for value in (100 * row["accuracy"], 100 * low, 100 * high))
            worst = round(100 * row["worst_of_draws"], 1) if "worst_of_draws" in row else ""
            cost = (round(passes, 1), round(spent, 1)) if name not in (CLEAN, "worst case") else ("", "")
            told = (row.get(kind, 0) for kind in TOLD)
            rows.append((*start, called(name, row, cell["n"]), *figures, worst, *told, *cost))
    return rows


def without_empty(rows: list[tuple[Any, ...]]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns of a table in which anything stands, and the rows of these."""
    told = [index for index in range(len(COLUMNS)) if any(row[index] != "" for row in rows)]
    return [COLUMNS[index] for index in told], [[row[index] for index in told] for row in rows]


def write_csv(path: Path, columns: Sequence[str], rows: list[tuple[Any, ...]]) -> None:
    """Write a table as CSV; text that a spreadsheet would take for a formula gets an apostrophe."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *([_no_formula(value) for value in row] for row in rows)])


def _no_formula(value: Any) -> Any:
    if isinstance(value, str) and (value.lstrip()[:1] in ("=", "+", "-", "@") or value[:1].isspace()):
        return f"'{value}"
    return value


def in_markdown(value: Any) -> Any:
    """Return a value so that its text stays text in a table of Markdown: no cell, link, tag or line begins in it."""
    if not isinstance(value, str):
        return value
    for character in "\\`*[]<>|":
        value = value.replace(character, f"\\{character}")
    return " ".join(value.split())
