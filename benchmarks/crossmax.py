"""CrossMax of several networks: PGD on it, and PGD on the mean of their logits, judged on CrossMax.

    python benchmarks/crossmax.py --models standard_resnet20_3,adp_resnet20_3,gal_resnet20_3,trs_resnet20_3 --data-dir DIR

The members of all the models make one ensemble. Public code for ten networks at 6/255 (KellerJordan's
Evaluate-CrossMax-Ensemble) reports 77.8% under PGD-100 on CrossMax itself, and 2.2% for examples crafted on the mean. Goes
on where it stopped: every attack has a record, with each image's flag.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torchattacks
from torch import nn

from benchmarks.options import Benchmark, file_name, image_options, members_of, named, weights_of
from benchmarks.records import Record, load, measured, passes_of, robust_of
from benchmarks.tables import save_table
from defenses.crossmax import CrossMax
from ensemble_attacks import APGD, MORA, PGD, CrossMaxTransfer
from ensemble_attacks.data import load_dataset
from ensemble_attacks.names import outermost


def published(model: nn.Module, eps: float, **settings: Any) -> torchattacks.PGD:
    """As the public script: PGD-100, step 1/255 from the clean image, targeted at a random wrong class."""
    attack = torchattacks.PGD(model, eps=eps, alpha=1 / 255, steps=100, random_start=False)
    attack.set_mode_targeted_random(quiet=True)
    return attack


ATTACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PGD-100 at random classes": (published, {}),
    "the same on the mean": (CrossMaxTransfer, {"attack": published, "refine": None}),
    "PGD-100": (PGD, {"n_restarts": 1}),
    "APGD-100": (APGD, {}),
    "PGD-100 on the mean": (CrossMaxTransfer, {"attack": PGD, "n_restarts": 1, "refine": None}),
    "APGD-100 on the mean": (CrossMaxTransfer, {"attack": APGD, "refine": None}),
    "APGD-100 on the mean refined": (CrossMaxTransfer, {"attack": APGD, "refine": APGD}),
    "MORA": (MORA, {}),
    "MORA on the mean": (CrossMaxTransfer, {"attack": MORA, "refine": None}),
}


def record_name(attack: str) -> str:
    return file_name(attack.replace(" ", "-")).lower() + ".json"


def row_of(record: Record) -> dict[str, Any]:
    """Return a row of the table from a record."""
    return {"attack": record["attack"], "n": record["n"], "robust": robust_of([record]), "passes": passes_of([record])}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each record in a folder, below that of the clean images."""
    records = [load(folder / record_name(name)) for name in ATTACKS if (folder / record_name(name)).exists()]
    clean = [
        {"attack": "none", "n": record["n"], "robust": robust_of([{"flags": record["clean"]}])} for record in records[:1]
    ]
    return [row | {"passes": 0.0} for row in clean] + [row_of(record) for record in records]


@click.command(cls=Benchmark)
@click.option("--models", required=True, help="Comma-separated names; all their members together.")
@click.option("--attacks", default=",".join(ATTACKS), help="Comma-separated names.  [default: all]")
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
@image_options("runs/crossmax", numerator=6)
def main(
    models: str,
    attacks: str,
    table_only: bool,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    chosen, folder = named(attacks, ATTACKS, "--attacks"), out / file_name(dataset)
    if not table_only:
        x, y = load_dataset(dataset, data_dir=data_dir, n=n)
        model = CrossMax(members_of(models, model_dir, dataset)).eval()
        weights = [weights_of(name, model_dir, dataset) for name in outermost(models, ",")]
        for name in chosen:
            torch.manual_seed(seed)  # for torchattacks' random classes
            attack, arguments = ATTACKS[name]
            make = partial(attack, eps=eps, seed=seed, batch_size=250, **arguments)
            about = {"attack": name, "models": models, "dataset": dataset, "weights": weights}
            found = measured(folder / record_name(name), model, x, y, make, eps=eps, seed=seed, about=about)
            click.echo(row_of(found), err=True)
    rows = rows_of(folder)
    if not rows:
        raise click.UsageError(f"{folder} holds nothing yet")
    click.echo(save_table(rows, folder))


if __name__ == "__main__":
    main()
