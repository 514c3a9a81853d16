"""Passes until MORA-mt leaves no more robust than APGD-CE does, and than the whole AutoAttack: from the records of `table1`.

    python benchmarks/table1.py --data-dir DIR --attacks mora-mt,autoattack
    python benchmarks/reach.py

Runs nothing. Passes are forward + backward, per image; "of AutoAttack's" is the share of them that MORA needed. The
accuracies to reach are AutoAttack's own.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from benchmarks.cells import Cell, Run, choose, run_options, summary
from benchmarks.options import EPS
from benchmarks.table1 import cells_of
from benchmarks.tables import save_table
from ensemble_attacks.models.passes import passes_per_image

ATTACKS = ("mora-mt", "autoattack")
PEERS = {"APGD-CE": "apgd-ce", "AutoAttack": "square"}  # and the stage of AutoAttack that ends it


def passes_until(trace: Counter[tuple[int, int, str]], samples: int, robust: int) -> float:
    """Passes (forward + backward) spent when at most ``robust`` samples were left; infinite if never."""
    spent, left = 0, samples
    for stage, step in sorted({(stage, step) for stage, step, _ in trace}):
        spent += trace[stage, step, "forwards"] + trace[stage, step, "backwards"]
        left -= trace[stage, step, "fooled"]
        if left <= robust:
            return spent
    return float("inf")


def row_of(cell: Cell, shards: list[dict[str, Path]]) -> dict[str, Any]:
    """The row of a cell, over the shards that both attacks have run."""
    trace: Counter[tuple[int, int, str]] = Counter()
    robust: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    n = 0
    for folders in shards:
        suite = summary(folders["autoattack"])["attacks"]["autoattack"]
        n += suite["n"]
        for peer, stage in PEERS.items():
            robust[peer] += suite["stages"][stage]["robust"]
            spent[peer] += passes_per_image(suite["stages"][stage]) * suite["n"]
        for at in json.loads((folders["mora-mt"] / "mora-mt.trace.json").read_text()):
            for kind in ("forwards", "backwards", "fooled"):
                trace[at["stage"], at["step"], kind] += at[kind]
    row: dict[str, Any] = {"model": cell.model, "vote": cell.vote, "eps": cell.eps, "n": n}
    for peer in PEERS:
        ours = passes_until(trace, n, robust[peer])
        row |= {peer: 100 * robust[peer] / n, f"{peer}'s passes": spent[peer] / n, f"MORA's to {peer}'s": ours / n}
        row[f"of {peer}'s"] = f"1/{spent[peer] / ours:.0f}" if ours < float("inf") else "never"
    return row


@click.command()
@run_options("runs/table1")
@click.option("--eps", type=EPS, default=0.01, show_default=True, help="As table1 was run with.")
def main(eps: float, cells: str | None, **options: Any) -> None:
    del options["table_only"]  # nothing is ever run
    run = Run(**options)
    chosen = choose(cells, cells_of(eps, run.model_dir))
    rows = [row_of(cell, shards) for cell in chosen if (shards := run.finished(cell, ATTACKS))]
    if not rows:
        raise click.UsageError(f"no cell in {run.out} has been run by mora-mt and autoattack: run table1.py first")
    click.echo(save_table(rows, run.out / "reach"))


if __name__ == "__main__":
    main()
