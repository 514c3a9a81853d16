"""The rows of printed tables, computed anew from the records that ship: a function for each table (`printed`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import ablation, members, multiresolution, purified, radii, reach, table1, votes
from benchmarks.cells import Cell, Run
from benchmarks.tables import shown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE1 = RESULTS / "table1"
IMAGENET = RESULTS / "imagenet" / "record.json"
ABLATION = RESULTS / "ablation" / "digits"
WAITS = RESULTS / "waits"
CARDS = ROOT / "defenses" / "weights"
HALF = 0.05 + 1e-6  # of the last digit that is printed


@dataclass(frozen=True)
class Table:
    """A table of a page: its head, and its rows by cells."""

    page: str
    head: tuple[str, ...]
    rows: list[list[str]]


def run_of_table1() -> Run:
    """Return the run whose records ship; its number of images is that of the table that it made."""
    n = max(row["n"] for row in json.loads((TABLE1 / "table1.json").read_text()))
    return Run(out=TABLE1, n=n, seed=0, data_dir="")


def cell_named(defense: str, vote: str) -> Cell:
    """Return the cell of three ResNet-20 of a defense, at the paper's radius."""
    return Cell(f"{defense}_resnet20_3", vote, 0.03 if defense.endswith("_at") else 0.01)


COLUMNS = {"PGD-500": "PGD", "CW-500": "CW", "MORA-500": "MORA"}  # where the page calls a column otherwise


def of_table1(table: Table, row: list[str]) -> list[str]:
    """Return a row of the page's Table 1, from the records."""
    found = table1.row_of(cell_named(row[0].strip("`"), row[1]), run_of_table1(), table1.ATTACKS)
    assert found is not None
    said, passes = [*row[:3], f"{found['clean']:.1f}"], False
    for name in table.head[4:]:
        passes = passes or name.startswith("passes / image: ")
        column = COLUMNS.get(name := name.removeprefix("passes / image: "), name)
        value = found.get(f"{column} passes" if passes else column)
        said.append("" if value is None else f"{value:,.0f}" if passes else f"{value:.1f}")
    return said


def of_reach(table: Table, row: list[str]) -> list[str]:
    """Return a row of the page's table of passes, from the records."""
    found = reach.row_of(cell_named(row[0].strip("`"), row[1]), run_of_table1())
    assert found is not None
    said, peer = row[:2], ""
    for name in table.head[2:]:
        if name.endswith(" leaves"):
            peer = name.removesuffix(" leaves")
        key, form = {"in passes": (f"{peer}'s passes", ",.0f"), "MORA as few in": (f"MORA's to {peer}'s", ".1f")}.get(
            name, (peer, ".1f")
        )
        value = found[f"of {peer}'s" + name.removeprefix("share")] if name.startswith("share") else found[key]
        said.append("" if value is None else value if isinstance(value, str) else f"{value:{form}}")
    return said


PAIRED = {"soft-APGD": "soft-apgd", "votes-PGD": "votes-pgd", "votes-APGD": "votes-apgd"}


