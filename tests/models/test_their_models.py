"""Models as researchers write them: each must be attacked and judged as what it is."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defenses import load_model
from ensemble_attacks import (
    EOTAPGD,
    MORA,
    PGD,
    AggregateMismatchError,
    AutoAttack,
    Ensemble,
    as_ensemble,
    judge,
)
from ensemble_attacks.diagnostics import binarization, diagnose, indicators
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.models.preserve import evaluating, in_training
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.models.twins import prepare
from tests.helpers import slow_but

EPS = 0.12


@pytest.fixture
def nets() -> list[nn.Module]:
    return list(load_model("standard_convnet_3", dataset="digits").members)


@pytest.fixture
def few(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][:40], digits[1][:40]


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Written(nn.Module):
    """A network behind some code."""

    def __init__(self, net: nn.Module, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.code = net, code

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.code(x))


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        change = torch.round(x * 8) / 8 - x
    return x + change


@pytest.mark.parametrize("code", [Rounded.apply, without_gradient])
def test_a_twin_has_the_models_own_gradient(code: Callable, nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    """Tracing forgets straight-through estimators: then the model itself is attacked."""
    x, y = few
    model = Written(nets[0], code).eval()
    assert prepare(model, x[:8]) is model
    alone = right(model, PGD(model, eps=EPS, steps=20, n_restarts=1)(x, y), y)
    adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=["ea-apgd-ce"], version="custom")
    adversary.run_standard_evaluation(x, y)
    assert adversary.robust_accuracy <= alone + 0.05
    assert "zero_gradients" not in diagnose(model, x[:8], y[:8], eps=EPS).flags


class Draws(nn.Module):
    """One of several networks, drawn in Python for the whole batch."""

    def __init__(self, nets: list[nn.Module], draw: Callable[[], float]) -> None:
        super().__init__()
        self.nets, self.draw = nn.ModuleList(nets), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[int(self.draw() * len(self.nets))](x)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1).item()])
def test_a_twin_draws_as_the_model_does(draw: Callable, nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    model = Draws([nets[0], *load_model("gal_convnet_3", dataset="digits").members], draw).eval()
    assert structure_of(prepare(model, few[0][:8]), few[0]).random


def test_seldom_draws_are_noticed(nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    seldom = Written(nets[0], lambda x: x if torch.rand(()) > 0.1 else 1 - x).eval()
    assert structure_of(seldom, few[0]).random


def test_monte_carlo_dropout_is_judged_as_it_runs(nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    x, y = few
    model = nn.Sequential(nn.Dropout(0.3), nets[0]).eval()
    model[0].train()
    assert not in_training(model)
    recount = sum(right(model, x, y) for _ in range(50)) / 50
    assert recount < 0.9
    assert judge(model, x, y, x, eps=EPS, draws=50).accuracy == pytest.approx(recount, abs=0.05)
    assert model[0].training
    assert "random" in diagnose(model, x[:8], y[:8], eps=EPS, alone=1).flags
    adversary = AutoAttack(model, eps=0.05, seed=0, verbose=False, version="custom", attacks_to_run=["eot-apgd?steps=20"])
    x_adv = adversary.run_standard_evaluation(x, y)
    assert [flag.name for flag in adversary.flags] == ["random"]
    assert isinstance(x_adv, Tensor)
    recount = sum(right(model, x_adv, y) for _ in range(50)) / 50
    assert adversary.robust_accuracy == pytest.approx(recount, abs=0.06)
    images = EOTAPGD(model, eps=0.05, steps=5, eot_iter=5)(x, y)
    assert judge(model, x, y, images, eps=0.05, draws=50).accuracy < judge(model, x, y, x, eps=EPS, draws=50).accuracy


def test_what_is_in_training_mode(nets: list[nn.Module]) -> None:
    forgotten = nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 10)).train()
    assert in_training(forgotten)
    evaluating(forgotten)
    assert not any(module.training for module in forgotten.modules())
    wrapped = nn.DataParallel(nets[0].eval())
    assert wrapped.training
    assert not in_training(wrapped)


def test_the_logarithm_of_a_probability_that_underflows(nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    """-inf of a class that does not win decides nothing."""
    x, y = few

    class LogMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nets)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(net(x) * 10).softmax(-1) for net in self.nets]).mean(0).log()

    model = LogMean().eval()
    assert torch.isinf(model(x)).any()
    clean = judge(model, x, y, x, eps=EPS)
    assert clean.accuracy == right(model, x, y)
    assert not clean.invalid.any()
    adversary = AutoAttack(model, eps=0.05, seed=0, verbose=False, version="custom", attacks_to_run=["ea-apgd-ce"])
    x_adv = adversary.run_standard_evaluation(x, y)
    assert isinstance(x_adv, Tensor)
    assert adversary.robust_accuracy == right(model, x_adv, y)


class Transposed(Ensemble):
    """Puts the members second: (N, M, K)."""

    def member_logits(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.members], 1)


def test_members_that_are_not_the_forward_are_refused(nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    x, y = few
    model = Ensemble([Written(net, lambda x: 1 - x) for net in nets]).eval()
    model.register_forward_pre_hook(lambda module, inputs: (1 - inputs[0],))
    with pytest.raises(AggregateMismatchError, match="predicts another class than its forward"):
        MORA(model, eps=EPS, steps=2)(x, y)
    with pytest.raises(AggregateMismatchError, match="of 8 images"):
        evaluate(model, x, y, ["mora"], Settings(EPS))
    assert "protocol" in diagnose(model, x[:4], y[:4], eps=EPS, alone=1).flags
    with pytest.raises(ValueError, match=r"\(40, 3, 10\) for 40 images|\(8, 3, 10\) for 8 images"):
        MORA(Transposed(nets).eval(), eps=EPS, steps=2)(x, y)


@pytest.mark.parametrize("members", [2, 4])
def test_ties_broken_otherwise_are_no_success(members: int, few: tuple[Tensor, Tensor]) -> None:
    """A majority that takes the first class of a tie is attacked as that, not as the claimed vote."""
    x, y = few
    nets = [
        *load_model("standard_convnet_3", dataset="digits").members,
        *load_model("gal_convnet_3", dataset="digits").members,
    ]

    class Majority(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nets[:members])

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([nn.functional.one_hot(net(x).argmax(1), 10) for net in self.nets]).sum(0).float()

    model = Majority().eval()
    counted = lambda logits: torch.nn.functional.one_hot(logits.argmax(-1), 10).sum(0).float()  # noqa: E731
    named, exact = (
        right(
            model,
            MORA(as_ensemble(model, ["nets.0", "nets.1", "nets.2", "nets.3"][:members], vote), eps=EPS, steps=10)(x, y),
            y,
        )
        for vote in ("voting", counted)
    )
    assert named <= exact + 1 / len(x)


@pytest.mark.parametrize("mode", slow_but([torch.inference_mode], [torch.no_grad, torch.inference_mode]))
def test_diagnoses_do_not_depend_on_the_callers_mode(
    mode: Callable, nets: list[nn.Module], few: tuple[Tensor, Tensor]
) -> None:
    x, y = few[0][:4], few[1][:4]
    model = Ensemble(nets).eval()

    def attack(net: nn.Module, eps: float = EPS) -> PGD:
        return PGD(net, eps=eps, steps=5, n_restarts=1)

    def found(x: Tensor, y: Tensor) -> dict:
        return diagnose(model, x, y, eps=EPS, alone=1).as_dict()

    expected = found(x, y), indicators(attack, nets[0], x, y, eps=EPS).means()
    score = binarization(attack, nets[0], x, eps=EPS).score
    with mode():
        assert (found(x, y), indicators(attack, nets[0], x, y, eps=EPS).means()) == expected
        assert binarization(attack, nets[0], x, eps=EPS).score == score
        assert found(x.clone(), y.clone()) == expected[0]  # inference tensors themselves


@pytest.mark.parametrize(
    "generator",
    [
        lambda: torch.Generator(),
        lambda: np.random.default_rng(0),
        lambda: np.random.RandomState(0),
        lambda: random.Random(0),
    ],
)
def test_generators_of_the_models_own(generator: Callable, nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    x, y = few

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.rng = nets[0], generator()

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.rng, torch.Generator):
                return self.net(x + 0.3 * torch.randn(x.shape, generator=self.rng))
            return self.net(x + 0.3 * self.rng.gauss(0, 1) if isinstance(self.rng, random.Random) else x + self._noise(x))

        def _noise(self, x: Tensor) -> Tensor:
            return torch.from_numpy(0.3 * self.rng.normal(size=tuple(x.shape))).float()

    model, other = Noisy().eval(), Noisy().eval()
    attack = EOTAPGD(model, eps=EPS, steps=3, eot_iter=2)
    assert torch.equal(attack(x, y), attack(x, y))
    first = judge(model, x, y, x, eps=EPS, draws=3)
    assert torch.equal(first.correct, judge(model, x, y, x, eps=EPS, draws=3).correct)
    if not isinstance(model.rng, torch.Generator):  # which starts anywhere
        assert torch.equal(model(x), other(x))  # as if nothing had been drawn


def test_a_model_that_works_in_place(nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    x, y = few
    model = Written(nets[0], lambda x: x.sub_(0.1).mul_(1.2)).eval()
    before = x.clone()
    first = judge(model, x, y, x, eps=EPS, draws=3)
    assert torch.equal(x, before)
    assert torch.equal(first.correct[0], first.correct[2])
    assert not structure_of(model, x).random


def test_a_model_without_torch(nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    x, y = few
    model = Written(nets[0], lambda x: torch.from_numpy(np.asarray(x.numpy()))).eval()
    adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, version="custom", attacks_to_run=["square"])
    adversary.square.n_queries = 5
    adversary.run_standard_evaluation(x, y)
    assert [flag.name for flag in adversary.flags] == ["zero_gradients"]
    assert "zero_gradients" in diagnose(model, x[:8], y[:8], eps=EPS).flags


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_functions_are_taken_as_models_and_frozen_ones_refused(nets: list[nn.Module], few: tuple[Tensor, Tensor]) -> None:
    x, y = few

    def attack(net: nn.Module, eps: float) -> PGD:
        return PGD(net, eps=eps)

    calls = (
        lambda model: judge(model, x, y, x, eps=EPS),
        lambda model: diagnose(model, x, y, eps=EPS),
        lambda model: as_ensemble(model),
        lambda model: indicators(attack, model, x, y, eps=EPS),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module or a function of images, got 'resnet'"):
            call("resnet")
        with pytest.raises(TypeError, match="is frozen"):
            call(torch.jit.freeze(torch.jit.trace(nets[0].eval(), x)))
    function = judge(lambda images: nets[0](images), x, y, x, eps=EPS)  # type: ignore[arg-type]
    assert torch.equal(function.robust, judge(nets[0], x, y, x, eps=EPS).robust)
    with pytest.raises(TypeError, match=r"DataParallel hides: pass its \.module"):
        MORA(nn.DataParallel(Ensemble(nets)))
