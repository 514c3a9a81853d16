"""MORA beside the standard AutoAttack on the CIFAR-10 ensembles that ship, in every vote: robust accuracy and passes.

    python benchmarks/against_autoattack.py --data-dir DIR --out runs/against_autoattack

Works through the first n test images in shards of 250, one folder a shard and attack (summary, times, images, trace): the
same command again goes on where it stopped, and several processes can take different ``--cells``. Prints a Markdown table of
what is there and writes it beside the cells, with the figures as JSON.

Columns: clean; AutoAttack after APGD-CE, after APGD-T, and whole; MORA (five betas x 100 steps) and MORA-mt (and nine
targets x 100). "To match" is the ratio of the passes (forward + backward) that APGD-CE spent to those that MORA had spent
when it left no more robust images than APGD-CE in the end. All accuracies are the judge's.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import click
from tables import save_table

from defenses import load_model
from ensemble_attacks.data import load_dataset
from ensemble_attacks.ensembles import VOTES
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings

SHARD = 250
CELLS = {  # model and vote, each at these eps: where AutoAttack leaves 10 to 50%, and 0.01 for ADP as in the MORA paper
    ("standard_resnet20_3", "softmax"): (0.005,),
    ("standard_resnet20_3", "voting"): (0.009,),
    ("standard_resnet20_3", "logits"): (0.005,),
    **{("adp_resnet20_3", vote): (0.01, 0.005) for vote in VOTES},
}
ATTACKS = ("mora-mt", "autoattack")
Cell = tuple[str, str, float]  # model, vote, eps


def folder(out: Path, cell: Cell, seed: int, shard: int, attack: str) -> Path:
    model, vote, eps = cell
    return out / f"{model}_{vote}_{eps:g}_seed{seed}" / f"{shard}_{attack}"


def run_shard(cell: Cell, seed: int, shard: int, attack: str, data_dir: str, out: Path) -> None:
    """Run one attack on one shard of a cell, unless that has been done."""
    model, vote, eps = cell
    where = folder(out, cell, seed, shard, attack)
    if (where / "summary.json").exists():
        return
    x, y = load_dataset("cifar10", data_dir=data_dir, n=(shard + 1) * SHARD)
    x, y = x[shard * SHARD :], y[shard * SHARD :]
    describe = {"model": model, "vote": vote, "dataset": "cifar10", "first": shard * SHARD}
    report = lambda name, row: click.echo(f"{model} {vote} {eps:g} {shard} {name}: {100 * row['accuracy']:.1f}", err=True)  # noqa: E731
    settings = Settings(eps=eps, seed=seed, batch_size=SHARD)
    evaluate(load_model(model, vote=vote), x, y, [attack], settings, describe=describe, out=where, report=report)


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


def row_of(shards: list[tuple[Path, Path]]) -> dict[str, Any]:
    """The row of a cell, over the shards that both attacks have run; a shard is the folders of ``ATTACKS``."""
    robust: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    trace: Counter[tuple[int, int, str]] = Counter()
    n = 0
    for folders in shards:
        first, second = (json.loads((path / "summary.json").read_text()) for path in folders)
        mora, suite = first["attacks"]["mora-mt"], second["attacks"]["autoattack"]
        parts = {
            "APGD-CE": suite["stages"]["apgd-ce"],
            "APGD-CE+T": suite["stages"]["apgd-t"],
            "AutoAttack": suite,
            "MORA": mora["stages"]["mora"],
            "MORA-mt": mora,
        }
        n += first["n"]
        robust["clean"] += first["clean"]["robust"]
        for name, part in parts.items():
            robust[name] += part["robust"]
            spent[name] += passes(part) * first["n"]
        for row in json.loads((folders[0] / "mora-mt.trace.json").read_text()):
            for kind in ("forwards", "backwards", "fooled"):
                trace[row["stage"], row["step"], kind] += row[kind]
    return {
        **{key: first[key] for key in ("model", "vote", "eps")},
        "n": n,
        **{name: 100 * count / n for name, count in robust.items()},
        **{f"{name} passes": count / n for name, count in spent.items()},
        "to match": spent["APGD-CE"] / passes_until(trace, n, robust["APGD-CE"]),
    }


@click.command()
@click.option("--data-dir", default="data", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/against_autoattack"), show_default=True)
@click.option("--n", default=500, show_default=True, help=f"Test images, in shards of {SHARD}.")
@click.option("--seed", default=0, show_default=True)
@click.option("--cells", help="Comma-separated model:vote:eps.  [default: all]")
@click.option("--attacks", default=",".join(ATTACKS), show_default=True, help="Which of the two to run now.")
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
def main(data_dir: str, out: Path, n: int, seed: int, cells: str | None, attacks: str, table_only: bool) -> None:
    if n < 1 or n % SHARD:
        raise click.BadParameter(f"{n} is not a multiple of {SHARD}", param_hint="--n")
    known = {f"{model}:{vote}:{eps:g}": (model, vote, eps) for (model, vote), sizes in CELLS.items() for eps in sizes}
    unknown = [name for name in cells.split(",") if name not in known] if cells else []
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r}: choose from {', '.join(known)}", param_hint="--cells")
    chosen = [known[name] for name in cells.split(",")] if cells else list(known.values())
    if not table_only:
        for shard, cell, attack in product(range(n // SHARD), chosen, attacks.split(",")):
            run_shard(cell, seed, shard, attack, data_dir, out)
    rows = []
    for cell in chosen:
        shards = [tuple(folder(out, cell, seed, shard, attack) for attack in ATTACKS) for shard in range(n // SHARD)]
        done = [shard for shard in shards if all((path / "summary.json").exists() for path in shard)]
        if done:
            rows.append(row_of(done))
    if not rows:
        raise click.UsageError(f"nothing has been run in {out}")
    click.echo(save_table(rows, out / "table"))


if __name__ == "__main__":
    main()
