"""ImageNet: how much of an ensemble of three EfficientNet-Lite is left under the suite's APGD-CE, MORA, MORA-mt and `auto`.

    python -m benchmarks.scale --data IMAGES --out runs/imagenet

Each cell, a vote and a radius, is a run of its own, through `evaluate` on ``benchmarks/imagenet.py:make``; the same command
goes on where it was stopped. APGD-CE and MORA (beta 0.5) have ``--steps`` steps on all images; MORA-mt goes on from MORA
with ``--targets`` more descents of as many; ours leave an image once it is fooled. `auto` (``--auto STEPS``) is run on what
MORA-mt leaves, and the column says what is robust to both. Tables, per-image flags and what they were made with go to
``benchmarks/results/imagenet`` (``--results``), and the page of the first cell (``--report``) into its run.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.tables import save_table
from ensemble_attacks import evaluate
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.units import CLEAN, chains_of

NETS = Path(__file__).parent / "imagenet.py"
CELLS = [  # the most telling first
    *(("voting", 0.5), ("softmax", 0.5), ("logits", 0.5)),
    *(("voting", 0.25), ("voting", 1.0), ("softmax", 0.25), ("softmax", 1.0), ("logits", 0.25), ("logits", 1.0)),
]


def attacks_of(steps: int, targets: int) -> dict[str, str]:
    """Return the attacks of a cell by the names of their columns."""
    return {"MORA-mt": f"mora-mt?steps={steps}&betas=0.5&targets={targets}", "APGD-CE": f"apgd-ce?steps={steps}"}


def of_run(folder: Path) -> dict[str, dict[str, Any]]:
    """Return of each attack that a run has finished: the flags of every image, passes for each image, seconds."""
    ledger, found = Ledger(folder), {}
    for unit in (unit for chain in chains_of(ledger.manifest) for unit in chain):
        if (result := ledger.read(unit)) is None:
            continue
        n, tensors, info = unit.range[1] - unit.range[0], result.tensors, result.info

        def flags(name: str, n: int = n, tensors: dict[str, Tensor] = tensors) -> list[int]:
            robust = torch.zeros(n, dtype=torch.int64)
            robust[tensors["rows"]] = tensors[name].long()
            return robust.tolist()

        found[unit.attack] = {
            "robust": flags("robust"),
            "attacked": len(tensors["rows"]),
            "passes": round((info["forwards"] + info["backwards"]) / n, 1),
            "seconds": round(info["seconds"], 1),
            "failed": info["failed"],
        }
        for part, passes in info["stages"].items():
            stage = {"robust": flags(f"stage {part}"), "passes": round(sum(passes) / n, 1)}
            found[part if part == "mora" else f"{unit.attack}: {part}"] = stage
    return found


def row_of(vote: str, eps: float, n: int, found: dict[str, dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    """Return a row of the table: robust % after each attack, its passes for each image, and its seconds."""
    row: dict[str, Any] = {"vote": vote, "eps x 255": f"{eps:g}", "n": n}
    row["clean"] = 100 * sum(found[CLEAN]["robust"]) / n if CLEAN in found else ""
    for column, name in names.items():
        done = found.get(name)
        row[column] = 100 * sum(done["robust"]) / n if done else ""
        row[f"{column}: passes"] = done["passes"] if done else ""
        if done and "seconds" in done:
            row[f"{column}: s"] = done["seconds"]
    return row


@click.command()
@click.option("--data", "images", required=True, help="A folder of photographs for each class, with classes.txt.")
@click.option("--transform", default="crop=224", show_default=True)
@click.option("--n", default=50, show_default=True, help="Images, drawn over all classes.")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--targets", default=1, show_default=True, help="Of MORA-mt.")
@click.option("--auto", "auto_steps", type=int, help="Also run auto, with so many steps, on what MORA-mt leaves.")
@click.option("--cells", type=int, default=len(CELLS), show_default=True, help="So many, the most telling first.")
@click.option("--batch-size", default=5, show_default=True, help="Each image takes about 0.5 GB while it has a gradient.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/imagenet"), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path(__file__).parent / "results/imagenet")
@click.option("--report", is_flag=True, help="Write the page of the first cell.")
def main(
    images: str,
    n: int,
    seed: int,
    steps: int,
    targets: int,
    auto_steps: int | None,
    cells: int,
    out: Path,
    results: Path,
    report: bool,
    **settings: Any,
) -> None:
    names = attacks_of(steps, targets)
    columns = {"APGD-CE": names["APGD-CE"], "MORA": "mora", "MORA-mt": names["MORA-mt"]}
    if auto_steps:
        columns["then auto"] = f"auto?steps={auto_steps}"
    rows, record = [], []
    for vote, eps in CELLS[:cells]:
        shared: dict[str, Any] = {"eps": eps / 255, "sample": n, "seeds": seed, **settings}
        model, folder = f"{NETS}:make?vote={vote}", out / f"{vote}-{eps:g}"
        run = evaluate(model, images, attacks=[*names.values()], out=folder, **shared)
        found = of_run(folder)
        if auto_steps:
            cascade = [names["MORA-mt"], columns["then auto"]]
            evaluate(model, images, attacks=cascade, out=out / f"{vote}-{eps:g}-auto", cascade=True, **shared)
            found |= {name: done for name, done in of_run(out / f"{vote}-{eps:g}-auto").items() if name == cascade[1]}
        if report and not (folder / "report").exists():
            run.report()
            report = False
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(row_of(vote, eps, n, found, columns))
        manifest = Ledger(folder).manifest
        kept = {key: manifest[key] for key in ("rows", "code", "versions", "data")}
        kept["weights"] = [*manifest["weights"].values()]
        kept["sweep"] = manifest["sweep"] | {"models": [f"{NETS.name}:make?vote={vote}"], "dataset": Path(images).name}
        record.append({"vote": vote, "eps x 255": eps, "found": found, "peak_GB_so_far": round(peak, 2), **kept})
        click.echo(save_table(rows, results / "table"))
        results.joinpath("record.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
