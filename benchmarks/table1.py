"""Table 1 of the MORA paper (and the row of its Table 2), in kind, on the models that ship: defense x members x vote.

    python benchmarks/table1.py --data-dir DIR --out runs/table1

Goes on where it stopped (see `cells`); prints a Markdown table of what is there, and keeps it as Markdown, JSON and CSV.

Columns, as the paper has them: clean ('nominal'); PGD and CW, 5 restarts x 100 steps of eps / 4; MORA, 5 x 100; A3; the
standard AutoAttack; CAA; MORA-mt, 14 x 100. And the plain baselines, which ask for no more than a soft vote in place of the
real one: PGD and APGD, 1 x 100, on the margin of the members' mean probability (soft), and of soft votes, each member's at
its own gap (votes). Robust accuracy (%), the judge's, and the passes (forward + backward) per image; ``difference`` is what
the best other column leaves, less what MORA-mt does. A second table, ``table1_pairs``, compares MORA-mt with each column
image by image: how many either alone leaves robust, McNemar's exact p, and by how many points MORA-mt leaves fewer, with the
95% interval.

PGD and CW are this package's: torchattacks' PGD has no restarts and goes on with images that are fooled already, and its CW
minimises an L2 distance.
"""

from __future__ import annotations

import re
from typing import Any

import click

from benchmarks.cells import Cell, Run, choose, run_options, summary
from benchmarks.options import EPS, Benchmark, named
from benchmarks.records import lead_of, paired
from benchmarks.tables import save_table
from defenses import list_models
from ensemble_attacks.models.passes import passes_per_image
from ensemble_attacks.models.votes import VOTES

DEFENSES = ("standard", "adp", "gal", "dverge", "trs")
COLUMNS = {  # the attack that is run, and the stage of it that is the column's, if not its end
    "PGD": ("pgd", None),
    "CW": ("cw", None),
    "soft-PGD": ("soft-pgd", None),
    "soft-APGD": ("soft-apgd", None),
    "votes-PGD": ("votes-pgd", None),
    "votes-APGD": ("votes-apgd", None),
    "MORA": ("mora-mt", "mora"),
    "A3": ("a3", None),
    "AutoAttack": ("autoattack", None),
    "CAA": ("caa", None),
    "MORA-mt": ("mora-mt", None),
}
OURS = "mora-mt"
NAME = re.compile(r".+_[^_]+_\d+")  # <defense>_<network>_<members>
ATTACKS = tuple(dict.fromkeys(attack for attack, _ in COLUMNS.values()))


def cells_of(eps: float, model_dir: str | None) -> list[Cell]:
    """Every defense of the paper that can be loaded, at the paper's eps: 0.03 where it is trained adversarially."""
    known = [name for name in list_models("cifar10", model_dir) if NAME.fullmatch(name)]
    plain = [name for name in known if name.rsplit("_", 2)[0] in DEFENSES]
    trained = [name for name in known if name.rsplit("_", 2)[0] == "dverge_at"]
    return [Cell(name, vote, size) for names, size in ((plain, eps), (trained, 3 * eps)) for name in names for vote in VOTES]


def row_of(
    cell: Cell, run: Run, attacks: tuple[str, ...], columns: dict[str, tuple[str, str | None]] = COLUMNS
) -> dict[str, Any] | None:
    """The row of a cell, over the shards that all of ``attacks`` have run; empty columns for those that have run none."""
    wanted, attacks = attacks, tuple(attack for attack in attacks if run.finished(cell, [attack]))
    shards = run.finished(cell, attacks) if attacks else []
    if not shards:
        return None
    summaries = [{attack: summary(path) for attack, path in folders.items()} for folders in shards]
    firsts = [shard[attacks[0]] for shard in summaries]
    n = sum(first["n"] for first in firsts)
    defense, network, members = cell.model.rsplit("_", 2)
    row: dict[str, Any] = {"defense": defense, "network": network, "members": int(members)}
    row |= {"vote": cell.vote, "eps": cell.eps, "n": n}
    row["clean"] = 100 * sum(first["clean"]["robust"] for first in firsts) / n
    for column, (attack, stage) in columns.items():
        if attack not in wanted:
            continue
        row[column] = row[f"{column} passes"] = None
        if attack not in attacks:
            continue
        parts = [shard[attack]["attacks"][attack] for shard in summaries]
        parts = [part["stages"][stage] if stage else part for part in parts]
        row[column] = 100 * sum(part["robust"] for part in parts) / n
        row[f"{column} passes"] = (
            sum(passes_per_image(part) * first["n"] for part, first in zip(parts, firsts, strict=True)) / n
        )
    others = [row[column] for column in COLUMNS if column not in ("MORA", "MORA-mt") and row.get(column) is not None]
    if others and row.get("MORA-mt") is not None:
        row["difference"] = min(others) - row["MORA-mt"]
    return row


def pairs_of(cell: Cell, run: Run, attacks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a row for each attack beside MORA-mt, over the shards that both have run with a flag for each image."""
    rows = []
    for attack in (name for name in attacks if name != OURS):
        shards = [{name: summary(path) for name, path in found.items()} for found in run.finished(cell, [OURS, attack])]
        flags = {name: "".join(shard[name].get("flags", "") for shard in shards) for name in (OURS, attack)}
        if not flags[OURS] or len(flags[OURS]) != len(flags[attack]):
            continue
        ours, theirs, p = paired(flags[OURS], flags[attack])
        row = {"model": cell.model, "vote": cell.vote, "eps": cell.eps, "n": len(flags[OURS]), "attack": attack}
        row |= {"robust to MORA-mt alone": ours, "robust to it alone": theirs, "p": f"{p:.2g}"}
        rows.append(row | {"lead": lead_of(ours, theirs, len(flags[OURS]))})
    return rows


@click.command(cls=Benchmark)
@run_options("runs/table1")
@click.option(
    "--eps", type=EPS, default=0.01, show_default=True, help="Linf radius; three times it for adversarially trained models."
)
@click.option("--attacks", default=",".join(ATTACKS), show_default=True)
def main(attacks: str, eps: float, cells: str | None, table_only: bool, **options: Any) -> None:
    run = Run(**options)
    chosen, names = choose(cells, cells_of(eps, run.model_dir)), tuple(named(attacks, ATTACKS, "--attacks"))
    if not table_only:
        run.attack(chosen, names)
    rows = [row for cell in chosen if (row := row_of(cell, run, names))]
    click.echo(save_table(rows, run.out / "table1") if rows else f"no cell in {run.out} has been run by {attacks} yet")
    if pairs := [row for cell in chosen for row in pairs_of(cell, run, names)]:
        save_table(pairs, run.out / "table1_pairs")


if __name__ == "__main__":
    main()
