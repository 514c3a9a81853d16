"""Any input, in any box: what the attacks find on linear models is the worst case, which is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import A3, APGD, MORA, PGD, Box, BPDAIdentity, CrossMaxTransfer, Ensemble, OutOfBallError, judge

SHAPES = {"rows": (20,), "signals": (2, 15), "odd images": (3, 6, 8), "video": (3, 2, 4, 4)}
KINDS = ("unit", "[-1, 1]", "bytes", "features")  # of boxes
N = 24


class Linear(nn.Module):
    """Two classes, ``w . x + b`` apart."""

    def __init__(self, features: int, seed: int = 0) -> None:
        super().__init__()
        self.head = nn.Linear(features, 1, dtype=torch.double)
        generator = torch.Generator().manual_seed(seed)
        self.head.weight.data = torch.randn(1, features, generator=generator, dtype=torch.double)
        self.head.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        score = self.head(x.flatten(1))
        return torch.cat([score, -score], 1)


def boxes(shape: tuple[int, ...]) -> dict[str, Box]:
    low = torch.linspace(-3, 5, torch.Size(shape).numel(), dtype=torch.double).view(shape)
    return {"unit": Box(), "[-1, 1]": Box(-1, 1), "bytes": Box(0, 255), "features": Box(low, low + 0.5 + low.abs())}


def inputs(shape: tuple[int, ...], box: Box) -> tuple[Linear, Tensor, Tensor]:
    share = torch.rand(N, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    x = box.low + box.width * share
    model = Linear(x[0].numel()).eval()
    model.head.weight.data /= torch.as_tensor(box.width, dtype=torch.double).mean()  # larger scores' cross-entropy is flat
    model.head.bias.data = -(x.flatten(1) @ model.head.weight[0]).median(0).values.view(1)
    return model, x, model(x).argmax(1)


def least_margin(model: Linear, x: Tensor, y: Tensor, reach: Tensor, box: Box) -> Tensor:
    """The smallest of ``z_y - z_other`` with ``|d| <= reach`` in the box, feature by feature, (N,)."""
    sign = (1 - 2 * y).view(-1, *[1] * (x.dim() - 1)).double()
    slope = sign * model.head.weight.view(x.shape[1:])  # of the margin over 2
    worst = torch.where(
        slope > 0, (x - reach).maximum(torch.as_tensor(box.low)), (x + reach).minimum(torch.as_tensor(box.high))
    )
    scores = model(worst)
    return scores.gather(1, y[:, None])[:, 0] - scores.gather(1, 1 - y[:, None])[:, 0]


ATTACKS: dict[str, Any] = {
    "apgd": lambda model, **given: APGD(model, steps=20, **given),
    "pgd": lambda model, **given: PGD(model, steps=20, n_restarts=1, **given),
    "mora": lambda model, **given: MORA(Ensemble([model], "softmax").eval(), steps=20, betas=(0.5,), **given),
    "crossmax": lambda model, **given: CrossMaxTransfer(
        Ensemble([model]).eval(), attack=APGD, refine=APGD, refine_steps=10, steps=20, **given
    ),
}


# every two of attack, shape and box meet in the default run, all three with -m slow
LATIN = [
    pytest.param(name, shape, kind, marks=[] if (i + j + k) % 4 == 0 else pytest.mark.slow)
    for i, name in enumerate(ATTACKS)
    for j, shape in enumerate(SHAPES)
    for k, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "shape", "kind"), LATIN)
def test_the_worst_case_of_a_linear_model(name: str, shape: str, kind: str) -> None:
    box = boxes(SHAPES[shape])[kind]
    model, x, y = inputs(SHAPES[shape], box)
    width = torch.as_tensor(box.width, dtype=torch.double).expand(SHAPES[shape])
    first = torch.zeros(SHAPES[shape], dtype=torch.bool)
    first[..., ::2] = True
    whole = torch.ones_like(first)
    eps = 0.05 * width.mean().item()
    for radius, mask in ((eps, None), (eps, first), (0.05 * width, None), (0.05 * width, first)):
        reach = radius * (whole if mask is None else mask).double()
        adversarial = ATTACKS[name](model, eps=radius, box=box, mask=mask)(x, y)
        assert ((adversarial - x).abs() <= reach).all()
        verdict = judge(model, x, y, adversarial, eps=radius, box=box, mask=mask)
        least = least_margin(model, x, y, reach, box)
        assert torch.equal(verdict.fooled, least < 0)
        robust = verdict.robust
        torch.testing.assert_close(verdict.margin[robust], least[robust], rtol=1e-3, atol=1e-3)
        assert 0 < int(robust.sum()) < N


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_feature", [False, True])
def test_the_l2_ball_of_any_input(shape: str, per_feature: bool) -> None:
    """In a box with room, the worst case of a linear model lies along its slope, in the ball's own units."""
    box = Box(-100, 100)
    features = torch.Size(SHAPES[shape]).numel()
    x = torch.randn(N, *SHAPES[shape], dtype=torch.double, generator=torch.Generator().manual_seed(1))
    model = Linear(features).eval()
    y = model(x).argmax(1)
    mask = torch.arange(features).view(SHAPES[shape]) % 3 > 0
    eps: Any = torch.linspace(0.1, 1, features, dtype=torch.double).view(SHAPES[shape]) if per_feature else 0.3
    slope = (model.head.weight.view(SHAPES[shape]) * mask * eps).norm()
    given: dict[str, Any] = {"norm": "L2", "eps": eps, "box": box, "mask": mask}
    for attack in (APGD(model, steps=30, **given), A3(model, n_restarts=2, **given)):
        verdict = judge(model, x, y, attack(x, y), **given)
        scores = model(x)
        least = (scores[:, 0] - scores[:, 1]).abs() - 2 * slope
        assert torch.equal(verdict.fooled, least < 0)
        torch.testing.assert_close(verdict.margin[verdict.robust], least[verdict.robust], rtol=1e-2, atol=1e-2)


