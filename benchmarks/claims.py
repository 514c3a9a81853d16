"""What is claimed and found, in the first table of the benchmarks' page, held against the records of its commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from benchmarks import crossmax, frontends, randomized, table1
from benchmarks.cells import Cell
from benchmarks.recorded import RESULTS, Table, rows_everywhere, run_of_table1

CELL = re.compile(r"`(?:table1\.py --cells |\.\.\.)(\w+):(\w+):([0-9.]+)`")


def of_verdicts(command: str) -> Iterator[float]:
    """Yield what the suite and the attacks say of 'Ensemble everything everywhere' on the suite's images."""
    for row in rows_everywhere("attacks"):
        yield from (value for column, value in row.items() if column.startswith("of the first"))


def models_in(command: str) -> list[str]:
    return re.findall(r"--model (\w+)", command)


def of_fronts(command: str) -> Iterator[float]:
    """Yield the figures of front ends, and the bounds of their intervals."""
    for model in models_in(command):
        for folder in (RESULTS / "frontends").glob(f"{model}_*/"):
            yield from (row[key] for row in frontends.rows_of(folder) for key in ("robust", "low", "high"))


def of_members(command: str) -> Iterator[float]:
    """Yield what MORA leaves of the mean probability of the ensembles that are named, on digits."""
    names = re.findall(r"`(\w+)`", command)
    names = [name if not name.startswith("_") else names[0].rpartition("_")[0] + name for name in names]
    for name in names:
        (path,) = (RESULTS / "members").glob(f"{name}_softmax_*/0_mora/summary.json")
        yield 100 * json.loads(path.read_text())["attacks"]["mora"]["accuracy"]


def of_drawn(command: str) -> Iterator[float]:
    """Yield the expected accuracies of randomized ensembles on CIFAR-10."""
    for path in (RESULTS / "randomized" / "cifar10").glob("*.json"):
        record = json.loads(path.read_text())
        yield randomized.row_of(record["ensemble"], record["attack"], record)["mean"]


def of_crossmax(command: str) -> Iterator[float]:
    yield from (row["robust"] for row in crossmax.rows_of(RESULTS / "crossmax" / "cifar10"))


def of_carried(command: str) -> Iterator[float]:
    """Yield which shares the other members' images fool."""
    for model in models_in(command):
        record = json.loads((RESULTS / "transfer" / f"{model}.summary.json").read_text())
        yield from (record["from others"], *record["from others to each"])


CLAIM_RECORDS: dict[str, Callable[[str], Iterator[float]]] = {  # by what their commands hold
    "frontends.py": of_fronts,
    "members.py": of_members,
    "randomized.py": of_drawn,
    "crossmax.py": of_crossmax,
    "transfer.py": of_carried,
    "multiresolution.py --model multiresolution_resnet18_1": of_verdicts,
}


CLAIMED = {  # the columns of a row that does not name them, by how many figures it has
    5: ["PGD", "CW", "AutoAttack", "MORA", "MORA-mt"],
    4: ["PGD", "CW", "MORA", "MORA-mt"],
}


def of_claims(table: Table, row: list[str]) -> list[str] | None:
    """Return a row of what is claimed and found, where its command left records; of Table 1, the claim names the columns."""
    named = CELL.search(row[4])
    if named is None:
        figures = {
            f"{figure:.1f}" for command, kept in CLAIM_RECORDS.items() if command in row[4] for figure in kept(row[4])
        }
        said = re.sub(r"\d+\.\d", lambda figure: figure[0] if figure[0] in figures else "?", row[2])
        return [*row[:2], said, *row[3:]] if figures else None
    model, vote, eps = named.groups()
    found = table1.row_of(Cell(model, vote, float(eps)), run_of_table1(), table1.ATTACKS)
    assert found is not None
    columns = re.findall(r"MORA-mt|\b(?:PGD|CW|AutoAttack|MORA)\b(?! here)", row[0].rpartition(":")[2].partition("(")[0])
    columns = columns or CLAIMED[len(row[2].split(","))]
    ours = ", ".join(f"{found[column]:.1f}" for column in columns)
    claim = re.sub(r"AutoAttack here: [0-9.]+", f"AutoAttack here: {found['AutoAttack']:.1f}", row[0])
    return [claim, row[1], ours, f"{found['n']}, 0", *row[4:]]
