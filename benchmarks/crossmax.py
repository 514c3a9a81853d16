"""CrossMax of several networks: PGD on it, and PGD on the mean of their logits, judged on CrossMax.

    python benchmarks/crossmax.py --models standard_resnet20_3,adp_resnet20_3,gal_resnet20_3,trs_resnet20_3 --data-dir DIR

The members of all the models make one ensemble. Public code for ten networks at 6/255 (KellerJordan's
Evaluate-CrossMax-Ensemble) reports 77.8% under PGD-100 on CrossMax itself, and 2.2% for examples crafted on the mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
import torchattacks
from torch import nn

from benchmarks.options import image_options, members_of, named
from benchmarks.tables import save_table
from defenses.crossmax import CrossMax
from ensemble_attacks import APGD, MORA, PGD, CrossMaxTransfer, judge
from ensemble_attacks.data import load_dataset
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.twins import prepare


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


@click.command()
@click.option("--models", required=True, help="Comma-separated names; all their members together.")
@click.option("--attacks", default=",".join(ATTACKS), help="Comma-separated names.  [default: all]")
@image_options("runs/crossmax", numerator=6)
def main(
    models: str, model_dir: str | None, dataset: str, data_dir: str, eps: float, n: int, seed: int, attacks: str, out: Path
) -> None:
    chosen = named(attacks, ATTACKS, "--attacks")
    torch.manual_seed(seed)  # for torchattacks' random classes
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    members = members_of(models, model_dir, dataset)
    model, mean = CrossMax(members).eval(), Ensemble(members, "logits").eval()
    twin = prepare(model, x[:8])
    rows: list[dict[str, Any]] = []
    for name, defended in (("none (the mean of the logits)", mean), ("none", model)):
        rows.append({"attack": name, "robust": 100 * judge(defended, x, y, x, eps=eps).accuracy, "passes": 0.0})
    for name in chosen:
        attack, arguments = ATTACKS[name]
        counted = count_passes(twin)
        adversarial = attack(counted, eps=eps, seed=seed, batch_size=250, **arguments)(x, y)
        verdict = judge(model, x, y, adversarial, eps=eps)
        passes = (counted.forwards + counted.backwards) / len(x)
        rows.append({"attack": name, "robust": 100 * verdict.accuracy, "passes": passes})
        click.echo(f"{name}: {verdict}", err=True)
    click.echo(f"{len(members)} networks, {dataset}, Linf {eps:.4g}, n = {len(x)}, seed {seed}\n")
    click.echo(save_table(rows, out / "crossmax"))


if __name__ == "__main__":
    main()
