"""MORA beside the standard AutoAttack on the CIFAR-10 ensembles that ship, in every vote: robust accuracy and passes.

    python benchmarks/against_autoattack.py --data-dir DIR --out runs/against_autoattack

Works through the first n test images in shards of 250, one folder a shard (summary, times, images, trace), kept: the same
command again goes on where it stopped, and several processes can take different ``--cells``. Prints a Markdown table of what
is there and writes it beside the cells, with the figures as JSON.

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

from defenses import load_model
from ensemble_attacks.data import load_dataset
from ensemble_attacks.ensembles import VOTES
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings

SHARD = 250
EPS = {
    ("standard_resnet20_3", "softmax"): 0.007,
    ("standard_resnet20_3", "voting"): 0.01,
    ("standard_resnet20_3", "logits"): 0.007,
    **{("adp_resnet20_3", vote): 0.01 for vote in VOTES},
}
ATTACKS = ("mora-mt", "autoattack")


def run_shard(model: str, vote: str, shard: int, seed: int, data_dir: str, out: Path) -> None:
    """Run one shard of a cell, unless it has been run."""
    if (out / "summary.json").exists():
        return
    x, y = load_dataset("cifar10", data_dir=data_dir, n=(shard + 1) * SHARD)
    x, y = x[shard * SHARD :], y[shard * SHARD :]
    describe = {"model": model, "vote": vote, "dataset": "cifar10", "first": shard * SHARD}
    report = lambda name, row: click.echo(f"{model} {vote} {shard} {name}: {100 * row['accuracy']:.1f}", err=True)  # noqa: E731
    settings = Settings(eps=EPS[model, vote], seed=seed, batch_size=SHARD)
    evaluate(load_model(model, vote=vote), x, y, ATTACKS, settings, describe=describe, out=out, report=report)


def passes(row: dict[str, float]) -> float:
    return row["forwards_per_image"] + row["backwards_per_image"]


def passes_until(trace: Counter[tuple[int, int, str]], samples: int, robust: int) -> float:
    """Passes (forward + backward) spent when at most ``robust`` samples were left; infinite if never."""
    spent, left = 0, samples
    for stage, step in sorted({(stage, step) for stage, step, _ in trace}):
        spent += trace[stage, step, "forwards"] + trace[stage, step, "backwards"]
        left -= trace[stage, step, "fooled"]
        if left <= robust:
            return spent
    return float("inf")


def cell(folders: list[Path]) -> dict[str, Any]:
    """The row of a cell, over the shards that have been run."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    n = sum(summary["n"] for summary in summaries)
    robust: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    trace: Counter[tuple[int, int, str]] = Counter()
    for summary, folder in zip(summaries, folders, strict=True):
        mora, suite = summary["attacks"]["mora-mt"], summary["attacks"]["autoattack"]
        parts = {
            "APGD-CE": suite["stages"]["apgd-ce"],
            "APGD-CE+T": suite["stages"]["apgd-t"],
            "AutoAttack": suite,
            "MORA": mora["stages"]["mora"],
            "MORA-mt": mora,
        }
        robust["clean"] += summary["clean"]["robust"]
        for name, part in parts.items():
            robust[name] += part["robust"]
            spent[name] += passes(part) * summary["n"]
        for row in json.loads((folder / "mora-mt.trace.json").read_text()):
            for kind in ("forwards", "backwards", "fooled"):
                trace[row["stage"], row["step"], kind] += row[kind]
    first = summaries[0]
    return {
        **{key: first[key] for key in ("model", "vote", "eps")},
        "n": n,
        **{name: 100 * count / n for name, count in robust.items()},
        **{f"{name} passes": count / n for name, count in spent.items()},
        "to match": spent["APGD-CE"] / passes_until(trace, n, robust["APGD-CE"]),
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
@click.option("--n", default=500, show_default=True, help=f"Test images, in shards of {SHARD}.")
@click.option("--seed", default=0, show_default=True)
@click.option("--cells", help="Comma-separated model:vote.  [default: all]")
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
def main(data_dir: str, out: Path, n: int, seed: int, cells: str | None, table_only: bool) -> None:
    names = cells.split(",") if cells else [":".join(key) for key in EPS]
    for shard in range(0 if table_only else n // SHARD):
        for name in names:
            model, vote = name.split(":")
            run_shard(model, vote, shard, seed, data_dir, out / f"{model}_{vote}_{shard}")
    rows = []
    for name in names:
        folders = [path.parent for path in sorted(out.glob(f"{name.replace(':', '_')}_*/summary.json"))]
        if folders:
            rows.append(cell(folders))
    if not rows:
        raise click.UsageError(f"nothing has been run in {out}")
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    (out / "table.md").write_text(markdown(rows))
    click.echo(markdown(rows))


if __name__ == "__main__":
    main()
