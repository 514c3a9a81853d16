"""A picture of 'Ensemble everything everywhere': the loss around an image, and what an attack adds to images.

    python -m benchmarks.surfaces --model multiresolution_resnet18_1 --data-dir DIR --out docs/everywhere.png

Above, the cross-entropy of the scores in the plane of two directions, both of signs: that of the gradient of the mean of the
logits, averaged over draws, and a random one; of the defense as it is, with its draws frozen, with the mean of the logits
instead of CrossMax, and with both. Below, images that the transfer from the mean found, how often ten fresh draws are right
on them, and what it added, stretched from [-eps, eps] to the range of grey.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.multiresolution import ABLATION, DRAWS, Mean
from benchmarks.options import Benchmark, image_options
from defenses import load_model
from ensemble_attacks import CrossMaxTransfer, judge
from ensemble_attacks.data import load_dataset
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.guard import guarded

AVERAGED = 20  # draws of the direction of the gradient
COLOURS = 96  # of the picture
REACH = 1.5  # of the surface, in radii


def directions(model: nn.Module, image: Tensor, label: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sign of the loss's mean gradient at an image (C, H, W), by the mean of the logits, and random signs."""
    copies = image.expand(AVERAGED, *image.shape).clone().requires_grad_()
    with guarded(model, seed=seed):
        loss = F.cross_entropy(ask(Mean(model), copies), label.expand(AVERAGED))
        (gradient,) = torch.autograd.grad(loss, copies)
    generator = torch.Generator().manual_seed(seed)
    return gradient.mean(0).sign(), torch.randint(0, 2, image.shape, generator=generator) * 2.0 - 1


@torch.no_grad()
def surface(model: nn.Module, image: Tensor, label: Tensor, plane: tuple[Tensor, Tensor], at: Tensor, seed: int) -> Tensor:
    """Return the cross-entropy (S, S) at an image plus every pair of multiples (S,) of two directions, inside [0, 1]."""
    along, across = (at.view(-1, 1, 1, 1) * direction for direction in plane)
    images = (image + along[:, None] + across[None]).clamp(0, 1).flatten(0, 1)
    with guarded(model, seed=seed):
        losses = [F.cross_entropy(ask(model, part), label.expand(len(part)), reduction="none") for part in images.split(250)]
    return torch.cat(losses).view(len(at), len(at))


def draw_surfaces(figure: Any, losses: dict[str, Tensor], at: Tensor) -> None:
    """Draw a surface for each variant, on axes in radii of the ball."""
    first, second = torch.meshgrid(at, at, indexing="ij")
    for place, (name, loss) in enumerate(losses.items(), 1):
        axes = figure.add_subplot(1, len(losses), place, projection="3d")
        axes.plot_surface(first.numpy(), second.numpy(), loss.numpy(), cmap="viridis", rcount=len(at), ccount=len(at))
        axes.set_title(name, fontsize=9, pad=0)
        axes.tick_params(labelsize=6, pad=-2)
    figure.suptitle("cross-entropy; to the right the sign of the gradient, to the back random signs, in radii", fontsize=9)


def draw_images(figure: Any, x: Tensor, images: Tensor, right: list[float], eps: float) -> None:
    """Draw clean images, adversarial ones, and the difference, one below the other."""
    change = (images - x) / (2 * eps) + 0.5
    axes = figure.subplots(3, len(x), squeeze=False)
    for column, share in enumerate(right):
        for row, shown in enumerate((x, images, change)):
            axes[row, column].imshow(
                shown[column].permute(1, 2, 0).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1
            )
            axes[row, column].set(xticks=[], yticks=[])
        axes[1, column].set_title(f"{DRAWS * share:.0f} of {DRAWS} right", fontsize=7, pad=2)
    for row, name in enumerate(("clean", "adversarial", "added")):
        axes[row, 0].set_ylabel(name, fontsize=8)


@click.command(cls=Benchmark)
@click.option("--model", "name", required=True)
@click.option("--points", default=31, show_default=True, help="Along each direction of a surface.")
@click.option("--steps", default=40, show_default=True, help="Of the transfer.")
@click.option("--eot-iter", default=5, show_default=True, help="Of the transfer.")
@click.option("--images", "first", default=8, show_default=True, help="How many images are shown attacked.")
@image_options("docs/everywhere.png")
def main(
    name: str,
    points: int,
    steps: int,
    eot_iter: int,
    first: int,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    model = load_model(name, model_dir, dataset)
    clean = judge(model, x, y, x, eps=eps, draws=DRAWS)
    sure = torch.nonzero(clean.correct.all(0)).flatten()[:first]
    if not len(sure):
        raise click.UsageError(f"of {len(x)} images, {name} is right on none in all of {DRAWS} draws: raise --n")
    x, y = x[sure], y[sure]
    images = CrossMaxTransfer(model, refine=None, eps=eps, steps=steps, eot_iter=eot_iter, seed=seed)(x, y)
    right = judge(model, x, y, images, eps=eps, draws=DRAWS).correct.double().mean(0).tolist()
    multiples = torch.linspace(-REACH, REACH, points)
    plane = directions(model, x[0], y[:1], seed)
    losses = {}
    for variant, changed in ABLATION.items():
        net = changed.of(load_model(name, model_dir, dataset), seed)
        losses[variant] = surface(net, x[0], y[:1], plane, eps * multiples, seed)
    with style.context("tableau-colorblind10"):
        whole = Figure(figsize=(10, 5.6), layout="constrained")
        parts: Any = whole.subfigures(2, 1, height_ratios=(1, 1.05))
        draw_surfaces(parts[0], losses, multiples)
        draw_images(parts[1], x, images, right, eps)
        whole.savefig(drawn := BytesIO(), dpi=90)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(out, optimize=True)
    click.echo(f"{out}: after the attack, {100 * fmean(right):.0f}% of the draws are right")


if __name__ == "__main__":
    main()
