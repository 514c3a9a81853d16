"""The picture of the README: what attacks leave robust of ensembles that take a hard vote, from the records of `table1`.

python benchmarks/picture.py benchmarks/results/table1/table1.json --out docs/hard-votes.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from matplotlib import style
from matplotlib.figure import Figure

ATTACKS = {
    "PGD": "PGD-500",
    "CW": "CW-500",
    "AutoAttack": "AutoAttack",
    "soft-APGD": "APGD, soft vote",
    "MORA-mt": "MORA-mt",
}
TITLES = {"voting": "hard votes", "softmax": "mean probability", "logits": "mean logits"}


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--vote", default="voting", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(table: Path, vote: str, out: Path) -> None:
    three = [row for row in json.loads(table.read_text()) if row["members"] == 3]
    rows: list[dict[str, Any]] = [row for row in three if row["vote"] == vote]
    if not rows:
        raise click.BadParameter(f"{table} has no row of {vote!r} and three members", param_hint="--vote")
    with style.context("tableau-colorblind10"):
        axes = (figure := Figure(figsize=(7.5, 3.4), layout="constrained")).subplots()
        shown = {column: label for column, label in ATTACKS.items() if any(row.get(column) is not None for row in rows)}
        width = 0.8 / len(shown)
        for turn, (column, label) in enumerate(shown.items()):
            at = [index + (turn - (len(shown) - 1) / 2) * width for index in range(len(rows))]
            values = [row.get(column) for row in rows]
            bars = axes.bar(at, [value or 0 for value in values], width, label=label)
            axes.bar_label(bars, ["-" if value is None else f"{value:.0f}" for value in values], fontsize=7)
        names = [f"{row['defense']}\nLinf {row['eps']:g}" for row in rows]
        axes.set(xticks=range(len(rows)), xticklabels=names, ylabel="robust accuracy (%)")
        axes.set_title(f"CIFAR-10, three ResNet-20, {TITLES[vote]}, first {rows[0]['n']} test images", fontsize=10)
        figure.legend(loc="outside lower center", ncols=len(shown), frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
