"""Bad input: a typed error that names the argument, the value and the remedy, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import APGD, MORA, PGD, Ensemble, evaluate, judge
from tests.helpers import make_ensemble

MAKE = pytest.mark.parametrize("make", [MORA, APGD])


class Untouchable(nn.Module):
    """An ensemble that must not be run."""

    vote = "softmax"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def member_logits(self, x: Tensor) -> Tensor:
        raise AssertionError("work was done before the check")

    forward = aggregate = member_logits


X, Y = torch.full((4, 3, 6, 6), 0.5), torch.tensor([0, 1, 2, 3])

BAD_INPUTS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "8-bit": ((X * 255).to(torch.uint8), Y, TypeError, "float"),
    "0-255": (X * 255, Y, ValueError, r"Divide 8-bit images by 255"),
    "negative": (X - 1, Y, ValueError, r"\[0, 1\].*set_normalization_used"),
    "nan": (torch.where(X > 0, torch.nan, X), Y, ValueError, "NaN"),
    "inf": (X / 0, Y, ValueError, "infinite"),
    "one image": (X[0], Y, ValueError, r"labels has shape \(4,\): expected \(3,\)"),
    "one vector": (X[0].flatten(), Y, ValueError, r"at least two dimensions"),
    "numpy": (X.numpy(), Y, TypeError, "images must be a torch.Tensor"),
    "float labels": (X, Y.float(), TypeError, r"labels.long\(\)"),
    "bool labels": (X, Y > 1, TypeError, "bool"),
    "list of labels": (X, [0, 1, 2, 3], TypeError, "labels must be a torch.Tensor"),
    "no labels": (X, None, TypeError, "labels must be a torch.Tensor"),
    "one-hot labels": (X, torch.eye(4).long(), ValueError, r"argmax\(1\)"),
    "too few labels": (X, Y[:3], ValueError, r"expected \(4,\)"),
    "negative label": (X, Y - 1, ValueError, "start at 0"),
}


@MAKE
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_images_and_labels(make: type, case: str) -> None:
    images, labels, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        make(Untouchable())(images, labels)


@MAKE
def test_a_label_beyond_the_classes(make: type) -> None:
    with pytest.raises(ValueError, match="labels holds 4, but the model scores 4 classes"):
        make(make_ensemble(dtype=torch.float32))(X, Y + 1)


BAD_SETTINGS: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"eps": 0}, ValueError, "eps must be a finite number above 0, got 0"),
    ({"eps": -0.1}, ValueError, "eps"),
    ({"eps": float("nan")}, ValueError, "eps"),
    ({"eps": float("inf")}, ValueError, "eps"),
    ({"eps": "8/255"}, TypeError, "eps must be a number, got '8/255'"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 1.5}, TypeError, "steps must be a whole number"),
    ({"norm": "linf"}, ValueError, "did you mean 'Linf'"),
    ({"norm": "L1"}, ValueError, "unknown norm 'L1'"),
    ({"seed": None}, TypeError, "seed"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"batch_size": 0}, ValueError, "batch_size"),
]


@MAKE
@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS)
def test_bad_settings(make: type, settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(Untouchable(), **settings)
    attack = make(Untouchable())
    for name, value in settings.items():
        setattr(attack, name, value)
    with pytest.raises(error, match=message):
        attack(X, Y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MORA(Untouchable(), betas=(0.5, 1.1)), "betas must lie in"),
        (lambda: MORA(Untouchable(), betas=(-0.1,)), "betas must lie in"),
        (lambda: MORA(Untouchable(), betas=(float("nan"),)), "betas must lie in"),
        (lambda: MORA(Untouchable(), betas=()), "at least one number"),
        (lambda: MORA(Untouchable(), betas=0.5), "sequence"),  # type: ignore[arg-type]
        (lambda: MORA(Untouchable(), betas=None), "sequence"),  # type: ignore[arg-type]
        (lambda: MORA(Untouchable(), targets=-1), "targets must be at least 0"),
        (lambda: MORA(Untouchable(), tau=0.0), "tau"),
        (lambda: MORA(Untouchable(), weight_rule="derivatives"), "did you mean 'derivative'"),
        (lambda: APGD(Untouchable(), loss="cw"), "unknown loss 'cw'"),
        (lambda: APGD(Untouchable(), n_restarts=0), "n_restarts"),
        (lambda: APGD(Untouchable(), rho=1.5), "rho"),
    ],
)
def test_bad_settings_of_one_attack(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


MODEL, LABELS = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "images", [torch.rand(2, 1, 4, 4).to_sparse(), torch.rand(2, 1, 4, 4, device="meta")], ids=["sparse", "meta"]
)
def test_images_that_hold_no_values_of_their_own(images: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="dense tensor"):
        APGD(MODEL, eps=0.1, steps=2)(images, LABELS)
    with pytest.raises(TypeError, match="dense tensor"):
        judge(MODEL, torch.rand(2, 1, 4, 4), LABELS, images, eps=0.1)
    with pytest.raises(TypeError, match="dense tensor"):
        evaluate(MODEL, (images, LABELS), eps=0.1, attacks="pgd")


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_the_judge_s_seed_is_a_seed(seed: Any) -> None:
    images = torch.rand(2, 1, 4, 4)
    with pytest.raises((TypeError, ValueError), match="seed must be"):
        judge(MODEL, images, LABELS, images, eps=0.1, seed=seed)


def test_several_networks_are_made_one_by_as_ensemble() -> None:
    with pytest.raises(TypeError, match="as_ensemble"):
        MORA([nn.Linear(4, 2), nn.Linear(4, 2)], eps=0.1)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    model = make_ensemble(dtype=torch.float32)
    betas = np.array([0.5, 0.0], dtype=np.float32)
    settings: dict[str, Any] = dict(eps=np.float32(0.1), steps=np.int64(3), betas=betas, seed=np.int32(1))
    assert MORA(model, **settings)(X, Y).shape == X.shape


def test_dlr_needs_enough_classes() -> None:
    model = make_ensemble(classes=2, dtype=torch.float32)
    labels = torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="needs at least 3 classes, the model has 2"):
        APGD(model, loss="dlr")(X, labels)
    with pytest.raises(ValueError, match="needs at least 4 classes"):
        APGD(model, loss="dlr-targeted")(X, labels)
    assert MORA(model, steps=3, targets=9)(X, labels).shape == X.shape


class Detached(nn.Module):
    """Has gradients, but none of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.detach())


class OneHot(nn.Module):
    """Shows only which class it predicts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(x.flatten(1)[:, :4].argmax(1), 4).float()


@pytest.mark.parametrize("kind", [OneHot, Detached])
@pytest.mark.parametrize("attack", [APGD, PGD, MORA])
def test_a_model_without_a_gradient_is_told_what_to_do(attack: type, kind: type[nn.Module]) -> None:
    model = Ensemble([kind(), kind()]) if attack is MORA else kind()
    images = torch.rand(4, 3, 6, 6)
    labels = model(images).argmax(1)
    with pytest.raises(ValueError, match=r"scores have no gradient: .*ZeroOrder"):
        attack(model, eps=1e-6, steps=2)(images, labels)


def test_images_of_another_type_than_the_model() -> None:
    model = make_ensemble(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"images has dtype torch.float64, the model torch.float32: pass images.to"):
        APGD(model, steps=2)(X.double(), Y)

    class Converts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x.float())

    assert APGD(Converts(), steps=2)(X.double(), Y).dtype == torch.float64
