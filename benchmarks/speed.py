"""Ours beside pyautoattack's APGD and torchattacks' PGD: passes, time per image and step, in one process, interleaved.

    python benchmarks/speed.py --models resnet20*3,resnet20*8,timm/resnet50,timm/vit_tiny_patch16_224

A model is an architecture of this package and a number of members, or one of timm's; untrained, which costs the same, on
noise, in a ball so small that nobody is fooled and stops early. Ours crafts on the prepared twin (`prepare`), as `evaluate`
does, and in mixed precision, as ``--amp`` does; on a GPU also by recorded passes, as ``--tune`` does. Medians over the
repetitions; the overhead is the time of an attack over that of as many bare passes on the same twin.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import timm
import torch
import torchattacks
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from benchmarks.tables import save_table
from defenses.architectures import ARCHITECTURES
from defenses.zoo.cards import make_ensemble
from ensemble_attacks import APGD, MORA, PGD
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.tuning import quickest
from ensemble_attacks.models.twins import prepare

EPS = 1e-5  # nobody is fooled, so that all do all their steps
BARE, PREPARED, MIXED = "bare passes", "bare passes, prepared", "bare passes, prepared, amp"
TUNED = "bare passes, prepared, tuned"
PEERS = ("pyautoattack APGD", "torchattacks PGD")
Attack = Callable[[Any, Tensor, Tensor], object]


def untrained(name: str) -> tuple[nn.Module, int]:
    """A model and the side of its images."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        net = timm.create_model(name.removeprefix("timm/"), pretrained=False, num_classes=10)
        return net.eval(), net.default_cfg["input_size"][-1]
    architecture, _, members = name.partition("*")
    if architecture not in ARCHITECTURES or architecture == "convnet" or not members.isdigit():
        raise click.BadParameter(f"{name!r}: as in resnet20*3 or timm/resnet50", param_hint="--models")
    return make_ensemble(architecture, int(members)).eval(), 32


def bare(steps: int, model: Any, x: Tensor, y: Tensor) -> None:
    for _ in range(steps):
        at = x.clone().requires_grad_()
        torch.autograd.grad(nn.functional.cross_entropy(model(at), y), at)


def waited(device: str) -> float:
    """The time, when the device has done all that it was told to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, n: int, steps: int, repetitions: int, device: str) -> list[dict[str, Any]]:
    model, side = untrained(name)
    model.requires_grad_(False).to(device)
    x = torch.rand(n, 3, side, side).to(device)
    with torch.no_grad():
        y = model(x).argmax(1)
    nets = {BARE: model, PREPARED: prepare(model, x[:2]), MIXED: prepare(model, x[:2], amp=True)}
    if x.is_cuda:
        nets[TUNED] = quickest(nets[PREPARED], x, steps)
    passes = partial(bare, steps)
    quiet = dict(norm="Linf", eps=EPS, seed=0, device=device, n_restarts=1, n_iter=steps)
    settings: dict[str, Any] = dict(eps=EPS, steps=steps)
    ours: dict[str, Attack] = {
        "APGD": lambda net, *xy: APGD(net, **settings)(*xy),
        "PGD": lambda net, *xy: PGD(net, n_restarts=1, **settings)(*xy),
    }
    if hasattr(model, "member_logits"):
        ours["MORA, one beta"] = lambda net, *xy: MORA(net, betas=(0.5,), aimed=False, **settings)(*xy)
    contestants: dict[str, tuple[str, nn.Module, Attack]] = {
        **{key: (key, net, passes) for key, net in nets.items()},
        "torchattacks PGD": (
            BARE,
            model,
            lambda net, *xy: torchattacks.PGD(net, eps=EPS, alpha=EPS / 4, steps=steps)(*xy),
        ),
        "pyautoattack APGD": (BARE, model, lambda net, *xy: APGDAttack(net, **quiet).perturb(*xy)),
        **{f"our {key}": (PREPARED, nets[PREPARED], run) for key, run in ours.items()},
        **{f"our {key}, amp": (MIXED, nets[MIXED], run) for key, run in ours.items()},
        **{f"our {key}, tuned": (TUNED, nets[TUNED], run) for key, run in ours.items() if TUNED in nets},
    }
    seconds: dict[str, list[float]] = {key: [] for key in contestants}
    for repetition in range(repetitions + 1):
        for key, (_, net, attack) in contestants.items():
            began = waited(device)
            attack(net, x, y)
            if repetition:  # the first one warms up
                seconds[key].append(waited(device) - began)
    cost = {key: 1000 * statistics.median(times) / n / steps for key, times in seconds.items()}
    rows = []
    for key, (base, net, attack) in contestants.items():
        counted = count_passes(net)
        attack(counted, x, y)
        spent = (counted.forwards + counted.backwards) / n
        row = {"model": name, "attack": key, "passes / image": spent, "ms / image and step": cost[key]}
        row["overhead"] = f"{cost[key] / cost[base] * 2 * steps / spent:.2f}"
        rows.append(row | {f"of {peer}": f"{cost[key] / cost[peer]:.2f}" for peer in PEERS})
    return rows


@click.command()
@click.option("--models", default="resnet20*3,resnet20*8", show_default=True, help="Comma-separated.")
@click.option("--n", default=64, show_default=True, help="Images, one batch.")
@click.option("--steps", default=10, show_default=True)
@click.option("--repetitions", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/speed"), show_default=True)
def main(models: str, n: int, steps: int, repetitions: int, threads: int, device: str, out: Path) -> None:
    torch.set_num_threads(threads)
    rows = [row for name in models.split(",") for row in measure(name, n, steps, repetitions, device)]
    where = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else f"{threads} threads"
    click.echo(f"{n} images, {steps} steps, {where}, median of {repetitions}\n")
    click.echo(save_table(rows, out / "speed"))


if __name__ == "__main__":
    main()
