"""Ensembles of linear classifiers, whose distance to the boundary is known in closed form.

Every attack must fool all samples whose optimum is at most 0.95 eps, and none beyond eps.

With members that read disjoint pixels, one perturbation can push each of them as far as it goes, so that along the best
perturbation of size r member m's margin is k_m - r * g_m (two classes; g_m the dual norm of its gradient, for Linf).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from ensemble_attacks import A3, APGD, CAA, MORA, PGD, Ensemble
from ensemble_attacks.models.preserve import private_random_state
from tests.helpers import VOTES, slow_but

PIXELS, SAMPLES = 48, 60


class Linear(nn.Module):
    """Scores ``W x + b`` of flattened images."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def images_inside_the_box() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.3 + 0.4 * torch.rand(SAMPLES, 3, 4, 4, dtype=torch.float64, generator=generator)


def disjoint_binary_members(count: int = 3) -> list[Linear]:
    """Two-class members, each of which reads its own third of the pixels."""
    generator = torch.Generator().manual_seed(1)
    members = []
    for m in range(count):
        weight = torch.zeros(2, PIXELS, dtype=torch.float64)
        part = slice(m * PIXELS // count, (m + 1) * PIXELS // count)
        weight[:, part] = torch.randn(2, PIXELS // count, dtype=torch.float64, generator=generator) * (1 + m)
        bias = -weight @ torch.full((PIXELS,), 0.5, dtype=torch.float64)
        members.append(Linear(weight, bias))
    return members


def dense_members(classes: int, count: int = 3) -> list[Linear]:
    generator = torch.Generator().manual_seed(2)
    members = []
    for _ in range(count):
        weight = torch.randn(classes, PIXELS, dtype=torch.float64, generator=generator)
        members.append(Linear(weight, -weight @ torch.full((PIXELS,), 0.5, dtype=torch.float64)))
    return members


def binary_optimum(members: list[Linear], images: Tensor, labels: Tensor, vote: str) -> Tensor:
    """Linf distance to the boundary of an ensemble of disjoint two-class members."""
    logits = torch.stack([member(images) for member in members])
    sign = 1 - 2 * labels.double()
    lead = (logits[..., 0] - logits[..., 1]) * sign  # k_m
    slope = torch.stack([(m.weight[0] - m.weight[1]).abs().sum() for m in members]).unsqueeze(1)  # g_m
    if vote == "logits":
        return lead.sum(0) / slope.sum()
    if vote == "voting":  # the radius at which two of three have flipped
        return (lead / slope).sort(0).values[len(members) // 2]
    excess = lambda r, n: (lead[:, n] - r * slope[:, 0]).sigmoid().mean().item() - 0.5  # noqa: E731
    return torch.tensor([brentq(excess, 0.0, 10.0, args=(n,)) for n in range(len(images))], dtype=torch.float64)


def check(
    ensemble: Ensemble,
    make: Callable[[nn.Module, float], nn.Module],
    images: Tensor,
    labels: Tensor,
    optimum: Tensor,
    eps: float,
) -> None:
    adversarial = make(ensemble, eps)(images, labels)
    fooled = ensemble(adversarial).argmax(1) != labels
    within, beyond = optimum <= 0.95 * eps, optimum > eps
    assert within.sum() >= 10
    assert beyond.sum() >= 10
    assert fooled[within].all(), f"{int((~fooled[within]).sum())} of {int(within.sum())} missed"
    assert not fooled[beyond].any()


def either(attacks: Iterable[str], kinds: tuple[str, ...]) -> list[Any]:
    """Return all pairs, of which MORA's and one of every other attack, in turn, are not marked slow."""
    kept = {(name, kinds[index % len(kinds)]) for index, name in enumerate(attacks)} | {("mora", kind) for kind in kinds}
    return slow_but(kept, product(attacks, kinds))


BINARY_ATTACKS = {
    "mora": lambda model, eps: MORA(model, eps=eps, steps=100),
    "mora-mt": lambda model, eps: MORA(model, eps=eps, steps=100, betas=(0.5,), targets=1),
    "mora-beta-0": lambda model, eps: MORA(model, eps=eps, steps=100, betas=(0.0,)),
    "apgd-ce": lambda model, eps: APGD(model, eps=eps, steps=100),
    "pgd": lambda model, eps: PGD(model, eps=eps),
    "cw": lambda model, eps: PGD(model, eps=eps, loss="margin"),
    "a3": lambda model, eps: A3(model, eps=eps, n_restarts=8),
    "caa": lambda model, eps: CAA(model, eps=eps),
}


@pytest.mark.parametrize(("attack", "vote"), either(BINARY_ATTACKS, VOTES))
def test_disjoint_binary_members(vote: str, attack: str) -> None:
    images, members = images_inside_the_box(), disjoint_binary_members()
    ensemble = Ensemble(members, vote)
    labels = ensemble(images).argmax(1)
    optimum = binary_optimum(members, images, labels, vote)
    check(ensemble, BINARY_ATTACKS[attack], images, labels, optimum, float(optimum.median()))


# Not APGD on cross-entropy: it climbs towards the class that is ahead at the random start, which need not be the nearest.
# AutoAttack's own misses the same samples (test_apgd_ce_misses_what_autoattacks_misses).
MANY_CLASS_ATTACKS = {
    "mora": lambda norm: lambda model, eps: MORA(model, norm=norm, eps=eps, steps=100),
    "mora-mt": lambda norm: lambda model, eps: MORA(model, norm=norm, eps=eps, steps=100, betas=(0.5,), targets=4),
    "apgd-dlr": lambda norm: lambda model, eps: APGD(model, norm=norm, eps=eps, steps=100, loss="dlr"),
    "a3": lambda norm: lambda model, eps: A3(model, norm=norm, eps=eps, n_restarts=8),
    "caa": lambda norm: lambda model, eps: CAA(model, norm=norm, eps=eps),
    "apgd-t": lambda norm: lambda model, eps: APGD(model, norm=norm, eps=eps, steps=100, loss="dlr-targeted"),
}


def linear_problem(norm: str) -> tuple[Ensemble, Tensor, Tensor, Tensor]:
    """Mean logits of linear members are linear: distance to class j is (z_y - z_j) / |w_y - w_j| in the dual norm."""
    images, members = images_inside_the_box(), dense_members(classes=5)
    ensemble = Ensemble(members, "logits")
    scores = ensemble(images)
    labels = scores.argmax(1)
    weight = torch.stack([member.weight for member in members]).mean(0)
    apart = weight[labels].unsqueeze(1) - weight
    dual = apart.abs().sum(-1) if norm == "Linf" else apart.norm(dim=-1)
    distance = (scores.gather(1, labels.unsqueeze(1)) - scores) / dual
    return ensemble, images, labels, distance.scatter(1, labels.unsqueeze(1), torch.inf).amin(1)


@pytest.mark.parametrize(("attack", "norm"), either(MANY_CLASS_ATTACKS, ("Linf", "L2")))
def test_mean_logits_of_five_classes(attack: str, norm: str) -> None:
    ensemble, images, labels, optimum = linear_problem(norm)
    check(ensemble, MANY_CLASS_ATTACKS[attack](norm), images, labels, optimum, float(optimum.median()))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_ce_misses_what_autoattacks_misses(norm: str) -> None:
    from pyautoattack.autopgd_base import APGDAttack

    ensemble, images, labels, optimum = linear_problem(norm)
    ensemble, images, eps = ensemble.float(), images.float(), float(optimum.median())
    theirs = APGDAttack(ensemble, n_iter=100, norm=norm, n_restarts=1, eps=eps, seed=0, loss="ce", device="cpu")
    with private_random_state(0, ensemble):
        missed_by_them = ensemble(theirs.perturb(images, labels)).argmax(1) == labels
    missed_by_us = ensemble(APGD(ensemble, norm=norm, eps=eps, steps=100)(images, labels)).argmax(1) == labels
    assert torch.equal(missed_by_us, missed_by_them)
