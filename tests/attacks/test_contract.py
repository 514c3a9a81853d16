"""What every attack of this package keeps, whatever it does inside."""

from __future__ import annotations

import random
from collections import OrderedDict
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks import (
    A3,
    APGD,
    ARC,
    CAA,
    EOTAPGD,
    LAFEAT,
    LCA,
    MALT,
    MORA,
    PGD,
    PMA,
    BPDAIdentity,
    CrossMaxTransfer,
    FrontEndReversal,
    Surrogate,
)
from ensemble_attacks.models.aggregations import log_expected_softmax
from tests.helpers import make_ensemble, slow_but

EPS = 0.1
ROUNDING = 1e-8  # in float64, carried through up to 800 steps


def dropouts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def behind_a_front_end(model: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(frontend=nn.Identity(), backbone=model)).train(model.training)


class Drawn(nn.Module):
    """An ensemble that answers with its expected probability, and says how likely it draws each member."""

    probabilities: Tensor

    def __init__(self, ensemble: nn.Module) -> None:
        super().__init__()
        self.ensemble: Any = ensemble
        self.register_buffer("probabilities", torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), persistent=False)
        self.training = ensemble.training

    def member_logits(self, x: Tensor) -> Tensor:
        return self.ensemble.member_logits(x)

    def aggregate(self, logits: Tensor) -> Tensor:
        return log_expected_softmax(logits, self.probabilities)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.member_logits(x))


def caa(model: nn.Module, norm: str) -> CAA:
    attack = CAA(model, norm=norm, eps=EPS)
    attack.steps = 15
    return attack


ATTACKS = {
    "mora": lambda model, norm: MORA(model, norm=norm, eps=EPS, steps=8, betas=(0.5, 0.0, 1.0)),
    "mora-mt": lambda model, norm: MORA(model, norm=norm, eps=EPS, steps=12, betas=(0.5,), targets=1),
    "pgd": lambda model, norm: PGD(model, norm=norm, eps=EPS, steps=8, n_restarts=2),
    "cw": lambda model, norm: PGD(model, norm=norm, eps=EPS, steps=8, n_restarts=2, loss="margin"),
    "lafeat": lambda model, norm: LAFEAT(model, norm=norm, eps=EPS, steps=8),
    "a3": lambda model, norm: A3(model, norm=norm, eps=EPS, n_restarts=3),
    "caa": caa,
    "apgd-ce": lambda model, norm: APGD(model, norm=norm, eps=EPS, steps=12, n_restarts=2),
    "apgd-dlr": lambda model, norm: APGD(model, norm=norm, eps=EPS, steps=12, loss="dlr"),
    "soft-apgd": lambda model, norm: APGD(Surrogate(model, "probability"), norm=norm, eps=EPS, steps=12, loss="margin"),
    "published": lambda model, norm: MORA.published(model, norm=norm, eps=EPS, steps=6, betas=(0.5, 1.0), targets=1),
    "lca": lambda model, norm: LCA(Drawn(model), norm=norm, eps=EPS, steps=4, n_restarts=2),
    "arc": lambda model, norm: ARC(Drawn(model), norm=norm, eps=EPS, steps=1, n_restarts=2),
    "apgd-t": lambda model, norm: APGD(model, norm=norm, eps=EPS, steps=6, loss="dlr-targeted", targets=3),
    "pma": lambda model, norm: PMA(model, norm=norm, eps=EPS, steps=8),
    "malt": lambda model, norm: MALT(model, norm=norm, eps=EPS, steps=6, targets=3),
    "eot-apgd": lambda model, norm: EOTAPGD(model, norm=norm, eps=EPS, steps=12, eot_iter=2),
    "bpda": lambda model, norm: BPDAIdentity(model, parts=dropouts(model), norm=norm, eps=EPS, steps=12),
    "reversal": lambda model, norm: FrontEndReversal(
        behind_a_front_end(model), norm=norm, eps=EPS, steps=12, amplification=1.0
    ),
    "crossmax": lambda model, norm: CrossMaxTransfer(
        model, attack=APGD, refine=APGD, refine_steps=5, norm=norm, eps=EPS, steps=12
    ),
}
MIXTURES = ("lca", "arc")  # attacks on models that draw a member
NORMS = ("Linf", "L2")
DTYPES = (torch.float32, torch.float64)
# what has nothing to do with the ball: every attack in one norm, half of them in each; the other with -m slow
EITHER = {(name, NORMS[index % 2]) for index, name in enumerate(ATTACKS)}
in_either_norm = pytest.mark.parametrize(("name", "norm"), slow_but(EITHER, product(ATTACKS, NORMS)))
# what rounds: every attack in both norms in single precision, and in one of them in double
ROUNDING_MOST = {(*key, torch.float32) for key in product(ATTACKS, NORMS)} | {(*key, torch.float64) for key in EITHER}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return corners_and_others()


def corners_and_others() -> tuple[Tensor, Tensor]:
    """64 random 3x6x6 images in float64, with the ensemble's labels; then 8 are moved to corners of the box."""
    images = torch.rand(64, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = make_ensemble()(images).argmax(1)
    images[:8] = images[:8].round()
    return images, labels


@cache
def reference(name: str, norm: str) -> Tensor:
    """Return what an attack makes of that batch: each test compares with it what an attack of its own makes."""
    images, labels = corners_and_others()
    adversarial = ATTACKS[name](make_ensemble(), norm)(images, labels)
    assert torch.equal(images, corners_and_others()[0])
    return adversarial


def size(images: Tensor, adversarial: Tensor, norm: str) -> Tensor:
    delta = (adversarial.double() - images.double()).flatten(1)
    return delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)


