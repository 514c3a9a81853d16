"""Randomized ensembles: ARC, the Lattice Climber, EOTAPGD, adaptive PGD and MORA, by the expected accuracy over the members.

    python -m benchmarks.randomized --ensembles dverge_at_resnet20_3:0+dverge_at_resnet20_3:1 --data-dir DIR
    python -m benchmarks.randomized --dataset digits --eps 0.12 --ensembles gal_convnet_3,trs_convnet_3,dverge_convnet_3

An ensemble is the members of a model, all with the same probability, or those that are named. *mean* is the exact expected
accuracy, *worst of 10* the exact chance, over images, that ten draws are all right. Goes on where it stopped: every attack
on every ensemble has a record, with each image's probability of being right. Dbouk & Shanbhag (ICML 2022) report for two
ResNet-20 trained for it, Linf 8/255: adaptive PGD 61.1, ARC 40.7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.options import Benchmark, image_options, named
from benchmarks.records import Record, measured, passes_of
from benchmarks.tables import save_table
from defenses import load_model, model_card
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import ARC, EOTAPGD, LCA, MORA, PGD
from ensemble_attacks.data import load_dataset
from ensemble_attacks.judge import check_adversarial

DRAWS = 10
LOG = "log-expected"
ATTACKS: dict[str, Callable[..., Any]] = {
    "PGD on the mean loss": partial(PGD, n_restarts=1, eot_iter=1),
    "PGD on the log of the expectation": partial(PGD, n_restarts=1, eot_iter=1, loss=LOG),
    "EOTAPGD": EOTAPGD,
    "EOTAPGD on the log of the expectation": partial(EOTAPGD, loss=LOG),
    "LCA": LCA,
    "MORA": MORA,
    "ARC": ARC,
    "ARC, consistent": partial(ARC, consistent=True),
    "ARC, nearest plane": partial(ARC, planes=1),
    "ARC, nearest plane, consistent": partial(ARC, planes=1, consistent=True),
}


def members_of(ensemble: str, model_dir: str | None, dataset: str) -> list[nn.Module]:
    """The members that an ensemble's name says; `click.BadParameter` where there is none of that number."""
    members: list[nn.Module] = []
    for part in ensemble.split("+"):
        name, _, index = part.partition(":")
        nets = list(load_model(name, model_dir, dataset).members)  # type: ignore[arg-type]
        if index and (not index.isdigit() or int(index) >= len(nets)):
            raise click.BadParameter(f"{part!r}: {name} has {len(nets)} members, from 0", param_hint="--ensembles")
        members += [nets[int(index)]] if index else nets
    return members


def row_of(ensemble: str, attack: str, record: Record) -> dict[str, Any]:
    """Return a row of the table from a record."""
    right = torch.tensor(record["right"], dtype=torch.float64)
    mean, worst = (100 * share.mean().item() for share in (right, right**DRAWS))
    row = {"ensemble": ensemble, "attack": attack, "n": record["n"], "mean": mean, f"worst of {DRAWS}": worst}
    return row | {"passes": passes_of([record])}


@click.command(cls=Benchmark)
@click.option("--ensembles", required=True, help="Comma-separated: model, or model:member+model:member.")
@click.option("--probabilities", help="Comma-separated, of the members.  [default: all the same]")
@click.option("--attacks", default=";".join(ATTACKS), show_default=True, help="Separated by semicolons.")
@image_options("runs/randomized")
def main(
    ensembles: str,
    probabilities: str | None,
    attacks: str,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    chosen = named(attacks, ATTACKS, "--attacks", ";")
    shares = None if probabilities is None else [float(p) for p in probabilities.split(",")]
    rows: list[dict[str, Any]] = []
    for ensemble in ensembles.split(","):
        model = RandomizedEnsemble(members_of(ensemble, model_dir, dataset), shares, seed=seed).eval()
        weights = [model_card(p.partition(":")[0], model_dir, dataset)["sha256"] for p in ensemble.split("+")]
        about = {"dataset": dataset, "ensemble": ensemble, "weights": weights, "probabilities": model.probabilities.tolist()}

        @torch.no_grad()
        def right(images: Tensor, model: RandomizedEnsemble = model) -> dict[str, Any]:
            check_adversarial(x, images, eps=eps)
            right_MN = model.member_logits(images).argmax(-1) == y
            return {"right": [round(p, 6) for p in (model.probabilities @ right_MN.double()).tolist()]}

        for attack in chosen:
            path = out / dataset / f"{ensemble.replace(':', '')}_{attack.replace(',', '').replace(' ', '-')}.json"
            make = partial(ATTACKS[attack], eps=eps, seed=seed)
            told = about | {"attack": attack}
            record = measured(path, model, x, y, make, eps=eps, seed=seed, draws=DRAWS, score=right, about=told)
            rows.append(row_of(ensemble, attack, record))
            click.echo(rows[-1], err=True)
    click.echo(save_table(rows, out / dataset))


if __name__ == "__main__":
    main()
