"""Twelve kinds of model and data that evaluations meet: each is evaluated rightly, or refused by one clear message."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from tests.helpers import make_member

ATTACKS = ("apgd-ce?steps=20", "pgd?steps=20")
N = 12


class Wrapped(nn.Module):
    """A sound network, and what happens to its scores."""

    calls: Tensor

    def __init__(self, change: Callable[[Wrapped, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.net = make_member().float()
        self.change = change
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> object:
        return self.change(self, x, self.net(x))


def dark(x: Tensor) -> Tensor:
    """The darkest third of the images that `data` makes."""
    return (x.flatten(1).mean(1) < 0.4)[:, None]


def counting(model: Wrapped, x: Tensor, scores: Tensor) -> Tensor:
    model.calls += 1
    return scores


def remembering(model: Wrapped, x: Tensor, scores: Tensor) -> Tensor:
    model.calls += 1
    return scores + model.calls % 2  # the same for all classes: no other verdict


def seeding(model: Wrapped, x: Tensor, scores: Tensor) -> Tensor:
    torch.manual_seed(0)
    return scores + 1e-4 * torch.randn_like(scores)


def fussy(model: Wrapped, x: Tensor, scores: Tensor) -> Tensor:
    if len(x) == 1:
        raise IndexError("Dimension out of range (expected to be in range of [-1, 0], but got 1)")
    return scores


WORK: dict[str, Callable[[Wrapped, Tensor, Tensor], object]] = {
    "probabilities": lambda model, x, scores: scores.softmax(1),
    "mutates its buffers": counting,
    "keeps state": remembering,
    "calls torch.manual_seed": seeding,
    "half precision": lambda model, x, scores: scores.half(),
    "forgets eval()": lambda model, x, scores: scores,
}
REFUSED: dict[str, tuple[Callable[[Wrapped, Tensor, Tensor], object], type[Exception], str]] = {
    "a tuple": (lambda model, x, scores: (scores, x), TypeError, "returns a tuple: wrap it"),
    "a dictionary": (lambda model, x, scores: {"boxes": scores, "scores": scores}, TypeError, "returns a dict: wrap it"),
    "one score": (lambda model, x, scores: scores[:, :1], ValueError, r"shape \(1, 1\) for 1 images"),
    "a map of scores": (lambda model, x, scores: scores[..., None], ValueError, r"shape \(1, 4, 1\) for 1 images"),
    "integers": (lambda model, x, scores: scores.argsort(1), TypeError, "expected floating-point scores"),
}


def data() -> tuple[Tensor, Tensor]:
    x = torch.rand(N, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[::3] *= 0.6
    return x, make_member().float()(x).argmax(1)


def run(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 6, attacks: tuple[str, ...] = ATTACKS) -> dict:
    return evaluate(model, x, y, attacks, Settings(eps=0.04, batch_size=batch_size))


@cache
def sound_summary() -> dict:
    return run(make_member().float(), *data())


@pytest.mark.parametrize("kind", WORK)
def test_is_evaluated_as_the_sound_model_is_and_left_as_it_was(kind: str) -> None:
    x, y = data()
    sound = sound_summary()
    model = Wrapped(WORK[kind])
    model.train(kind == "forgets eval()")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, mode = torch.get_rng_state(), model.training
    summary = run(model, x, y)
    assert summary["clean"]["robust"] == sound["clean"]["robust"] == N
    assert abs(summary["worst_case"]["robust"] - sound["worst_case"]["robust"]) <= 1  # half precision has ties
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_before_any_attack(kind: str) -> None:
    change, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        run(Wrapped(change), *data())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_no_success_and_are_counted(value: float) -> None:
    def corner(model: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
        return torch.where(dark(x), value, scores)

    x, y = data()
    broken = int(dark(x).sum())
    assert 0 < broken < N
    summary = run(Wrapped(corner), x, y)
    assert summary["clean"]["invalid"] == broken
    for row in summary["attacks"].values():
        assert row["robust"] + row["fooled"] + row["invalid"] == N
        assert row["invalid"] >= broken
    assert summary["worst_case"]["robust"] <= N - broken


def test_a_model_that_raises_on_a_batch_of_one_is_not_silently_skipped() -> None:
    x, y = data()
    with pytest.raises(IndexError, match="Dimension out of range"):
        run(Wrapped(fussy), x[:11], y[:11], batch_size=5)


@pytest.mark.parametrize(
    ("label", "message"), [(4, "holds 4, but the model scores 4 classes"), (-1, "class indices start at 0")]
)
def test_labels_out_of_range(label: int, message: str) -> None:
    x, y = data()
    y[-1] = label
    with pytest.raises(ValueError, match=message):
        run(make_member().float(), x, y)
