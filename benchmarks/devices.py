"""The same attacks on a CPU and on another device: how many images end otherwise.

    python benchmarks/devices.py --device cuda --data-dir DIR

Both craft and are judged in float32, the device with and without TF32, and by those passes that are quickest (`quickest`),
on a GPU recorded ones. Prints, for every model, vote and attack, the robust images on each, and on how many of them the two
differ: rounding lets a few descents end elsewhere.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.options import EPS as RADIUS
from benchmarks.options import Benchmark, data_option, file_name
from benchmarks.tables import save_table
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.runner import attack
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.models.providers import load_model
from ensemble_attacks.models.tuning import quickest
from ensemble_attacks.models.twins import prepare
from ensemble_attacks.models.votes import VOTES

ATTACKS = "mora,mora-mt,pgd,cw,ea-apgd-ce,ea-apgd-t,a3,apgd-ce,apgd-t"
MODELS = "standard_convnet_3,gal_convnet_3,trs_convnet_3,dverge_convnet_3"
EPS = {"digits": 0.12, "cifar10": 0.01}


def flags(
    model: Any, x: Tensor, y: Tensor, name: str, settings: Settings, device: str, tune: bool = False
) -> tuple[Tensor, float, int]:
    """Robust (N,), seconds and passes of an attack on a device."""
    model = model.to(device)
    twin = prepare(model, x[:8].to(device))
    if tune:
        twin = quickest(twin, x[: settings.batch_size].to(device), passes=1)
    began = time.perf_counter()
    done = attack(model, twin, x, y, name, settings)
    return done.judgement.robust, time.perf_counter() - began, done.forwards + done.backwards


@click.command(cls=Benchmark)
@click.option("--models", default=MODELS, show_default=True)
@click.option("--attacks", default=ATTACKS, show_default=True)
@data_option("digits")
@click.option("--eps", type=RADIUS, help="Linf radius.  [default: 0.12 of digits, 0.01]")
@click.option("--data-dir", default="data", show_default=True)
@click.option("--n", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/devices"), show_default=True)
def main(
    models: str, attacks: str, dataset: str, eps: float | None, data_dir: str, n: int, seed: int, device: str, out: Path
) -> None:
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    settings = Settings(eps or EPS.get(dataset, EPS["cifar10"]), seed=seed)
    rows = []
    for name, vote, chosen in product(models.split(","), VOTES, attacks.split(",")):
        here, seconds, passes = flags(load_model(name, dataset=dataset, vote=vote), x, y, chosen, settings, "cpu")
        row: dict[str, Any] = {"model": name, "vote": vote, "attack": chosen, "n": n, "cpu": int(here.sum())}
        row |= {"cpu seconds": round(seconds, 1), "cpu passes": passes}
        for label, tf32, tune in (("", False, False), (" tf32", True, False), (" tuned", False, True)):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            model = load_model(name, dataset=dataset, vote=vote)
            there, seconds, passes = flags(model, x, y, chosen, settings, device, tune)
            row |= {f"{device}{label}": int(there.sum()), f"differ{label}": int((there != here).sum())}
            row |= {f"seconds{label}": round(seconds, 1), f"passes{label}": passes}
        rows.append(row)
        click.echo(row, err=True)
    click.echo(save_table(rows, out / f"{file_name(dataset)}_{torch.device(device).type}"))


if __name__ == "__main__":
    main()
