"""Hosts' attacks see anybody's model as this package's do: any precision, in-place writers, tuples, inference mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from ensemble_attacks import APGD, MORA, AutoAttack, Ensemble, judge
from ensemble_attacks.attacks.foreign import craft, rounded
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.judge import outside
from ensemble_attacks.models.ask import Asked, as_module

CLASSES = 5
SUITE = ["apgd-ce", "apgd-t", "fab-t", "square"]


class Linear(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Linear(64, CLASSES)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.flatten(1))


class InPlace(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5).mul_(2))


class Copying(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward((x - 0.5) * 2)


class Answer(NamedTuple):
    logits: Tensor
    features: Tensor


class Named(Linear):
    def forward(self, x: Tensor) -> Any:
        return Answer(super().forward(x), x.flatten(1))


class Cached(Linear):
    """Keeps what it answered, which square writes into."""

    def forward(self, x: Tensor) -> Any:
        self.last = super().forward(x)
        return self.last


def images(n: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def quick(adversary: AutoAttack) -> AutoAttack:
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 5
    adversary.square.n_queries = 20
    return adversary


def attacked(model: Any, x: Tensor, y: Tensor, attacks: Any = SUITE, **settings: Any) -> tuple[AutoAttack, Tensor]:
    given = dict(eps=0.05, seed=0, verbose=False, attacks_to_run=attacks) | settings
    adversary = quick(AutoAttack(model, **given))
    found = adversary.run_standard_evaluation(x, y, bs=4)
    assert isinstance(found, Tensor)
    return adversary, found


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_any_precision(dtype: torch.dtype, norm: str) -> None:
    model, x = Linear().to(dtype), images(dtype=dtype)
    y = model(x).argmax(1)
    net = model if norm == "L1" else Ensemble([model, Linear(1).to(dtype)]).eval()
    eps = {"Linf": 0.05, "L2": 0.4, "L1": 4.0}[norm]
    ours: list[Any] = [] if norm == "L1" else [MORA(net, norm=norm, eps=eps, steps=3)]
    pgd = torchattacks.PGD(model, eps=0.001, steps=2)
    adversary, found = attacked(net, x, net(x).argmax(1), [*ours, "apgd-ce", "square", pgd], norm=norm, eps=eps)
    assert found.dtype == dtype
    assert not outside(x, found, eps=eps, norm=norm).any()
    assert not {"outside_ball", "failed", "left_out"} & {flag.name for flag in adversary.flags}
    assert adversary.robust_accuracy < 1
    if norm == "Linf":
        summary = evaluate(model, x, y, ["torchattacks:PGD?steps=2", "apgd-ce"], Settings(eps))
        assert not summary["attacks"]["torchattacks:PGD?steps=2"].get("outside")
        assert "failed" not in summary


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_rounding_puts_back_what_it_carries_out_and_nothing_else(dtype: torch.dtype, norm: str) -> None:
    x, generator = images(8, dtype), torch.Generator().manual_seed(0)
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    delta = torch.randn(x.shape, generator=generator)
    delta *= 0.3 / delta.flatten(1).norm(order, dim=1).view(-1, 1, 1, 1)
    moved = (x.float() + delta).clamp(0, 1)
    moved[0] = 1 - moved[0]
    found = rounded(x, moved, eps=0.3, norm=norm)
    assert found.dtype == dtype
    assert outside(x, found, eps=0.3, norm=norm).tolist() == [True, *[False] * 7]
    assert (found[1:] - x[1:]).abs().amax() > 0


@pytest.mark.parametrize("name", [*SUITE, "fab", "torchattacks:PGD?steps=3", "torchattacks:FAB?steps=3", "pgd"])
def test_a_model_that_works_in_place_is_attacked_as_one_that_copies(name: str) -> None:
    x = images()
    y = Copying()(x).argmax(1)
    (one, found), (other, expected) = (attacked(model, x, y, [name]) for model in (InPlace(), Copying()))
    assert one.robust_accuracy == other.robust_accuracy < 1
    assert torch.equal(found, expected)
    assert judge(InPlace(), x, y, found, eps=0.05).accuracy == one.robust_accuracy


@pytest.mark.parametrize("make", [Named, Cached])
def test_what_a_model_answers_is_unwrapped_and_not_written_into(make: Callable[[], nn.Module]) -> None:
    x = images()
    y = Linear()(x).argmax(1)
    (one, found), (_, expected) = (attacked(model, x, y) for model in (make(), Linear()))
    assert torch.equal(found, expected)
    assert one.robust_accuracy < 1
    summary = evaluate(make(), x, y, ["torchattacks:PGD?steps=3", "apgd-ce"], Settings(0.05))
    assert summary["worst_case"]["accuracy"] < 1


def test_the_forward_of_a_model_is_the_model() -> None:
    model, x = Linear(), images()
    adversary, found = attacked(model.forward, x, model(x).argmax(1))
    assert adversary.model is model
    assert torch.equal(found, attacked(model, x, model(x).argmax(1))[1])
    adversary.set_version("rand")
    assert adversary.model is model
    assert isinstance(adversary.apgd.model, Asked)
    torch.testing.assert_close(adversary.get_logits(x), model(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int8])
def test_labels_of_any_whole_numbers(dtype: torch.dtype) -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1).to(dtype)
    assert attacked(model, x, y, ["apgd-ce"])[0].robust_accuracy < 1
    assert evaluate(model, x, y, ["apgd-ce", "torchattacks:FGSM"], Settings(0.05))["clean"]["accuracy"] == 1
    with pytest.raises(ValueError, match="labels holds 9, but the model scores 5 classes"):
        APGD(model, eps=0.1, steps=1)(x, torch.full_like(y, 9))


def test_callers_and_tensors_in_inference_mode() -> None:
    model, x = Ensemble([Linear(), Linear(1)]).eval(), images()
    y = model(x).argmax(1)
    attacks = [MORA(model, eps=0.05, steps=3), "apgd-ce", "fab-t", "torchattacks:PGD?steps=3"]
    names = ["crossmax-transfer", "torchattacks:PGD?steps=3"]
    expected = attacked(model, x, y, attacks)[1]
    with torch.inference_mode():
        within, labels = x.clone(), y.clone()
        found = attacked(model, within, labels, attacks)[1]
        inside = evaluate(model, within, labels, names, Settings(0.05))
    assert torch.equal(found, expected)
    assert torch.equal(attacked(model, within, labels, attacks)[1], expected)
    assert evaluate(model, within, labels, names, Settings(0.05)) == inside
    assert not found.is_inference()


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = Linear()
    for entrance in (as_module, AutoAttack, lambda net: judge(net, images(), torch.zeros(6).long(), images(), eps=1)):
        with pytest.raises(TypeError, match=r"made in torch\.inference_mode\(\).*pass copy\.deepcopy"):
            entrance(model)


class Careless(torchattacks.attack.Attack):
    """Looks inside the model, raises at its second call, and holds another attack."""

    def __init__(self, model: nn.Module, fails: bool) -> None:
        super().__init__("Careless", model)
        self.inner, self.fails = torchattacks.FGSM(model, eps=0.01), fails

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(self.model, Asked)
        assert self.inner.model is self.model
        assert self.model.layer.out_features == CLASSES
        if self.fails:
            raise RuntimeError("enough")
        return self.inner(images, labels)


@pytest.mark.parametrize("fails", [False, True])
def test_an_attack_of_others_gets_its_models_back(fails: bool) -> None:
    model = Linear().half()
    attack, x = Careless(model, fails), images(dtype=torch.half)
    arguments: dict[str, Any] = dict(seed=0, batch_size=4, eps=0.01)
    if fails:
        with pytest.raises(RuntimeError, match="enough"):
            craft(attack, x, model(x).argmax(1), **arguments)
    else:
        assert not outside(x, craft(attack, x, model(x).argmax(1), **arguments), eps=0.01).any()
    assert attack.model is model
    assert attack.inner.model is model


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float32, torch.double])
@pytest.mark.parametrize("default", [torch.float32, torch.double])
def test_normalised_images_keep_their_type(dtype: torch.dtype, default: torch.dtype) -> None:
    model, x = Linear().to(dtype), images(dtype=torch.double)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        attack = APGD(model, eps=0.05, steps=3)
        attack.set_normalization_used([0.3], [0.4])
        given = ((x - 0.3) / 0.4).to(dtype)
        found = attack(given, model(given).argmax(1))
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == dtype
    assert (found - given).abs().max() <= 0.05 / 0.4 + 16 * torch.finfo(dtype).eps
