"""AutoAttack's pipeline: the original against ours, which has to say the same, and against version="ensemble".

    python benchmarks/pipeline.py --models gal_resnet20_3:voting:0.01,linear::0.01,example::0.0078 --data-dir DIR --n 100

``linear`` is a least-squares classifier of the training images, ``example`` the CIFAR-10 network in pyautoattack's wheel,
which is not robust: at 2/255 a few images in a hundred hold out. Robust samples (%), passes (forward + backward) per image,
and samples on which the original and ours disagree.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.options import Benchmark, data_option, named
from benchmarks.tables import save_table
from ensemble_attacks import AutoAttack, judge
from ensemble_attacks.data import DATASETS, load_dataset
from ensemble_attacks.hosts.original import run_autoattack
from ensemble_attacks.models.passes import CountingModel, count_passes
from ensemble_attacks.models.providers import load_model
from ensemble_attacks.models.twins import prepare
from ensemble_attacks.threat import number

RUNS = ("original", "standard", "ensemble", "adaptive")


def example_network() -> nn.Module:
    package = importlib.util.find_spec("pyautoattack")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "examples"
    spec = importlib.util.spec_from_file_location("example_resnet", folder / "resnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.ResNet18()
    net.load_state_dict(torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True))
    return net.eval()


def linear_network(dataset: str, data_dir: str) -> nn.Module:
    x, y = load_dataset(dataset, "train", data_dir=data_dir)
    inputs = torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1).double()
    targets = nn.functional.one_hot(y, DATASETS[dataset].classes).double()
    ridge = inputs.T @ inputs + torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(ridge, inputs.T @ targets).float()
    layer = nn.Linear(inputs.shape[1] - 1, DATASETS[dataset].classes)
    layer.load_state_dict({"weight": weights[:-1].T, "bias": weights[-1]})
    return nn.Sequential(nn.Flatten(), layer).eval()


def run(version: str, model: CountingModel, x: Tensor, y: Tensor, eps: float, batch_size: int) -> tuple[Tensor, Tensor]:
    if version == "original":
        images, flags = run_autoattack(model, x, y, eps=eps, seed=0, batch_size=batch_size)
        return images, flags["square"]
    adversary = AutoAttack(model, eps=eps, seed=0, version=version, verbose=False)
    found = adversary.run_standard_evaluation(x, y, bs=batch_size)
    assert isinstance(found, Tensor)
    return found, adversary.robust


@click.command(cls=Benchmark)
@click.option("--models", required=True, help="Comma-separated model:vote:eps.")
@click.option("--model-dir")
@data_option()
@click.option("--data-dir", default="data", show_default=True)
@click.option("--n", default=100, show_default=True, help="Test images.")
@click.option("--batch-size", default=100, show_default=True)
@click.option("--runs", default="original,standard,ensemble", show_default=True, help="Of " + ", ".join(RUNS) + ".")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/pipeline"), show_default=True)
def main(
    models: str, model_dir: str | None, dataset: str, data_dir: str, n: int, batch_size: int, runs: str, out: Path
) -> None:
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    if wrong := [cell for cell in models.split(",") if cell.count(":") < 2]:
        raise click.BadParameter(f"{wrong[0]!r}: as in gal_resnet20_3:voting:0.01", param_hint="--models")
    versions = named(runs, RUNS, "--runs")
    rows: list[dict[str, Any]] = []
    for cell in models.split(","):
        name, vote, radius = cell.rsplit(":", 2)
        eps = number(radius)
        if name == "example":
            model = example_network()
        elif name == "linear":
            model = linear_network(dataset, data_dir)
        else:
            model = load_model(name, model_dir, dataset, vote=vote or "softmax")
        twin = prepare(model, x[:8])
        row: dict[str, Any] = {"model": name, "vote": vote, "eps": eps, "n": n}
        robust: dict[str, Tensor] = {}
        for version in versions:
            row[version] = row[f"{version} passes"] = None
            if version == "ensemble" and not hasattr(model, "member_logits"):
                continue
            counted = count_passes(twin)
            images, robust[version] = run(version, counted, x, y, eps, batch_size)
            row[version] = 100 * judge(model, x, y, images, eps=eps).accuracy
            row[f"{version} passes"] = (counted.forwards + counted.backwards) / n
            click.echo(f"{cell} {version}: {row[version]:.1f}", err=True)
        if {"original", "standard"} <= set(robust):
            row["they disagree on"] = int((robust["original"] != robust["standard"]).sum())
        rows.append(row)
        table = save_table(rows, out / "pipeline")
    click.echo(table)


if __name__ == "__main__":
    main()
