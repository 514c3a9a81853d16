"""Name what options choose from, and complete it in a shell, without torch; a test holds the names to the registries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from ensemble_attacks.attacks.peers import PEER
from ensemble_attacks.attacks.registry import RECORDS

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "mnist", "imagenet")
VOTES = ("softmax", "voting", "logits")
NORMS = ("Linf", "L2", "L1")
ENGINES = ("local", "ray", "slurm")
TRACKERS = ("wandb", "tensorboard", "mlflow")
KINDS = ("torchvision:", "timm:", "hf:", "robustbench:", "ensemble:", "crossmax:", "randomized:")
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completing(names: Callable[[click.Context], Iterable[str]]) -> Complete:
    """Return what completes an option's value, of which the last part behind a comma is completed."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in names(ctx) if name.startswith(last)]

    return complete


def shipped(dataset: str | None = None) -> list[str]:
    """Return the names of the models that ship, of one dataset or of all."""
    spec = find_spec("defenses")
    folders = [Path(place) / "weights" for place in (spec.submodule_search_locations or ())] if spec else []
    return sorted({card.stem for folder in folders for card in folder.glob(f"{dataset or '*'}/*/*.json")})


def _models(ctx: click.Context) -> list[str]:
    return [*shipped(ctx.params.get("dataset") if ctx.params.get("dataset") in DATASETS else None), *KINDS]


attacks = completing(lambda ctx: [*RECORDS, PEER])
models = completing(_models)
datasets = completing(lambda ctx: DATASETS)
votes = completing(lambda ctx: VOTES)
norms = completing(lambda ctx: NORMS)
engines = completing(lambda ctx: ENGINES)
