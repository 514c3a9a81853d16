"""The convergence of attacks that keep no trace of their own, by what they ask the model about."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses import load_model
from ensemble_attacks.evaluation.runner import Attacked, evaluate
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.evaluation.watch import Watch, watched
from ensemble_attacks.models.passes import count_passes, uncounted


def attacked(model: nn.Module, x: Tensor, y: Tensor, name: str, settings: Settings) -> Attacked:
    left: dict[str, Attacked] = {}
    evaluate(model, x, y, [name], settings, keep=left.__setitem__)
    return left[name]


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("apgd-ce?steps=10", 0.1),
        ("square", 0.3),
        ("crossmax-transfer?refine_steps=5", 0.2),
        ("torchattacks:APGD?steps=5", 0.1),
    ],
)
def test_a_curve_ends_where_the_judge_does(digits: tuple[Tensor, Tensor], name: str, eps: float) -> None:
    model = load_model("gal_convnet_3", dataset="digits", vote="voting")
    done = attacked(model, digits[0][:20], digits[1][:20], name, Settings(eps, batch_size=7))
    first, last = done.trace[0], done.trace[-1]
    assert first["step"] == 0
    assert first["robust"] + first["fooled"] == 20
    assert last["robust"] == int(done.judgement.robust.sum())
    assert [sum(row[kind] for row in done.trace) for kind in ("forwards", "backwards")] == [done.forwards, done.backwards]


def test_batches_do_not_change_a_curve(digits: tuple[Tensor, Tensor]) -> None:
    model = load_model("gal_convnet_3", dataset="digits", vote="voting")
    x, y = digits[0][:12], digits[1][:12]
    whole, parts = (attacked(model, x, y, "torchattacks:PGD", Settings(0.2, batch_size=size)).trace for size in (12, 5))
    steps = [[(row["step"], row["forwards"], row["backwards"]) for row in rows] for rows in (whole, parts)]
    assert steps[0] == steps[1]


def test_one_draw_of_a_random_model_is_no_success(digits: tuple[Tensor, Tensor]) -> None:
    model = load_model("gal_convnet_3", dataset="digits", vote="softmax")
    done = attacked(model, digits[0][:4], digits[1][:4], "torchattacks:PGD", Settings(0.2, draws=2, eot_iter=1))
    assert done.trace == []


@pytest.fixture
def watch() -> Watch:
    return Watch(torch.tensor([[0.0], [0.5], [1.0]]), torch.tensor([0, 0, 0]), Settings(0.2))


def scores_of(*predicted: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(predicted, dtype=torch.long), 2).float()


def test_only_images_in_the_ball_count(watch: Watch) -> None:
    watch.see(torch.tensor([[0.1], [0.71], [1.0]]), scores_of(1, 1, 0))
    assert [row["fooled"] for row in watch.rows()] == [1]
    watch.see(torch.tensor([[0.65]]), scores_of(1))
    assert [row["fooled"] for row in watch.rows()] == [1, 1]
    assert watch.rows()[-1]["robust"] == 1


def test_what_is_no_sample_and_no_decision_is_no_success(watch: Watch) -> None:
    watch.see(torch.zeros(2, 2), scores_of(1, 1))()
    watch.see(torch.zeros(0, 1), scores_of())()
    assert sum(row["forwards"] for row in watch.rows()) == 0
    watch.see(torch.tensor([[0.1]]), torch.tensor([[0.0, torch.nan]]))()
    assert [row["fooled"] for row in watch.rows()] == [0]


def test_many_steps_share_a_row(watch: Watch) -> None:
    for _ in range(2000):
        watch.see(torch.tensor([[0.5]]), scores_of(0))()
    rows = watch.rows()
    assert len(rows) < 500
    assert sum(row["backwards"] for row in rows) == 2000
    last = {row["step"] for row in rows}
    assert set(range(128)) <= last
    assert {1999 | 15} <= last


def test_checks_are_not_watched() -> None:
    counted = count_passes(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    x, y = torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    rows: Callable[[], list[dict[str, Any]]]
    with watched(counted, x, y, Settings(0.1)) as rows, torch.no_grad():
        with uncounted(counted):
            counted(x)
        counted(x[:2])
    counted(x)
    assert [row["forwards"] for row in rows()] == [2]