def of_pairs(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of MORA-mt beside soft votes, judged on the hard vote of twice as many images."""
    cell, run = cell_named(row[0].strip("`"), "voting"), replace(run_of_table1(), n=500)
    (pair,) = [of for of in table1.pairs_of(cell, run, (table1.OURS, PAIRED[row[1]])) if of["n"] == run.n]
    reached = reach.row_of(cell, run)
    assert reached is not None
    left = (reached[row[1]], reached[row[1]] - 100 * (pair["robust to it alone"] - pair["robust to MORA-mt alone"]) / run.n)
    passes = (reached[f"{row[1]}'s passes"], reached[f"MORA's to {row[1]}'s"])
    return [*row[:2], *(f"{share:.1f}" for share in left), pair["lead"], pair["p"], *(f"{spent:.1f}" for spent in passes)]


def rounded(values: list[float], printed: str) -> str:
    """Return a card's figures, of two decimals, with one, as they are printed with what follows; a half goes either way."""
    figures, between, rest = printed.partition(" (")
    said = figures.split(" / ")
    if len(said) != len(values):
        return " / ".join(f"{value:.1f}" for value in values) + between + rest
    near = [text if abs(float(text) - value) < HALF else f"{value:.1f}" for text, value in zip(said, values, strict=True)]
    return " / ".join(near) + between + rest


def of_cards(table: Table, row: list[str]) -> list[str]:
    """Return the clean accuracies of a model, from its card."""
    accuracy = json.loads((CARDS / row[0] / "Linf" / f"{row[1].strip('`')}.json").read_text())["clean_accuracy"]
    votes = [name for name in ("softmax", "voting", "logits", "crossmax") if name in accuracy]
    whole = [accuracy[vote] for vote in votes]
    return [*row[:2], rounded(accuracy["members"], row[2]), rounded(whole, row[3]), *row[4:]]


VOTES = {"hard votes": "voting", "mean probability": "softmax", "mean logits": "logits"}
ATTACKS = {"APGD-CE": "apgd-ce?steps=5", "MORA": "mora", "MORA-mt": "mora-mt?steps=5&betas=0.5&targets=1"}


def of_imagenet(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of ImageNet, from its record; a vote stands in the first of its rows."""
    above = table.rows[: 1 + next(number for number, other in enumerate(table.rows) if other is row)]
    vote = VOTES[[cells[0] for cells in above if cells[0]][-1]]
    (found,) = [
        cell["found"]
        for cell in json.loads(IMAGENET.read_text())
        if (cell["vote"], f"{cell['eps x 255']:g}") == (vote, row[1])
    ]
    figures = [found[ATTACKS[name]] for name in table.head[2:]]
    return row[:2] + [f"{100 * sum(of['robust']) / len(of['robust']):.1f} ({of['passes']:.1f})" for of in figures]


def of_ablation(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of MORA's parts, from the records: its lead over a variant, by vote, and McNemar's p."""
    said = row[:1]
    for vote in ("voting", "softmax"):
        (found,) = [of for of in pooled_parts() if (of["variant"], of["vote"]) == (row[0], vote)]
        said += [found["MORA's lead"], "<0.001" if found["p"] == "0.000" else found["p"]]
    return said


@cache
def pooled_parts() -> list[dict[str, Any]]:
    cells = [(model, vote) for model in ablation.MODELS.split(",") for vote in ("voting", "softmax")]
    return ablation.pooled(ablation.rows_of(ABLATION, cells, list({**ablation.DECOMPOSITION, **ablation.VARIANTS})))


def of_votes(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of attacks on one vote that the hard vote judges, from the records of all seeds."""
    model, attack = (name.strip("`") for name in row[:2])
    stored = [json.loads(path.read_text()) for path in (RESULTS / "votes" / "digits").glob(f"{model}_{attack}_*.json")]
    records = {votes.Key(model, attack, record["vote"], record["seed"]): record for record in stored}
    (found,) = [of for of in votes.transfers(records) if of["judged on"] == "voting"]
    (fooled,) = [of for of in votes.members_fooled(records) if of["on"] == "voting"]
    said = [f"{found[f'on {vote}']:.1f} ({found[f'sd, {vote}']:.1f})" for vote in ("softmax", "voting", "logits")]
    counts = " / ".join(f"{fooled[f'{count} fooled']:.1f}" for count in range(4))
    return [*row[:2], *said, f"{found['own - best other']:.1f}", counts, f"{fooled['passes']:,.0f}"]


def of_radii(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of attacks over radii, from the records."""
    model, vote, eps, attacks = row[0].strip("`"), row[1], float(row[2]), table.head[3:7]
    stem = RESULTS / "radii" / "digits" / f"{model}_{vote}_{eps:g}"
    found = radii.row_of((model, vote, eps), {name: json.loads(Path(f"{stem}_{name}.json").read_text()) for name in attacks})
    shares = [f"{found[attack]:.1f}" for attack in attacks]
    return [*row[:3], *shares, found["lead"], found["p"], f"{found['mora passes']:,.0f}"]


def of_truth(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of gaps to the exact robust accuracy: the largest over the cells where it is known."""
    attack, votes = row[0].strip("`"), ("drawn",) if "drawn" in row[1] else ("logits", "voting")
    cells = [
        found
        for found in json.loads((RESULTS / "truth" / "truth.json").read_text())
        if found["attack"] == attack and found["vote"] in votes
    ]
    early = [float(cell["gap at 1/20"]) for cell in cells if cell["gap at 1/20"]]
    figures = [f"{max(float(cell['gap']) for cell in cells):.1f}", f"{max(early):.1f}" if early else ""]
    return [row[0], row[1], str(len(cells)), *figures, f"{fmean(cell['passes'] for cell in cells):,.0f}"]


def of_waits(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of waits, from its records, before the loop knew of devices and after."""
    after, before = (
        next((found for found in json.loads((WAITS / name).read_text()) if f"`{found['attack']}`" == row[0]), None)
        for name in ("after.json", "before.json")
    )
    assert after is not None
    said = [row[0], f"{after['steps']:,}", str(after["waits"]), f"{after['waits'] / after['steps']:.2f}"]
    return [*said, "" if before is None else f"{before['waits'] / before['steps']:.1f}"]


SIZES = (3, 5, 8)  # members, in the table of them
MAPPED = ("apgd-ce", "apgd-t", "fab-t", "square", "bpda", "zero-order-pgd")  # attacks, in the map of front ends


def member_cell(model: str, vote: str, shard: int, dataset: str) -> dict[str, Any]:
    """Return the row of an ensemble in `members`' table, from its records, in one shard of so many images."""
    defense = model.rsplit("_", 2)[0]
    cell = Cell(model, vote, members.SIZES[dataset][defense in members.TRAINED])
    run = Run(out=RESULTS / "members", n=shard, seed=0, data_dir="", dataset=dataset, shard=shard)
    found = table1.row_of(cell, run, members.ATTACKS, members.COLUMNS)
    assert found is not None
    return found


def of_sizes(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of three, five and eight members on digits, or as many as there are, from the records."""
    names = [f"{row[0].strip('`')}_convnet_{size}" for size in SIZES]
    there = [name for name in names if (CARDS / "digits" / "Linf" / f"{name}.json").exists()]
    found = [member_cell(name, row[1], members.OF_DIGITS, "digits") for name in there]
    columns = ("clean", *table.head[3:])
    return row[:2] + [" / ".join(f"{each[column]:.1f}" for each in found) for column in columns]


def of_larger(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of larger and mixed ensembles on CIFAR-10, from the records."""
    found = member_cell(row[0].strip("`"), row[1], members.SHARD, "cifar10")
    return [*row[:2], f"{found['eps']:g}", *(f"{found[column]:.1f}" for column in table.head[3:])]


def of_transfer(table: Table, row: list[str]) -> list[str]:
    """Return a row of a table of transfers, from its record."""
    found = json.loads((RESULTS / "transfer" / f"{row[0].strip('`')}.summary.json").read_text())
    shares = [f"{found[key]:.1f}" for key in ("own", "transfer", "from others")]
    return [row[0], *shares, f"{found['cosine']:.2f}"]


def of_purified(table: Table, row: list[str]) -> list[str]:
    """Return a row of the table of a purifier, from its record."""
    name = purified.record_name("purified_convnet_1", row[0], int(row[1]))
    found = purified.row_of(json.loads((RESULTS / "purified" / name).read_text()))
    shares = [f"{found[column]:.1f}" for column in ("mean", f"right in all of {purified.WORST_OF}")]
    return [*row[:2], *shares, f"{found['passes']:,.0f}"]


def of_masks(table: Table, row: list[str]) -> list[str]:
    """Return a row of the map of front ends on their way, from its record."""
    rate, temperature, norm, step = row[:4]
    end = "" if norm == "yes" else "_nonorm"
    name = f"standard_resnet20_3.0_17x64_{float(rate):g}_t{float(temperature):g}{end}.json"
    record = json.loads((RESULTS / "masks" / name).read_text())
    (at,) = [each for each in record["checkpoints"] if each["step"] == int(step)]
    robust = [at["robust"].get(attack) for attack in MAPPED]
    figures = [f"{at['cosine']:.2f}", f"{at['ratio']:.2f}", str(at["clean"])]
    return [*row[:4], *figures, *("" if count is None else str(count) for count in robust)]


EVERYWHERE = {  # tables of 'Ensemble everything everywhere', by the first cell of their heads
    "attack on the defense": "attacks",
    "CrossMax": "ablation",
    "variant": "knobs",
}


def rows_everywhere(table: str) -> list[dict[str, Any]]:
    return multiresolution.rows_of(RESULTS / "multiresolution" / "multiresolution_resnet18_1", table, multiresolution.Plan())


def of_everywhere(table: Table, row: list[str]) -> list[str] | None:
    """Return a row of a table of 'Ensemble everything everywhere', from the records; its first two cells name it."""
    rows = [shown(found).values() for found in rows_everywhere(EVERYWHERE[table.head[0]])]
    cells = [["" if value is None else str(value) for value in found] for found in rows]
    return next((found for found in cells if found[:2] == row[:2]), None)
