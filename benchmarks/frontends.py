"""Front ends: AutoAttack against BPDA, on one network and on a randomized ensemble of them.

    python benchmarks/frontends.py --model frontend_convnet_3 --dataset digits --eps 0.1

The randomized ensemble draws one of the members for every image. Boytsov et al. (arXiv:2402.17018) report, for an
adversarially trained backbone on CIFAR-10, Linf 8/255: full AutoAttack 90.8 +- 2.5, adaptive attack 18.2 +- 3.6. Goes on
where it stopped: every attack has a record (see `cells`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from benchmarks.cells import run_attack, stored, summary
from benchmarks.options import Benchmark, file_name, image_options, members_of, weights_of
from benchmarks.tables import save_table
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.models.parts import premise
from ensemble_attacks.models.passes import passes_per_image

ONE, DRAWN = "one network", "randomized"
KINDS: dict[str, tuple[str, ...]] = {
    ONE: ("autoattack", "bpda", "front-end-reversal"),
    DRAWN: ("autoattack", "autoattack-rand", "eot-apgd", "mora", "bpda", "bpda-mora"),
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each record in a folder, below that of the clean images."""
    rows: list[dict[str, Any]] = []
    for kind, attacks in KINDS.items():
        places = {attack: folder / file_name(f"{kind}_{attack}") for attack in attacks}
        done = {attack: summary(place) for attack, place in places.items() if (place / "summary.json").exists()}
        for attack, found in done.items():
            if not rows or rows[-1]["model"] != kind:
                rows.append(_row(kind, "clean", found["n"], found["clean"]))
            rows.append(_row(kind, attack, found["n"], found["attacks"][attack]))
    return rows


def _row(kind: str, attack: str, n: int, found: dict[str, Any]) -> dict[str, Any]:
    low, high = (100 * bound for bound in found["interval"])
    row = {"model": kind, "attack": attack, "n": n, "robust": 100 * found["accuracy"], "low": low, "high": high}
    return row | {"passes / image": None if attack == "clean" else passes_per_image(found)}


@click.command(cls=Benchmark)
@click.option("--model", "name", required=True, help="An ensemble of front-ended networks.")
@click.option("--draws", default=10, show_default=True, help="By which the judge decides on the randomized ensemble.")
@click.option("--eot-iter", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
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
    table_only: bool,
    seed: int,
    out: Path,
) -> None:
    folder = out / f"{file_name(name)}_{file_name(dataset)}"
    if not table_only:
        x, y = (part.to(device) for part in load_dataset(dataset, data_dir=data_dir, n=n))
        members = [member.to(device) for member in members_of(name, model_dir, dataset, "--model")]
        figures: Any = premise(members[0], "frontend", x, y)
        click.echo(f"gradients with the front end and past it: cosine {figures['gradient_cosine']:.2f}", err=True)
        about = {"model": name, "dataset": dataset, "weights": weights_of(name, model_dir, dataset)}
        settings = {ONE: Settings(eps, seed=seed), DRAWN: Settings(eps, seed=seed, draws=draws, eot_iter=eot_iter)}
        for kind, attack in ((kind, attack) for kind, attacks in KINDS.items() for attack in attacks):
            where, own = folder / file_name(f"{kind}_{attack}"), settings[kind]
            if (where / "summary.json").exists():
                stored(where, **about, n=n, eps=eps, seed=seed, draws=own.draws, eot_iter=own.eot_iter)
                continue
            model = members[0] if kind == ONE else RandomizedEnsemble(members, seed=seed).eval()  # its draws begin anew
            run_attack(where, model, x, y, attack, own, about | {"kind": kind}, told=kind)
    rows = rows_of(folder)
    if not rows:
        raise click.UsageError(f"{folder} holds nothing yet")
    click.echo(save_table(rows, folder))


if __name__ == "__main__":
    main()
