"""Estimate what a run may cost before it begins: passes by the attacks' records, time by a few passes that are taken."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensemble_attacks.attacks.registry import find_attack
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.origins import images_of, placed
from ensemble_attacks.evaluation.settings import Shared
from ensemble_attacks.evaluation.units import CLEAN, Unit, chain_of, count_chains
from ensemble_attacks.models import providers
from ensemble_attacks.models.ask import ask, beside, moved
from ensemble_attacks.models.guard import guarded

FEW = 32  # images whose passes are timed


@dataclass(frozen=True)
class Plan:
    """A record of what a run may cost.

    Attributes:
        units, units_left: how many there are, and how many are not done.
        tasks: how many could be run at the same time.
        passes: the forward and backward passes of an image that the units which are left take at the most.
        passes_per_image: those of one image that no attack fools, in one cell.
        unknown: the attacks whose cost nobody knows beforehand.
        per_second: the passes that were taken in a second; ``None``: they were not tried.
        pixels: the longer side of an image.
    """

    units: int
    units_left: int
    tasks: int
    passes: int
    passes_per_image: int
    unknown: tuple[str, ...]
    per_second: float | None
    pixels: int


def cost_of(name: str, eot_iter: int | None = None) -> int | None:
    """Return the passes that an attack takes of an image that holds out, at the most; ``None`` where nobody knows."""
    cost = find_attack(name).cost
    return None if cost is None else cost * (eot_iter or 1)


def batches_of(attacks: Sequence[str], images: int, settings: Shared) -> int:
    """Return how many gradient passes of a batch attacks take of images that hold out, as far as that is known."""
    cost = sum(cost_of(name, settings.eot_iter) or 0 for name in attacks)
    return cost // 2 * math.ceil(images / settings.batch_size)


def plan_of(manifest: dict[str, Any], device: str | None, ledger: Ledger | None = None) -> Plan:
    """Return what is left to do of a run, and what it may cost; passes are timed on ``device``, unless that is ``None``."""
    sweep = manifest["sweep"]
    chains = [chain_of(manifest, index) for index in range(count_chains(manifest))]
    left = [[unit for unit in chain if ledger is None or ledger.open(unit)] for chain in chains]
    costs = {name: cost_of(name, sweep["eot_iter"]) for name in sweep["attacks"]}

    def passes(unit: Unit) -> int:
        start, stop = unit.range
        return (stop - start) * (sweep["draws"] if unit.attack == CLEAN else costs[unit.attack] or 0)

    few = load_dataset(**images_of(manifest), n=min(FEW, sweep["n"]))[0]
    units = [unit for chain in left for unit in chain]
    return Plan(
        units=sum(map(len, chains)),
        units_left=len(units),
        tasks=sum(map(bool, left)),
        passes=sum(map(passes, units)),
        passes_per_image=sum(cost or 0 for cost in costs.values()),
        unknown=tuple(name for name, cost in costs.items() if cost is None),
        per_second=_rate(manifest, units[0], few, device) if units and device is not None else None,
        pixels=max(few.shape[2:], default=1),
    )


def _rate(manifest: dict[str, Any], unit: Unit, few: torch.Tensor, device: str) -> float | None:
    """Return how many passes of an image the first of the models makes in a second; ``None`` where it has no gradient."""
    cell = unit.cell
    name, places = placed(manifest, cell.model), manifest["places"]
    model = moved(providers.load_model(name, places["model_dir"], cell.dataset, vote=cell.vote), device)
    x = beside(model, few).detach().requires_grad_()
    with guarded(model, seed=cell.seed):
        for _ in range(2):  # the first warms up
            began = time.perf_counter()
            try:
                torch.autograd.grad(ask(model, x).logsumexp(1).sum(), x, allow_unused=True)
            except RuntimeError:  # no gradient, or no memory: the attacks will say so
                return None
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    return 2 * len(x) / seconds
