"""Randomized ensembles of two: ARC against adaptive PGD, EOTAPGD and MORA, by the expected accuracy over the members.

    python benchmarks/randomized.py --pairs dverge_at_resnet20_3:0+dverge_at_resnet20_3:1 --data-dir DIR

Adaptive PGD climbs the logarithm of the expected probability. Dbouk & Shanbhag (ICML 2022) report for two ResNet-20 trained
for it, Linf 8/255: adaptive PGD 61.1, ARC 40.7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.options import image_options, members_of
from benchmarks.tables import save_table
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import ARC, EOTAPGD, MORA, PGD, Surrogate
from ensemble_attacks.data import load_dataset
from ensemble_attacks.judge import check_adversarial
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.twins import prepare

ATTACKS: dict[str, Any] = {
    "adaptive PGD": lambda model, **kw: PGD(Surrogate(model, "probability"), n_restarts=1, **kw),
    "ARC": lambda model, **kw: ARC(model, **kw),
    "ARC, 3 restarts": lambda model, **kw: ARC(model, n_restarts=3, **kw),
    "EOTAPGD": lambda model, **kw: EOTAPGD(model, **kw),
    "MORA": lambda model, **kw: MORA(model, **kw),
}


@click.command()
@click.option("--pairs", required=True, help="Comma-separated model:member+model:member.")
@click.option("--probabilities", default="0.5,0.5", show_default=True)
@image_options("runs/randomized")
def main(
    pairs: str,
    probabilities: str,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    shares = [float(p) for p in probabilities.split(",")]
    rows: list[dict[str, Any]] = []
    for pair in pairs.split(","):
        names = [part.rpartition(":") for part in pair.split("+")]
        if wrong := [index for _, _, index in names if not index.isdigit()]:
            raise click.BadParameter(f"{pair!r}: {wrong[0]!r} is no member: as in adp_convnet_3:0", param_hint="--pairs")
        members = []
        for name, _, index in names:
            nets = members_of(name, model_dir, dataset, "--pairs")
            if int(index) >= len(nets):
                raise click.BadParameter(f"{pair!r}: {name} has {len(nets)} members, from 0", param_hint="--pairs")
            members.append(nets[int(index)])
        model = RandomizedEnsemble(members, shares, seed=seed).eval()
        twin = prepare(model, x[:8])

        @torch.no_grad()
        def expected(images: torch.Tensor, model: RandomizedEnsemble = model) -> float:
            right_MN = model.member_logits(images).argmax(-1) == y
            return 100 * (model.probabilities @ right_MN.double()).mean().item()

        for name, attack in {"none": None, **ATTACKS}.items():
            counted = count_passes(twin)
            images = x if attack is None else attack(counted, eps=eps, seed=seed, batch_size=100)(x, y)
            check_adversarial(x, images, eps=eps)
            passes = (counted.forwards + counted.backwards) / n
            rows.append({"pair": pair, "attack": name, "expected accuracy": expected(images), "passes": passes})
            click.echo(rows[-1], err=True)
        table = save_table(rows, out / "randomized")
    click.echo(table)


if __name__ == "__main__":
    main()