@pytest.mark.parametrize(("name", "norm", "dtype"), slow_but(ROUNDING_MOST, product(ATTACKS, NORMS, DTYPES)))
def test_images_are_in_ball_and_box(name: str, norm: str, dtype: torch.dtype, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0].to(dtype), batch[1]
    model = make_ensemble(dtype=dtype)
    before = images.clone()
    adversarial = reference(name, norm) if dtype == torch.float64 else ATTACKS[name](model, norm)(images, labels)
    assert adversarial.shape == images.shape
    assert adversarial.dtype == dtype
    assert adversarial.device == images.device
    assert not adversarial.requires_grad
    assert torch.isfinite(adversarial).all()
    assert ((adversarial >= 0) & (adversarial <= 1)).all()
    assert (size(images, adversarial, norm) <= EPS).all()
    assert torch.equal(images, before)
    fooled = model(adversarial).argmax(1) != labels
    least = 0.05 if name in MIXTURES else 0.2  # these are after single members, not after their mean
    assert least < fooled.float().mean() < 1  # it attacks, and leaves room to compare


@in_either_norm
@pytest.mark.parametrize("batch_size", slow_but([3], [1, 3, 64]))  # four images are batches of three and of one
def test_the_result_does_not_depend_on_batch_size(
    name: str, norm: str, batch_size: int, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch[0][46:50], batch[1][46:50]  # one of them stays robust, and goes through every stage
    model = make_ensemble()
    whole = ATTACKS[name](model, norm)(images, labels)
    attack = ATTACKS[name](model, norm)
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    torch.testing.assert_close(torch.cat([attack(x, y) for x, y in parts]), whole, rtol=0, atol=ROUNDING)
    inside = ATTACKS[name](model, norm)
    inside.batch_size = batch_size
    torch.testing.assert_close(inside(images, labels), whole, rtol=0, atol=ROUNDING)


@in_either_norm
def test_the_result_does_not_depend_on_order(name: str, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    attack = ATTACKS[name](make_ensemble(), norm)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    permuted = attack(images[order], labels[order])
    torch.testing.assert_close(permuted, reference(name, norm)[order], rtol=0, atol=ROUNDING)


@in_either_norm
def test_the_seed_decides(name: str, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    first = reference(name, norm)
    torch.manual_seed(99)
    attack = ATTACKS[name](make_ensemble(), norm)
    assert torch.equal(attack(images, labels), first)
    attack.seed = 1
    assert not torch.equal(attack(images, labels), first)


class Failing(nn.Module):
    """An ensemble that counts its forward passes in a buffer, anew each time, and raises after some."""

    calls: Tensor

    def __init__(self, after: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.inside, self.left, self.vote = make_ensemble(), after, "softmax"

    def member_logits(self, x: Tensor) -> Tensor:
        self.left -= 1
        self.calls = self.calls + 1
        if self.left < 0:
            raise RuntimeError("out of order")
        return self.inside.member_logits(x)

    def aggregate(self, logits: Tensor) -> Tensor:
        return self.inside.aggregate(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.member_logits(x))


def state(model: nn.Module) -> tuple[object, ...]:
    return (
        [module.training for module in model.modules()],
        [value.clone() for value in model.state_dict().values()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [parameter.requires_grad for parameter in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        torch.get_rng_state(),
        np.random.get_state(legacy=False)["state"]["key"],  # noqa: NPY002
        random.getstate(),
        torch.is_grad_enabled(),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@in_either_norm
@pytest.mark.parametrize("training_mode", [False, True])
@pytest.mark.parametrize("after", [10**6, 1])
def test_nothing_is_touched(name: str, norm: str, after: int, training_mode: bool, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = Failing(after).train()
    model.inside.members[1].eval()  # a frozen member inside a model in training: torchattacks would wake it
    weight = model.inside.get_parameter("members.0.5.weight")
    weight.grad = torch.ones_like(weight)
    attack: Attack = ATTACKS[name](model, norm)
    attack.set_model_training_mode(training_mode, batchnorm_training=training_mode, dropout_training=training_mode)
    attack.set_normalization_used([0.5] * 3, [0.25] * 3)
    before = state(model)
    if after < 10:
        with pytest.raises(RuntimeError, match="out of order"):
            attack((images - 0.5) / 0.25, labels)
    else:
        attack((images - 0.5) / 0.25, labels)
    assert all(same(x, y) for x, y in zip(before, state(model), strict=True))
    assert attack._normalization_applied is True


@in_either_norm
def test_callers_without_gradients(name: str, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    """And the same attack, called again."""
    images, labels = batch
    expected, attack = reference(name, norm), ATTACKS[name](make_ensemble(), norm)
    with torch.no_grad():
        assert torch.equal(attack(images, labels), expected)
    with torch.inference_mode():
        assert torch.equal(attack(images, labels), expected)


@in_either_norm
def test_an_empty_batch_and_a_batch_already_wrong(name: str, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][8:], batch[1][8:]
    attack = ATTACKS[name](make_ensemble(), norm)
    assert attack(images[:0], labels[:0]).shape == (0, 3, 6, 6)
    wrong = (labels + 1) % 4
    if name in MIXTURES:  # all that can be drawn are to be wrong
        every = (make_ensemble().member_logits(images).argmax(-1) != wrong).all(0)
        images, wrong = images[every], wrong[every]
    assert len(images) > 5
    assert torch.equal(attack(images, wrong), images)


@in_either_norm
def test_a_model_of_nan_fools_nobody(name: str, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = make_ensemble()
    model.get_parameter("members.0.5.bias").data.fill_(torch.nan)
    adversarial = ATTACKS[name](model, norm)(images, labels)
    assert torch.isfinite(adversarial).all()
    assert (size(images, adversarial, norm) <= EPS).all()
