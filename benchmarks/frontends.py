"""Front ends: AutoAttack against BPDA, on one network and on a randomized ensemble of them.

    python benchmarks/frontends.py --model frontend_convnet_3 --dataset digits --eps 0.1

The randomized ensemble draws one of the members for every image. Boytsov et al. (arXiv:2402.17018) report, for an
adversarially trained backbone on CIFAR-10, Linf 8/255: full AutoAttack 90.8 +- 2.5, adaptive attack 18.2 +- 3.6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from benchmarks.options import file_name, image_options, members_of
from benchmarks.tables import save_table
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.models.parts import premise
from ensemble_attacks.models.passes import passes_per_image

SINGLE = ("autoattack", "bpda", "front-end-reversal")
RANDOM = ("autoattack", "autoattack-rand", "eot-apgd", "mora", "bpda", "bpda-mora")


def tell(attack: str, row: dict[str, Any]) -> None:
    click.echo(f"{attack}: {100 * row['accuracy']:.1f}", err=True)


@click.command()
@click.option("--model", "name", required=True, help="An ensemble of front-ended networks.")
@click.option("--draws", default=10, show_default=True, help="By which the judge decides on the randomized ensemble.")
@click.option("--eot-iter", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@image_options("runs/frontends")
def main(
    name: str,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    draws: int,
    eot_iter: int,
    device: str,
    seed: int,
    out: Path,
) -> None:
    x, y = (part.to(device) for part in load_dataset(dataset, data_dir=data_dir, n=n))
    members = [member.to(device) for member in members_of(name, model_dir, dataset, "--model")]
    cells: dict[str, tuple[Any, tuple[str, ...], Settings]] = {
        "one network": (members[0], SINGLE, Settings(eps, seed=seed)),
        "randomized": (
            RandomizedEnsemble(members, seed=seed).eval(),
            RANDOM,
            Settings(eps, seed=seed, draws=draws, eot_iter=eot_iter),
        ),
    }
    figures: Any = premise(members[0], "frontend", x, y)
    click.echo(f"gradients with the front end and past it: cosine {figures['gradient_cosine']:.2f}")
    rows: list[dict[str, Any]] = []
    for kind, (model, attacks, settings) in cells.items():
        summary = evaluate(model, x, y, attacks, settings, report=tell)
        for attack, row in {"clean": summary["clean"], **summary["attacks"], "worst case": summary["worst_case"]}.items():
            low, high = (100 * bound for bound in row["interval"])
            passes = passes_per_image(row) if "forwards_per_image" in row else None
            rows.append({"model": kind, "attack": attack, "robust": 100 * row["accuracy"], "low": low, "high": high})
            rows[-1]["passes / image"] = passes
    click.echo(save_table(rows, out / f"{file_name(name)}_{file_name(dataset)}"))


if __name__ == "__main__":
    main()
