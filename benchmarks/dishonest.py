"""What users see of models that cheat: they answer the judge, or some of the questions, otherwise than the attack.

    python benchmarks/dishonest.py

Each model holds one honest network for digits, and the test images with their labels, by which it can answer rightly
whatever is asked around them: from these memories when its trick says so, from the network otherwise. Prints for each what
`evaluate`, `AutoAttack` and `diagnose` say; the first row is the honest network alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.options import Benchmark, named
from benchmarks.tables import save_table
from defenses import load_model
from ensemble_attacks import AutoAttack
from ensemble_attacks.data import load_dataset
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.errors import reason
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.evaluation.summary import TOLD

ATTACKS = ("apgd-ce", "ea-apgd-ce", "torchattacks:PGD")
SURE = 20.0  # the score of a remembered label


class Dishonest(nn.Module):
    """A network that knows the answers for some images (N, C, H, W), and a trick that says when it gives them.

    Attributes:
        calls: how often it was asked.
        kept: what a trick keeps from one call to the next.
    """

    images: Tensor
    labels: Tensor

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor, trick: Trick) -> None:
        super().__init__()
        self.net, self.trick, self.calls = net, trick, 0
        self.kept: Any = None
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.trick(self, x)

    def remembered(self, x: Tensor) -> Tensor:
        """Return scores that are sure of the label of the nearest image, (N, K); their gradient is there, and zero."""
        nearest = torch.cdist(x.detach().flatten(1).to(self.images), self.images).argmin(1)
        scores = self.net(x)
        return SURE * F.one_hot(self.labels[nearest], scores.shape[1]).to(x) + 0 * scores

    def moved(self, x: Tensor) -> Tensor:
        """Return which images are none of those that it knows, (N, 1) bool."""
        return torch.cdist(x.detach().flatten(1).to(self.images), self.images).amin(1, keepdim=True) > 1e-5


Trick = Callable[[Dishonest, Tensor], Tensor]


def cheats_if(when: Callable[[Dishonest, Tensor], bool]) -> Trick:
    return partial(_cheats_if, when)


def _cheats_if(when: Callable[[Dishonest, Tensor], bool], model: Dishonest, x: Tensor) -> Tensor:
    return model.remembered(x) if when(model, x) else model.net(x)


def judged(model: Dishonest, x: Tensor) -> bool:
    """Tell whether the caller is a judge, by the names of the functions on the stack."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name in ("judge", "verdict"):
            return True
    return False


class Subclass(Tensor):
    """Scores that say of themselves that the remembered label is the largest."""

    told: Tensor

    def argmax(self, *arguments: Any, **keywords: Any) -> Tensor:
        return self.told


def subclassed(model: Dishonest, x: Tensor) -> Tensor:
    scores = model.net(x).as_subclass(Subclass)
    scores.told = model.remembered(x).argmax(1)
    return scores


def not_a_number(model: Dishonest, x: Tensor) -> Tensor:
    return torch.where(model.moved(x), torch.nan, model.net(x))


def right_on_clean(model: Dishonest, x: Tensor) -> Tensor:
    return torch.where(model.moved(x), model.net(x), model.remembered(x))


def cached(model: Dishonest, x: Tensor) -> Tensor:
    """Return the first answer that was given to as many images."""
    model.kept = model.kept or {}
    if len(x) not in model.kept:
        model.kept[len(x)] = model.net(x).detach()
    return model.kept[len(x)]


def seen_before(model: Dishonest, x: Tensor) -> bool:
    """Tell whether exactly these images have been asked about before."""
    key = x.detach().numpy().tobytes()
    model.kept = model.kept or set()
    known = key in model.kept
    model.kept.add(key)
    return known


def always(model: Dishonest, x: Tensor) -> Tensor:
    """Return what it remembers, whoever asks, with the network's gradient, which leads nowhere."""
    return model.remembered(x) + 1e-3 * model.net(x)


