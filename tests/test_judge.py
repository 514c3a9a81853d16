"""The judge believes nobody: it measures ball and box itself, and predicts afresh."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import OutOfBallError, judge
from ensemble_attacks.judge import wilson_interval
from tests.helpers import make_ensemble

EPS = 8 / 255


class Pixel(nn.Module):
    """Class 1 where the first pixel exceeds 0.5; NaN, inf or chance on request."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, 0, 0, 0] - 0.5
        score = torch.where(torch.rand(len(x)) < self.noise, -score, score)
        score = torch.where(x[:, 0, 1, 1] > 0.9, torch.nan, score)
        score = torch.where(x[:, 0, 2, 2] > 0.9, torch.inf, score)
        return torch.stack([-score, score], 1)


def images(n: int = 10) -> tuple[Tensor, Tensor]:
    x = torch.full((n, 1, 4, 4), 0.5)
    x[:, 0, 0, 0] = 0.52
    return x, torch.ones(n, dtype=torch.long)


def test_robust_and_fooled() -> None:
    x, y = images()
    x_adv = x.clone()
    x_adv[:4, 0, 0, 0] = 0.49
    verdict = judge(Pixel(), x, y, x_adv, eps=EPS)
    assert verdict.fooled.tolist() == [True] * 4 + [False] * 6
    assert verdict.robust.tolist() == [False] * 4 + [True] * 6
    assert not verdict.invalid.any()
    assert verdict.accuracy == pytest.approx(0.6)
    assert "60.0% robust" in str(verdict)
    assert verdict.summary()["fooled"] == 4


@pytest.mark.parametrize("pixel", [1, 2])
def test_nan_and_inf_scores_are_invalid(pixel: int) -> None:
    x, y = images()
    x[3, 0, pixel, pixel] = 0.95
    for labels in (y, 1 - y):  # argmax of a NaN row is 0: neither a success nor a failure may come of it
        verdict = judge(Pixel(), x, labels, x, eps=EPS)
        assert verdict.invalid.tolist() == [index == 3 for index in range(10)]
        assert not (verdict.robust | verdict.fooled)[3]
    assert "1 invalid" in str(verdict)
    assert verdict.summary()["invalid"] == 1


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_image_out_of_the_ball_is_an_error_that_names_it(norm: str) -> None:
    x, y = images()
    x_adv = x.clone()
    x_adv[7, 0, 1, 1] += EPS + 1e-5
    with pytest.raises(OutOfBallError, match=rf"x_adv\[7\] leaves the {norm} ball .* by 1e-05"):
        judge(Pixel(), x, y, x_adv, eps=EPS, norm=norm)


def test_box_and_finiteness() -> None:
    x, y = images()
    x[2, 0, 3, 3] = 1.0
    outside, broken = x.clone(), x.clone()
    outside[2, 0, 3, 3] += 0.01
    broken[5, 0, 3, 3] = torch.nan
    with pytest.raises(OutOfBallError, match=r"x_adv\[2\] leaves \[0, 1\] by 0.01"):
        judge(Pixel(), x, y, outside, eps=EPS)
    with pytest.raises(OutOfBallError, match=r"x_adv\[5\] is not finite"):
        judge(Pixel(), x, y, broken, eps=EPS)


def test_float32_rounding_is_not_an_offence() -> None:
    x = torch.rand(100, 3, 8, 8)
    x_adv = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    judge(make_flat(), x, torch.zeros(100, dtype=torch.long), x_adv, eps=EPS)


def test_half_precision_has_no_wider_ball() -> None:
    x = torch.full((4, 3, 8, 8), 0.5, dtype=torch.bfloat16)
    x_adv = x.clone()
    x_adv[2] += 0.0078125
    with pytest.raises(OutOfBallError, match=r"x_adv\[2\]"):
        judge(make_flat().bfloat16(), x, torch.zeros(4, dtype=torch.long), x_adv, eps=0.001)


def make_flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


def test_random_models_are_judged_on_fresh_draws() -> None:
    x, y = images(2000)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    verdict = judge(Pixel(noise=0.2), x, y, x, eps=EPS, draws=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert verdict.accuracy == pytest.approx(0.8, abs=0.01)
    assert verdict.robust.double().mean() > 0.98  # more than half of the draws
    assert verdict.worst_of_draws == pytest.approx(0.8**20, abs=0.01)
    assert verdict.summary()["draws"] == 20
    low, high = verdict.interval
    assert low < 0.8 < high
    assert torch.equal(judge(Pixel(noise=0.2), x, y, x, eps=EPS, draws=20).correct, verdict.correct)


def test_the_model_is_judged_in_eval_mode_and_left_as_it_was(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = make_ensemble().train()
    assert judge(model, x, y, x, eps=EPS).accuracy == 1.0
    assert all(module.training for module in model.modules())


def test_wilson_against_scipy() -> None:
    from scipy.stats import binomtest

    for k, n in ((0, 10), (3, 10), (10, 10), (137, 500)):
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bad_arguments() -> None:
    x, y = images()
    with pytest.raises(ValueError, match="eps"):
        judge(Pixel(), x, y, x, eps=0)
    with pytest.raises(ValueError, match="no images"):
        judge(Pixel(), x[:0], y[:0], x[:0], eps=EPS)
    with pytest.raises(ValueError, match="draws"):
        judge(Pixel(), x, y, x, eps=EPS, draws=0)
    with pytest.raises(ValueError, match="they must be the same"):
        judge(Pixel(), x, y, x[:5], eps=EPS)
    with pytest.raises(ValueError, match="y holds 2"):
        judge(Pixel(), x, y + 1, x, eps=EPS)
    with pytest.raises(TypeError, match="x_adv has dtype"):
        judge(Pixel(), x, y, x.to(torch.uint8), eps=EPS)


@torch.no_grad()
def test_images_of_another_type_are_refused_and_the_model_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2))
    x, y = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    with pytest.raises(TypeError, match=r"x_adv has dtype torch\.float64, the model torch\.float32: pass x_adv\.to"):
        judge(model, x, y, x.double(), eps=0.1)
    assert torch.equal(model.get_buffer("0.running_mean"), torch.zeros(1))
    with pytest.raises(TypeError, match="got ndarray"):
        judge(model, x, y, x.numpy(), eps=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="returns a tuple: wrap it"):
        judge(Twice(), x, y, x, eps=0.1)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.flatten(1)
