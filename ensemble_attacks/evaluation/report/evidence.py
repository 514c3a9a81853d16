"""Collect, image by image and over all ranges of a cell, what fooled the model, after how much, and what it then says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.evaluation.chains import Context
from ensemble_attacks.evaluation.ledger import Ledger, Result
from ensemble_attacks.evaluation.summary import verdict_of
from ensemble_attacks.evaluation.units import CLEAN, Unit
from ensemble_attacks.models.ask import ask, beside
from ensemble_attacks.models.preserve import private_random_state
from ensemble_attacks.models.view import look

SHOWN = 8  # images of the gallery
COLUMNS = ("image", "label", "fooled by", "passes", "predicted", "members wrong")


@dataclass(frozen=True, eq=False)
class Evidence:
    """A record of one image, and of the version of it that speaks: of the first attack that fooled the model, in the run's
    order, or, where none did, the one nearest to it.

    Attributes:
        number: its number in the dataset, counted from 0.
        label: its class.
        fooled_by: the attacks that fooled the model; `CLEAN` is among them where the model is wrong without any.
        attack: the attack whose version speaks.
        passes: the forward and backward passes that the first of them had spent on each of its images, in the mean, when
            the part of it was done that fooled the model; ``None`` where nothing did, or the clean image.
        predicted: the class that the model sees in the version that speaks.
        wrong: the members that are wrong there, by their place; ``None`` where the model shows none.
    """

    number: int
    label: int
    fooled_by: tuple[str, ...]
    attack: str
    passes: float | None
    predicted: int
    wrong: tuple[int, ...] | None

    @property
    def row(self) -> tuple[Any, ...]:
        """Return it in the order of `COLUMNS`."""
        passes = "" if self.passes is None else round(self.passes, 1)
        members = "" if self.wrong is None else " ".join(map(str, self.wrong))
        return self.number, self.label, ", ".join(self.fooled_by), passes, self.predicted, members


@dataclass(frozen=True, eq=False)
class Gathered:
    """What is known of the images of a cell: all of them in words, and the first few that an attack moved and that fool
    the model, clean, as which class the model sees them, and moved, (n, ...).
    """

    images: list[Evidence]
    shown: list[Evidence]
    said: list[int]
    clean: Tensor
    moved: Tensor
    members: int


def gather(ledger: Ledger, chains: list[list[Unit]], context: Context) -> Gathered:
    """Return the evidence of a cell's images; ``context`` is that of its first range."""
    images: list[Evidence] = []
    shown: list[Evidence] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    members = 0
    for units in chains:
        here = context
        if units is not chains[0]:
            here = Context(ledger.manifest, units[0], context.devices[0], same_code=False, like=context)
        found, moved, members = _of_range(ledger, units, here)
        images += found
        for index, evidence in enumerate(found):
            held = CLEAN in evidence.fooled_by or not evidence.fooled_by
            if len(shown) < SHOWN and not held and not torch.equal(here.x[index], moved[index]):
                shown.append(evidence)
                pairs.append((here.x[index].clone(), moved[index].clone()))
    empty = context.x[:0]
    clean, adversarial = (torch.stack(part) for part in zip(*pairs, strict=True)) if pairs else (empty, empty)
    with private_random_state(context.settings.seed, context.model):
        said = _predicted(context, clean) if pairs else []
    return Gathered(images, shown, said, clean, adversarial, members)


def _of_range(ledger: Ledger, units: list[Unit], context: Context) -> tuple[list[Evidence], Tensor, int]:
    """Return the evidence of a range, the versions that speak (N, ...), and how many members the model shows."""
    start, n, labels = units[0].range[0], len(context.x), context.y
    speaks, nearest = context.x.clone(), torch.full((n,), torch.inf, dtype=torch.double)
    fooled = torch.zeros(n, dtype=torch.bool)
    by: list[list[str]] = [[] for _ in range(n)]
    attacks, passes = [CLEAN] * n, [None] * n  # type: list[str], list[float | None]
    for unit in units:
        if (result := ledger.read(unit)) is None:
            continue
        rows, found, spent = result.tensors["rows"], verdict_of(result), _passes(result)
        first = found.fooled & ~fooled[rows]
        nearer = ~fooled[rows] & (found.margin.double() < nearest[rows])
        for at in torch.nonzero(first | nearer).squeeze(-1).tolist():
            row = int(rows[at])
            speaks[row], nearest[row] = result.tensors["x_adv"][at].to(speaks), float(found.margin[at])
            attacks[row] = unit.attack
            passes[row] = float(spent[at]) if first[at] and unit.attack != CLEAN else None
        for row in rows[found.fooled].tolist():
            by[row].append(unit.attack)
        fooled[rows] |= found.fooled
    with private_random_state(context.settings.seed, context.model):
        predicted, wrong = _seen(context, speaks)
    numbers = ledger.manifest.get("rows") or range(start + n)
    members = [None if wrong is None else tuple(torch.nonzero(wrong[:, i]).flatten().tolist()) for i in range(n)]
    found_all = [
        Evidence(numbers[start + i], int(labels[i]), tuple(by[i]), attacks[i], passes[i], predicted[i], members[i])
        for i in range(n)
    ]
    return found_all, speaks, 0 if wrong is None else len(wrong)


def _passes(result: Result) -> Tensor:
    """Return for each image of a unit the passes, in the mean of its images, after the part that fooled the model, (N,)."""
    info, n = result.info, len(result.tensors["rows"])
    spent = torch.full((n,), (info["forwards"] + info["backwards"]) / max(n, 1), dtype=torch.double)
    for part, (ahead, back) in reversed(info["stages"].items()):
        spent[~result.tensors[f"stage {part}"].bool()] = (ahead + back) / n
    return spent


@torch.no_grad()
def _predicted(context: Context, x: Tensor) -> list[int]:
    """Return the classes that the model sees in images."""
    net = context.model
    parts = x.split(context.settings.batch_size)
    return [label for part in parts for label in ask(net, beside(net, part)).argmax(1).tolist()]


@torch.no_grad()
def _seen(context: Context, x: Tensor) -> tuple[list[int], Tensor | None]:
    """Return the classes that the model sees in images of a range, and which members are wrong about them, (M, N).

    One pass of the members gives both. The latter is ``None`` where the model shows none; a model that draws its members
    with known probabilities sees what it does in expectation.
    """
    net: Any = context.model
    if not hasattr(net, "member_logits"):
        return _predicted(context, x), None
    predicted, members = [], []
    for part in x.split(context.settings.batch_size):
        found = look(net, beside(net, part), inside=True)
        own = found.verdict_ENK if found.weights_E is None else None  # of a model that breaks ties in its own way
        assert found.logits_MNK is not None
        predicted += (found.scores_NK if own is None else own[0]).argmax(1).tolist()
        members.append(found.logits_MNK.argmax(-1).cpu())
    return predicted, torch.cat(members, 1) != context.y
