"""MORA beside the standard AutoAttack on the CIFAR-10 ensembles that ship, in every vote: robust accuracy and passes.

    python benchmarks/against_autoattack.py --data-dir DIR --out runs/against_autoattack

One folder a cell (summary, times, images, trace), kept: the same command again goes on where it stopped. Prints a Markdown
table and writes it beside the cells, with the figures as JSON.

Columns: clean; AutoAttack after APGD-CE, after APGD-T, and whole; MORA (five betas x 100 steps) and MORA-mt (and nine
targets x 100). "To match" is the ratio of the passes (forward + backward) that APGD-CE spent to those that MORA had spent
when it left no more robust images than APGD-CE in the end. All accuracies are the judge's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from defenses import load_model
from ensemble_attacks.data import load_dataset
from ensemble_attacks.ensembles import VOTES
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings

EPS = {"standard_resnet20_3": 0.004, "adp_resnet20_3": 0.01}
ATTACKS = ("mora", "autoattack", "mora-mt")


def passes(row: dict[str, float]) -> float:
    return row["forwards_per_image"] + row["backwards_per_image"]


def passes_until(trace: list[dict[str, float]], robust: float) -> float:
    """Passes (forward + backward) spent when at most ``robust`` samples were left; infinite if never."""
    spent = 0.0
    for row in trace:
        spent += row["forwards"] + row["backwards"]
        if row["robust"] <= robust:
            return spent
    return float("inf")


def cell(model: str, vote: str, eps: float, n: int, seed: int, data_dir: str, out: Path) -> dict[str, Any]:
    """Run one cell, or read it if it has been run."""
    if not (out / "summary.json").exists():
        x, y = load_dataset("cifar10", data_dir=data_dir, n=n)
        describe = {"model": model, "vote": vote, "dataset": "cifar10"}
        report = lambda name, row: click.echo(f"{model} {vote} {name}: {100 * row['accuracy']:.1f}", err=True)  # noqa: E731
        settings = Settings(eps=eps, seed=seed, batch_size=250)
        evaluate(load_model(model, vote=vote), x, y, ATTACKS, settings, describe=describe, out=out, report=report)
    summary = json.loads((out / "summary.json").read_text())
    attacks, stages = summary["attacks"], summary["attacks"]["autoattack"]["stages"]
    trace = json.loads((out / "mora.trace.json").read_text())
    counts = summary["n"]
    return {
        "model": model,
        "vote": vote,
        "eps": summary["eps"],
        "n": counts,
        "clean": 100 * summary["clean"]["accuracy"],
        "APGD-CE": 100 * stages["apgd-ce"]["robust"] / counts,
        "APGD-CE+T": 100 * stages["apgd-t"]["robust"] / counts,
        "AutoAttack": 100 * attacks["autoattack"]["accuracy"],
        "MORA": 100 * attacks["mora"]["accuracy"],
        "MORA-mt": 100 * attacks["mora-mt"]["accuracy"],
        "APGD-CE passes": passes(stages["apgd-ce"]),
        "AutoAttack passes": passes(attacks["autoattack"]),
        "MORA passes": passes(attacks["mora"]),
        "MORA-mt passes": passes(attacks["mora-mt"]),
        "to match": passes(stages["apgd-ce"]) * counts / passes_until(trace, stages["apgd-ce"]["robust"]),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of rows with the same keys."""
    show = lambda key, value: f"{value:.1f}" if isinstance(value, float) and key != "eps" else str(value)  # noqa: E731
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(show(key, value) for key, value in row.items()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data-dir", default="data", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/against_autoattack"), show_default=True)
@click.option("--n", default=500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--cells", help="Comma-separated model:vote.  [default: all]")
def main(data_dir: str, out: Path, n: int, seed: int, cells: str | None) -> None:
    names = cells.split(",") if cells else [f"{model}:{vote}" for model in EPS for vote in VOTES]
    rows = []
    for name in names:
        model, vote = name.split(":")
        rows.append(cell(model, vote, EPS[model], n, seed, data_dir, out / f"{model}_{vote}"))
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    (out / "table.md").write_text(markdown(rows))
    click.echo(markdown(rows))


if __name__ == "__main__":
    main()
