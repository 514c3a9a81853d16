"""Do more members, or different ones, resist more? Ensembles of three, five and eight networks, and of mixed ones.

    python benchmarks/members.py --dataset digits --n 100 --shard 100
    python benchmarks/members.py --data-dir DIR --n 100

Table 1's other half (and Table 2's) in kind, in a size that a CPU reaches: every trained defense of several members, under
a soft and a hard vote. Columns: clean; APGD-CE, and APGD on the margin of the mean probability (soft) and of soft votes
(votes), 1 x 100 steps each; MORA, 5 x 100. Robust accuracy (%), the judge's, and the passes (forward + backward) per image.
Goes on where it stopped (see `cells`). How far adversarial examples carry from member to member is `transfer.py`'s.
"""

from __future__ import annotations

from typing import Any

import click

from benchmarks.cells import Cell, Run, choose, run_options
from benchmarks.options import EPS, Benchmark, named
from benchmarks.table1 import DEFENSES, NAME, row_of
from benchmarks.tables import save_table
from defenses import list_models

COLUMNS: dict[str, tuple[str, str | None]] = {
    "APGD-CE": ("apgd-ce", None),
    "soft-APGD": ("soft-apgd", None),
    "votes-APGD": ("votes-apgd", None),
    "MORA": ("mora", None),
}
ATTACKS = tuple(attack for attack, _ in COLUMNS.values())
PEERS = ("adp_igat", "dverge_igat")
TRAINED = ("dverge_at", "each_at")  # adversarially
KNOWN = (*DEFENSES, *PEERS, *TRAINED)
SIZES = {"digits": (0.12, 0.12), "cifar10": (0.01, 0.03)}  # Linf radii: of plain defenses, of those trained adversarially
VOTES = ("softmax", "voting")
SHARD, OF_DIGITS = 50, 100  # images: of a shard by default, and of the records on digits that ship


def cells_of(dataset: str, model_dir: str | None, eps: tuple[float, float]) -> list[Cell]:
    """Every ensemble of several members of these defenses that can be loaded, the largest ones first."""
    known = [name.rsplit("_", 2) for name in list_models(dataset, model_dir) if NAME.fullmatch(name)]
    chosen = [(defense, network, int(members)) for defense, network, members in known if defense in KNOWN]
    return [
        Cell(f"{defense}_{network}_{members}", vote, eps[defense in TRAINED])
        for defense, network, members in sorted(chosen, key=lambda found: -found[2])
        for vote in VOTES
    ]


@click.command(cls=Benchmark)
@run_options("runs/members")
@click.option("--dataset", type=click.Choice(list(SIZES)), default="cifar10", show_default=True)
@click.option("--shard", default=SHARD, show_default=True, help="Images of a shard.")
@click.option("--eps", type=EPS, help="Linf radius.  [default: digits 0.12; cifar10 0.01, 0.03 of adversarial training]")
@click.option("--attacks", default=",".join(ATTACKS), show_default=True)
def main(
    dataset: str, shard: int, eps: float | None, attacks: str, cells: str | None, table_only: bool, **options: Any
) -> None:
    run = Run(dataset=dataset, shard=shard, **options)
    radii = SIZES[dataset] if eps is None else (eps, eps)
    chosen, names = choose(cells, cells_of(dataset, run.model_dir, radii)), tuple(named(attacks, ATTACKS, "--attacks"))
    if not table_only:
        run.attack(chosen, names)
    rows = [row for cell in chosen if (row := row_of(cell, run, names, COLUMNS))]
    rows.sort(key=lambda row: (row["defense"], row["network"], row["vote"], row["members"]))
    click.echo(save_table(rows, run.out / dataset) if rows else f"no cell in {run.out} has been run by {attacks} yet")


if __name__ == "__main__":
    main()
