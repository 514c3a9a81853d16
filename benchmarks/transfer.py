"""How far adversarial examples carry from one member of an ensemble to another, and how far their gradients agree.

    python benchmarks/transfer.py --model dverge_resnet20_3 --dataset cifar10 --data-dir DIR --out runs/transfer

For every member, PGD (torchattacks) on that member alone, at the test images that all members classify rightly; then the
share (%) of these images that each member gets wrong. The diagonal is the attack's own success; what a diversity-promoting
defense lowers is the rest. The cosine is that of the members' input gradients of cross-entropy, on the clean images, mean
over pairs and images.

And what carries over from all others: PGD on the mean probability of the members but one, and the share of its images that
this one gets wrong. Boytsov et al. (arXiv:2402.17018) find that members of one architecture are fooled so, others are not.

Prints the matrix as Markdown; keeps it as Markdown, JSON, CSV and heat map.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.options import EPS, Benchmark, data_option, file_name
from benchmarks.tables import save_table
from defenses import list_models, model_card
from defenses.training import pair_cosines
from ensemble_attacks.data import DATASETS, load_dataset
from ensemble_attacks.diagnostics.transfer import crafted_on, draw_transfer, fooled, right_for_all, transfer_matrix
from ensemble_attacks.evaluation.identity import code_version
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.providers import load_model


def gradient_cosine(members: nn.ModuleList, x: Tensor, y: Tensor) -> float:
    """Mean cosine of the members' input gradients of cross-entropy, over pairs and images."""
    x = x.clone().requires_grad_()
    gradients = [torch.autograd.grad(F.cross_entropy(member(x), y, reduction="sum"), x)[0] for member in members]
    return pair_cosines(torch.stack(gradients)).mean().item()


def from_others(members: nn.ModuleList, x: Tensor, y: Tensor, *, eps: float, steps: int) -> list[float]:
    """For each member, the share (%) of images crafted on the mean probability of all others that it gets wrong."""
    shares = []
    for index, left_out in enumerate(members):
        others = Ensemble([*members[:index], *members[index + 1 :]]).eval()
        crafted = crafted_on(others, x, y, eps=eps, steps=steps)
        shares.append(100 * fooled(left_out, crafted, y).double().mean().item())
    return shares


@click.command(cls=Benchmark)
@click.option("--model", required=True)
@click.option("--model-dir")
@data_option()
@click.option("--data-dir", default="data", show_default=True)
@click.option("--eps", type=EPS, default=0.03, show_default=True, help="Linf radius in pixel units of [0, 1].")
@click.option("--steps", default=50, show_default=True, help="Of PGD, each eps / 4.")
@click.option("--n", default=500, show_default=True, help="Test images.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/transfer"), show_default=True)
def main(
    model: str, model_dir: str | None, dataset: str, data_dir: str, eps: float, steps: int, n: int, seed: int, out: Path
) -> None:
    torch.manual_seed(seed)
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    ensemble = load_model(model, model_dir, dataset)
    if not isinstance(ensemble, Ensemble):
        raise click.BadParameter(f"{model!r} is no ensemble of several networks", param_hint="--model")
    right = right_for_all(list(ensemble.members), x, y)
    x, y = x[right], y[right]
    matrix = transfer_matrix(ensemble.members, x, y, eps=eps, steps=steps)
    apart = matrix[~torch.eye(len(matrix), dtype=torch.bool)].mean().item()
    cosine = gradient_cosine(ensemble.members, x, y)
    others = from_others(ensemble.members, x, y, eps=eps, steps=steps)

    rows = [
        {"crafted on": i, **{f"member {j}": share for j, share in enumerate(row)}} for i, row in enumerate(matrix.tolist())
    ]
    click.echo(f"{model}, {dataset}: Linf {eps:g}, PGD-{steps}, the {len(x)} of {n} images that all members get right\n")
    click.echo(save_table(rows, out / file_name(model)))
    from_all = sum(others) / len(others)
    click.echo(f"between members: {apart:.1f}%; from all others to one: {from_all:.1f}%; gradient cosine: {cosine:.3f}")
    summary = {"model": model, "dataset": dataset, "eps": eps, "steps": steps, "n": n, "seed": seed, "images": len(x)}
    summary |= {"transfer": apart, "cosine": cosine, "from others": from_all, "from others to each": others}
    summary |= {"own": matrix.diagonal().mean().item(), "code": code_version()}
    if dataset in DATASETS and model in list_models(dataset, model_dir):
        summary["weights"] = model_card(model, model_dir, dataset)["sha256"]
    (out / f"{file_name(model)}.summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    axes = (figure := Figure(figsize=(4, 3.4), layout="constrained")).subplots()
    draw_transfer(axes, matrix)
    axes.set(title=f"{model}, Linf {eps:g}")
    figure.savefig(out / f"{model}.png", dpi=150)


if __name__ == "__main__":
    main()
