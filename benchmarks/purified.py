"""A purifying front end: what attacks leave, by how many draws of each step they see, and by how many they are judged.

    python benchmarks/purified.py --model purified_convnet_1 --dataset digits --eps 0.1

The model draws noise in every forward pass, so an attack that looks once sees one draw, and an image that fools one draw
need not fool the next. Each attack makes 100 steps, each the mean of so many draws: EOTAPGD through the purifier; the same
past it (BPDA); the same on the backbone alone, kept where it fools the whole (transfer). AutoAttack's rand takes its own 20.
All are judged by 100 fresh draws: *mean* is the share of right ones, *right in all of 10* the expected share of images that
ten draws get right. Goes on where it stopped: every attack has a record, with each image's share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.options import Benchmark, file_name, image_options
from benchmarks.records import Record, measured, passes_of
from benchmarks.tables import save_table
from defenses import load_model, model_card
from ensemble_attacks import EOTAPGD, BPDAIdentity, CrossMaxTransfer
from ensemble_attacks.data import load_dataset
from ensemble_attacks.hosts.original import run_autoattack
from ensemble_attacks.models.parts import premise

JUDGED = 100  # draws
WORST_OF = 10
RAND = 20  # draws of AutoAttack's rand


def nothing(model: nn.Module, backbone: nn.Module, looks: int, **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: x


def through(model: nn.Module, backbone: nn.Module, looks: int, **settings: Any) -> Any:
    return EOTAPGD(model, eot_iter=looks, **settings)


def past(model: nn.Module, backbone: nn.Module, looks: int, **settings: Any) -> Any:
    return BPDAIdentity(model, EOTAPGD, eot_iter=looks, **settings)


def from_backbone(model: nn.Module, backbone: nn.Module, looks: int, **settings: Any) -> Any:
    return CrossMaxTransfer(model, surrogate=backbone, refine=None, eot_iter=looks, **settings)


def rand(model: nn.Module, backbone: nn.Module, looks: int, *, eps: float, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        return run_autoattack(model, x, y, eps=eps, norm="Linf", seed=seed, batch_size=len(x), version="rand")[0]

    return attack


def record_name(model: str, attack: str, looks: int) -> str:
    return file_name(f"{model}_{attack}_{looks}.json".replace(" ", "-")).lower()


ATTACKS: dict[str, Callable[..., Any]] = {"EOTAPGD": through, "BPDA": past, "transfer": from_backbone}


def row_of(record: Record) -> dict[str, Any]:
    """Return a row of the table from a record."""
    right = torch.tensor(record["right"], dtype=torch.float64)
    mean, worst = (100 * share.mean().item() for share in (right, right**WORST_OF))
    row = {"attack": record["attack"], "draws of a step": record["looks"], "n": record["n"], "mean": mean}
    return row | {f"right in all of {WORST_OF}": worst, "passes": passes_of([record])}


@click.command(cls=Benchmark)
@click.option("--model", "name", required=True, help="Purifiers before backbones; the first of them is attacked.")
@click.option("--looks", default="1,5,20", show_default=True, help="Draws of a step.")
@image_options("runs/purified")
def main(
    name: str, looks: str, model_dir: str | None, dataset: str, data_dir: str, eps: float, n: int, seed: int, out: Path
) -> None:
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    model: Any = load_model(name, model_dir, dataset).members[0]
    figures: Any = premise(model, "frontend", x, y)
    click.echo(f"gradients with the purifier and past it: cosine {figures['gradient_cosine']:.2f}")
    weights = model_card(name, model_dir, dataset)["sha256"]

    rows: list[dict[str, Any]] = []
    chosen = [(attack, make, int(count)) for attack, make in ATTACKS.items() for count in looks.split(",")]
    for attack, make, count in [("none", nothing, 0), *chosen, ("AutoAttack rand", rand, RAND)]:
        path = out / record_name(name, attack, count)
        about = {"model": name, "dataset": dataset, "weights": weights, "attack": attack, "looks": count, "draws": JUDGED}
        started = partial(make, backbone=model.backbone, looks=count, eps=eps, seed=seed)
        record = measured(path, model, x, y, started, eps=eps, seed=seed, draws=JUDGED, about=about)
        rows.append(row_of(record))
        click.echo(rows[-1], err=True)
    click.echo(save_table(rows, out / file_name(f"{name}_{dataset}")))


if __name__ == "__main__":
    main()
