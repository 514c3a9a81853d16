"""Define the command ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ensemble_attacks.cli import choices
from ensemble_attacks.cli.options import RECRAFTED


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--model", help="As of evaluate.  [default: the run's]", shell_complete=choices.models)
@click.option("--model-dir", help="Where trained models lie, if not among those that ship.")
@click.option("--vote", help="softmax, voting or logits.  [default: the bundle's, or softmax]")
@click.option("--data", "--dataset", "dataset", help="As of evaluate.  [default: the bundle's, or the run's]")
@click.option("--transform", help="Of a bundle: as of evaluate.  [default: its run's]")
@click.option("--data-dir", help="The folder that holds cifar-10-batches-py.  [default: the run's, or data]")
@click.option("--norm", help="Linf or L2.  [default: the bundle's, or Linf]")
@click.option("--eps", help="In the inputs' own units, such as 8/255.  [default: the bundle's]")
@click.option("--draws", type=int, help="Forward passes of each image, of a random model.  [default: the bundle's, or 1]")
@click.option("--recraft", type=int, help=f"Units to craft anew, and compare.  [default: 0; of a bundle {RECRAFTED}]")
@click.option("--seed", type=int, default=0, help="Of the choice of these units.")
@click.option("--report", type=click.Path(path_type=Path), help="Of a run: its report.  [default: report, in the run's]")
@click.option("--bundle", type=click.Path(path_type=Path), help="Of a run: a bundle that it was exported as.")
@click.option("--device", default="cpu")
def verify(
    path: Path,
    model: str | None,
    dataset: str | None,
    model_dir: str | None,
    data_dir: str | None,
    recraft: int | None,
    seed: int,
    report: Path | None,
    bundle: Path | None,
    device: str,
    **claimed: Any,
) -> None:
    """Compute anew, from stored images, the model and the data alone, what a run or a bundle says.

    PATH is a run's folder, or an external evaluation, ours or anybody's (a folder, or a .pt file of images). Prints a line
    for each thing that differs, and what nobody can verify; exits with 1 where anything differs. Writes nothing.
    """
    from ensemble_attacks.cli.verification import verify_path

    named = {"model": model, "dataset": dataset, "model_dir": model_dir, "data_dir": data_dir}
    verify_path(path, named, claimed, recraft=recraft, seed=seed, report=report, bundle=bundle, device=device)
