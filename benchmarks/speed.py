"""Ours beside pyautoattack's APGD and torchattacks' PGD: passes, time per image and step, in one process, interleaved.

    python benchmarks/speed.py --data-dir DIR

Same model, images and steps; the ball is so small that nobody is fooled and stops early. Ours crafts on the prepared twin
(`prepare`), as `evaluate` does; and in mixed precision, as ``--amp``
does. Medians over the repetitions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torchattacks
from pyautoattack.autopgd_base import APGDAttack
from tables import save_table
from torch import Tensor

from defenses import load_model
from ensemble_attacks import APGD, MORA, PGD
from ensemble_attacks.data import load_dataset
from ensemble_attacks.passes import count_passes
from ensemble_attacks.prepare import prepare

EPS = 1e-5  # nobody is fooled, so that all do all their steps


@click.command()
@click.option("--model", "name", default="standard_resnet20_3", show_default=True)
@click.option("--model-dir")
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--data-dir", default="data", show_default=True)
@click.option("--n", default=64, show_default=True, help="Images, one batch.")
@click.option("--steps", default=10, show_default=True)
@click.option("--repetitions", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/speed"), show_default=True)
def main(
    name: str,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    n: int,
    steps: int,
    repetitions: int,
    threads: int,
    out: Path,
) -> None:
    torch.set_num_threads(threads)
    model = load_model(name, model_dir, dataset).requires_grad_(False)
    x, _ = load_dataset(dataset, data_dir=data_dir, n=n)
    with torch.no_grad():
        y = model(x).argmax(1)
    twin, mixed = prepare(model, x[:8]), prepare(model, x[:8], amp=True)

    def bare(net: Any) -> Callable[[Any, Tensor, Tensor], object]:
        def run(_: Any, images: Tensor, labels: Tensor) -> None:
            for _step in range(steps):
                at = images.clone().requires_grad_()
                torch.autograd.grad(torch.nn.functional.cross_entropy(net(at), labels), at)

        return run

    settings: dict[str, Any] = dict(eps=EPS, steps=steps)
    quiet = dict(norm="Linf", eps=EPS, seed=0, device="cpu", n_restarts=1, n_iter=steps)
    contestants: dict[str, tuple[Any, Callable[[Any, Tensor, Tensor], object]]] = {
        "bare passes": (model, bare(model)),
        "bare passes, prepared": (twin, bare(twin)),
        "bare passes, prepared, amp": (mixed, bare(mixed)),
        "torchattacks PGD": (model, lambda net, *xy: torchattacks.PGD(net, eps=EPS, alpha=EPS / 4, steps=steps)(*xy)),
        "pyautoattack APGD": (model, lambda net, *xy: APGDAttack(net, **quiet).perturb(*xy)),
        "our PGD": (twin, lambda net, *xy: PGD(net, n_restarts=1, **settings)(*xy)),
        "our APGD": (twin, lambda net, *xy: APGD(net, **settings)(*xy)),
        "our MORA, one beta": (twin, lambda net, *xy: MORA(net, betas=(0.5,), aimed=False, **settings)(*xy)),
        "our APGD, amp": (mixed, lambda net, *xy: APGD(net, **settings)(*xy)),
        "our MORA, one beta, amp": (mixed, lambda net, *xy: MORA(net, betas=(0.5,), aimed=False, **settings)(*xy)),
    }
    seconds: dict[str, list[float]] = {key: [] for key in contestants}
    for repetition in range(repetitions + 1):
        for key, (net, attack) in contestants.items():
            began = time.perf_counter()
            attack(net, x, y)
            if repetition:  # the first one warms up
                seconds[key].append(time.perf_counter() - began)
    rows = []
    for key, (net, attack) in contestants.items():
        counted = count_passes(net)
        if not key.startswith("bare"):
            attack(counted, x, y)
        passes = (counted.forwards + counted.backwards) / n if counted.forwards else 2.0 * steps
        median = statistics.median(seconds[key])
        rows.append({"attack": key, "passes / image": passes, "ms / image and step": 1000 * median / n / steps})
    slowest = {row["attack"]: row["ms / image and step"] for row in rows}
    for row in rows:
        row["of pyautoattack's APGD"] = f"{row['ms / image and step'] / slowest['pyautoattack APGD']:.2f}"
        row["of torchattacks' PGD"] = f"{row['ms / image and step'] / slowest['torchattacks PGD']:.2f}"
        row["ms / image and step"] = f"{row['ms / image and step']:.2f}"
    click.echo(f"{name}, {n} images, {steps} steps, {threads} threads, median of {repetitions}\n")
    click.echo(save_table(rows, out / "speed"))


if __name__ == "__main__":
    main()
