"""MORA beside the standard AutoAttack on the CIFAR-10 ensembles that ship, in every vote: robust accuracy and passes.

    python benchmarks/against_autoattack.py --data-dir DIR --out runs/against_autoattack

Goes on where it stopped (see `cells`); prints a Markdown table of what is there, and keeps it as Markdown, JSON and CSV.

Columns: clean; AutoAttack after APGD-CE, after APGD-T, and whole; MORA (five betas x 100 steps) and MORA-mt (and nine
targets x 100). "To match" is the ratio of the passes (forward + backward) that APGD-CE spent to those that MORA had spent
when it left no more robust images than APGD-CE in the end. All accuracies are the judge's.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
from cells import Cell, Run, choose, run_options, summary
from tables import save_table

from ensemble_attacks.ensembles import VOTES
from ensemble_attacks.passes import passes_per_image

CELLS = [  # eps: where AutoAttack leaves 10 to 50%, and 0.01 for ADP as in the MORA paper
    Cell("standard_resnet20_3", "softmax", 0.005),
    Cell("standard_resnet20_3", "voting", 0.009),
    Cell("standard_resnet20_3", "logits", 0.005),
    *[Cell("adp_resnet20_3", vote, eps) for eps in (0.01, 0.005) for vote in VOTES],
]
ATTACKS = ("mora-mt", "autoattack")


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
    robust: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    trace: Counter[tuple[int, int, str]] = Counter()
    n = 0
    for folders in shards:
        both = {name: summary(path) for name, path in folders.items()}
        mora, suite = (both[name]["attacks"][name] for name in ATTACKS)
        parts = {
            "APGD-CE": suite["stages"]["apgd-ce"],
            "APGD-CE+T": suite["stages"]["apgd-t"],
            "AutoAttack": suite,
            "MORA": mora["stages"]["mora"],
            "MORA-mt": mora,
        }
        images = both["mora-mt"]["n"]
        n += images
        robust["clean"] += both["mora-mt"]["clean"]["robust"]
        for name, part in parts.items():
            robust[name] += part["robust"]
            spent[name] += passes_per_image(part) * images
        for row in json.loads((folders["mora-mt"] / "mora-mt.trace.json").read_text()):
            for kind in ("forwards", "backwards", "fooled"):
                trace[row["stage"], row["step"], kind] += row[kind]
    return {
        **{"model": cell.model, "vote": cell.vote, "eps": cell.eps, "n": n},
        **{name: 100 * count / n for name, count in robust.items()},
        **{f"{name} passes": count / n for name, count in spent.items()},
        "to match": spent["APGD-CE"] / passes_until(trace, n, robust["APGD-CE"]),
    }


@click.command()
@run_options("runs/against_autoattack")
@click.option("--attacks", default=",".join(ATTACKS), show_default=True, help="Which of the two to run now.")
def main(attacks: str, cells: str | None, table_only: bool, **options: Any) -> None:
    run = Run(**options)
    chosen = choose(cells, CELLS)
    if not table_only:
        run.attack(chosen, attacks.split(","))
    rows = [row_of(cell, shards) for cell in chosen if (shards := run.finished(cell, ATTACKS))]
    click.echo(save_table(rows, run.out / "table") if rows else f"no cell in {run.out} has been run by both attacks yet")


if __name__ == "__main__":
    main()
