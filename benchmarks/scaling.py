"""How the cost of an attack grows: with images, members, draws, classes and image size, from a fit of log cost on log size.

    python benchmarks/scaling.py

MORA (with draws: EOTAPGD) on untrained networks, whose arithmetic is the same, in a ball so small that nobody is fooled and
stops early. An exponent of 1 is linear; image size is counted in pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.options import Benchmark, named
from benchmarks.tables import save_table
from defenses.zoo.cards import make_ensemble
from ensemble_attacks import EOTAPGD, MORA
from ensemble_attacks.models.twins import prepare

EPS = 1e-5
SIZES: dict[str, tuple[int, ...]] = {
    "images": (16, 64, 256, 1024),
    "members": (1, 2, 4, 8, 16),
    "draws": (1, 4, 16, 64),
    "classes": (10, 100, 1000),
    "pixels": (32 * 32, 64 * 64, 128 * 128, 224 * 224),
}


class Noisy(nn.Module):
    """A network whose input is noisy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 1e-3 * torch.randn_like(x))


def prepared(what: str, size: int, steps: int) -> Callable[[], object]:
    """The attack to time, where one of the sizes differs from 16 images of 32 x 32 pixels, 10 classes and 2 members."""
    images = {"images": size, "pixels": 4, "draws": 2}.get(what, 16)
    side = round((size if what == "pixels" else 1024) ** 0.5)
    options: dict[str, Any] = {"num_classes": size} if what == "classes" else {}
    model = make_ensemble("resnet20", size if what == "members" else 2, **options).eval()
    x = torch.rand(images, 3, side, side)
    twin: Any = prepare(model, x[:2])
    with torch.no_grad():
        y = torch.cat([twin(part).argmax(1) for part in x.split(64)])
    if what == "draws":
        return lambda: EOTAPGD(Noisy(twin), eps=EPS, steps=steps, eot_iter=size, batch_size=64)(x, y)
    return lambda: MORA(twin, eps=EPS, steps=steps, betas=(0.5,), aimed=False, batch_size=64)(x, y)


def seconds(run: Callable[[], object], repetitions: int) -> float:
    """The median, after a first run."""
    times = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@click.command(cls=Benchmark)
@click.option("--what", default=",".join(SIZES), show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--repetitions", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/scaling"), show_default=True)
def main(what: str, steps: int, repetitions: int, out: Path) -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in named(what, SIZES, "--what"):
        sizes = SIZES[name]
        cost = [seconds(prepared(name, size, steps), repetitions) for size in sizes]
        exponent = np.polyfit(np.log(sizes), np.log(cost), 1)[0]
        spent = " / ".join(f"{value:.2f}" for value in cost)
        rows.append({"of": name, "sizes": " / ".join(map(str, sizes)), "seconds": spent, "exponent": f"{exponent:.2f}"})
        click.echo(rows[-1], err=True)
    click.echo(save_table(rows, out / "scaling"))


if __name__ == "__main__":
    main()