def test_the_judge_sees_what_moved_behind_the_mask_or_beyond_its_feature() -> None:
    model, x, y = inputs((20,), Box())
    mask = torch.arange(20) > 0
    moved = x.clone()
    moved[3, 0] += 1e-3 if x[3, 0] < 0.5 else -1e-3
    for norm, eps in (("Linf", 0.1), ("L2", 0.1), ("Linf", torch.full((20,), 0.1))):
        with pytest.raises(OutOfBallError, match=r"x_adv\[3\] leaves the"):
            judge(model, x, y, moved, norm=norm, eps=eps, mask=mask)
    with pytest.raises(OutOfBallError, match=r"x_adv\[3\] leaves the"):
        judge(model, x, y, moved, eps=torch.linspace(0.0005, 0.1, 20))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: {"box": Box(1, 0)}, ValueError, "low must be below high"),
        (lambda: {"box": Box(torch.zeros(20), -torch.ones(20))}, ValueError, "low must be below high"),
        (lambda: {"box": Box(0, float("inf"))}, ValueError, "must be finite"),
        (lambda: {"box": Box("0", 1)}, TypeError, "a number or a tensor"),  # type: ignore[arg-type]
        (lambda: {"box": Box(torch.zeros(7), torch.ones(7))}, ValueError, "box has shape"),
        (lambda: {"mask": torch.zeros(20, dtype=torch.bool)}, ValueError, "nothing may move"),
        (lambda: {"mask": torch.ones(20)}, TypeError, "mask must be a bool tensor"),
        (lambda: {"mask": torch.ones(7, dtype=torch.bool)}, ValueError, "mask has shape"),
        (lambda: {"eps": torch.zeros(20)}, ValueError, "eps per feature"),
        (lambda: {"eps": torch.ones(7)}, ValueError, "eps has shape"),
        (lambda: {"eps": torch.ones(20, dtype=torch.long)}, TypeError, "eps has dtype"),
    ],
)
def test_bad_boxes_masks_and_radii(given: Any, error: type[Exception], message: str) -> None:
    model, x, y = inputs((20,), Box())
    asked: list[int] = []
    model.register_forward_hook(lambda *_: asked.append(1))
    for call in (
        lambda **options: APGD(model, **{"eps": 0.1, **options})(x, y),
        lambda **options: judge(model, x, y, x, **{"eps": 0.1, **options}),
    ):
        with pytest.raises(error, match=message):
            call(**given())
    assert not asked


def test_a_part_that_knows_no_box() -> None:
    import torchattacks

    model, x, y = inputs((3, 6, 8), Box(-1, 1))
    attack = BPDAIdentity(nn.Sequential(nn.Identity(), model).eval(), torchattacks.PGD, parts="0")
    attack.box = Box(-1, 1)
    with pytest.raises(ValueError, match="PGD knows no box"):
        attack(x, y)
