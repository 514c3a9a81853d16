"""Passes until MORA-mt leaves no more robust than others do: APGD-CE, the whole AutoAttack, and PGD and APGD on soft votes.

    python benchmarks/table1.py --data-dir DIR --attacks mora-mt,autoattack,soft-apgd,votes-pgd,votes-apgd
    python benchmarks/reach.py

Runs nothing: it is from the records of `table1`. Passes are forward + backward, per image; "of AutoAttack's" is the share of
them that MORA needed; "within 1%" is the same at all but 1% of the images, so that no figure hangs on one. The accuracies to
reach of APGD-CE and AutoAttack are AutoAttack's own.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import click

from benchmarks.cells import TRACE, Cell, Run, choose, run_options, summary
from benchmarks.options import EPS, Benchmark
from benchmarks.table1 import cells_of
from benchmarks.tables import save_table
from ensemble_attacks.models.passes import passes_per_image

OURS = "mora-mt"
PEERS = {  # the attack that was run, and the stage of it that ends the peer, if not its end
    "APGD-CE": ("autoattack", "apgd-ce"),
    "AutoAttack": ("autoattack", "square"),
    "soft-APGD": ("soft-apgd", None),
    "votes-PGD": ("votes-pgd", None),
    "votes-APGD": ("votes-apgd", None),
}
LENIENT = 0.01  # of the images


def passes_until(trace: Counter[tuple[int, int, str]], samples: int, robust: int) -> float:
    """Passes (forward + backward) spent when at most ``robust`` samples were left; infinite if never."""
    spent, left = 0, samples
    for stage, step in sorted({(stage, step) for stage, step, _ in trace}):
        spent += trace[stage, step, "forwards"] + trace[stage, step, "backwards"]
        left -= trace[stage, step, "fooled"]
        if left <= robust:
            return spent
    return float("inf")


def row_of(cell: Cell, run: Run) -> dict[str, Any] | None:
    """The row of a cell, each peer over the shards that it and MORA have run; ``None``, if none has run any."""
    row: dict[str, Any] = {"model": cell.model, "vote": cell.vote, "eps": cell.eps, "n": 0}
    for peer, (attack, stage) in PEERS.items():
        row |= part_of(peer, attack, stage, shards := run.finished(cell, [OURS, attack]))
        row["n"] = max(row["n"], len(shards) * run.shard)
    return row if row["n"] else None


def part_of(peer: str, attack: str, stage: str | None, shards: list[dict[str, Path]]) -> dict[str, Any]:
    """The columns of a peer, empty where no shard has been run."""
    trace: Counter[tuple[int, int, str]] = Counter()
    robust, spent, n = 0, 0.0, 0
    for folders in shards:
        whole = summary(folders[attack])["attacks"][attack]
        part = whole["stages"][stage] if stage else whole
        n += whole["n"]
        robust += part["robust"]
        spent += passes_per_image(part) * whole["n"]
        with (folders[OURS] / TRACE).open(newline="") as file:
            for at in csv.DictReader(file):
                for kind in ("forwards", "backwards", "fooled"):
                    trace[int(at["stage"]), int(at["step"]), kind] += int(at[kind])
    columns = (peer, f"{peer}'s passes", f"MORA's to {peer}'s", f"of {peer}'s", f"of {peer}'s within 1%")
    if not n:
        return dict.fromkeys(columns)
    ours, lenient = (passes_until(trace, n, robust + slack) for slack in (0, int(LENIENT * n)))
    shares = (share_of(passes, spent) for passes in (ours, lenient))
    return dict(zip(columns, (100 * robust / n, spent / n, ours / n, *shares), strict=True))


def share_of(passes: float, spent: float) -> str:
    """Say which share of the passes ``spent`` others are; "never", if they are infinite."""
    if passes == float("inf"):
        return "never"
    return f"1/{spent / passes:.0f}" if passes <= spent else f"{passes / spent:.1f}"


@click.command(cls=Benchmark)
@run_options("runs/table1")
@click.option("--eps", type=EPS, default=0.01, show_default=True, help="As table1 was run with.")
def main(eps: float, cells: str | None, **options: Any) -> None:
    del options["table_only"]  # nothing is ever run
    run = Run(**options)
    chosen = choose(cells, cells_of(eps, run.model_dir))
    rows = [row for cell in chosen if (row := row_of(cell, run))]
    if not rows:
        raise click.UsageError(f"no cell in {run.out} has been run by {OURS} and another: run table1.py first")
    click.echo(save_table(rows, run.out / "reach"))


if __name__ == "__main__":
    main()