TRICKS: dict[str, Trick] = {
    "without gradient": cheats_if(lambda model, x: not x.requires_grad),
    "in a judge's call": cheats_if(judged),
    "on whole batches": cheats_if(lambda model, x: len(x) >= 32),
    "on single images": cheats_if(lambda model, x: len(x) == 1),
    "after 300 calls": cheats_if(lambda model, x: model.calls > 300),
    "every second call": cheats_if(lambda model, x: model.calls % 2 == 0),
    "at random": cheats_if(lambda model, x: bool(torch.rand(()) < 0.5)),
    "in eval mode": cheats_if(lambda model, x: not model.training),
    "in float32": cheats_if(lambda model, x: x.dtype == torch.float32),
    "on memory of its own": cheats_if(lambda model, x: x.is_contiguous()),
    "on what it has seen": cheats_if(seen_before),
    "on clean images": right_on_clean,
    "NaN on moved images": not_a_number,
    "answers from a cache": cached,
    "a subclass's argmax": subclassed,
    "always": always,
}


def of_evaluate(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[float, str]:
    """Return the worst case in percent, and what `evaluate` says beside it."""
    with logged() as warnings:
        summary = evaluate(model, x, y, ATTACKS, Settings(eps, batch_size=len(x)))
    rows = {"clean": summary["clean"], **summary["attacks"]}
    told = [f"{name}: {row[kind]} {kind}" for kind in ("invalid", *TOLD) for name, row in rows.items() if row.get(kind)]
    told += ["is random"] if any("is random" in line for line in warnings) else []
    told += [f"{name} failed: {why}" for name, why in summary.get("failed", {}).items()]
    return 100 * summary["worst_case"]["accuracy"], "; ".join(told)


@contextmanager
def logged() -> Iterator[list[str]]:
    """Yield a list of what is logged within the context."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ensemble_attacks")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def of_autoattack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[float, str]:
    """Return the robust accuracy in percent, and the flags of AutoAttack."""
    adversary = AutoAttack(model, eps=eps, seed=0, verbose=False, attacks_to_run=["apgd-ce", "apgd-t", "ea-apgd-ce"])
    adversary.run_standard_evaluation(x, y, bs=len(x))
    return 100 * adversary.robust_accuracy, "; ".join(f"{flag.name} {flag.value:g}" for flag in adversary.flags)


def of_diagnose(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[None, str]:
    """Return nothing, and the flags of `diagnose`."""
    return None, ", ".join(diagnose(model, x, y, eps=eps).flags)


def told_by(ask: Callable[..., tuple[float | None, str]], *given: Any) -> tuple[float | None, str]:
    """Return what is found, and said; of what is refused, why."""
    try:
        return ask(*given)
    except Exception as error:  # a refusal is an answer
        return None, f"refused: {reason(error)}"


@click.command(cls=Benchmark)
@click.option("--tricks", default=",".join(TRICKS), help="Comma-separated.  [default: all]")
@click.option("--n", default=64, show_default=True, help="Test images.")
@click.option("--eps", default=0.12, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("dishonest"), show_default=True)
def main(tricks: str, n: int, eps: float, out: Path) -> None:
    logging.getLogger().addHandler(logging.NullHandler())
    torch.set_num_threads(1)
    x, y = load_dataset("digits", n=n)
    net = load_model("standard_convnet_3", dataset="digits").members[0].eval()
    rows = []
    for name in ("honest", *named(tricks, TRICKS, "--tricks")):
        torch.manual_seed(0)

        def make(name: str = name) -> nn.Module:
            return net if name == "honest" else Dishonest(net, x, y, TRICKS[name]).eval()

        row: dict[str, Any] = {"model cheats": name}
        for what, ask in {"evaluate": of_evaluate, "AutoAttack": of_autoattack, "diagnose": of_diagnose}.items():
            share, told = told_by(ask, make(), x, y, eps)
            row |= {} if ask is of_diagnose else {f"{what} %": "" if share is None else f"{share:.1f}"}
            row |= {f"{what} says": told}
        rows.append(row)
        click.echo(" | ".join(f"{value}" for value in row.values()))
    save_table(rows, out)


if __name__ == "__main__":
    main()
