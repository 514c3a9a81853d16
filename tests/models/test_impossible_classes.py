"""A class that a member gives no probability at all, a logit of -inf, costs no attack its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks import APGD, MORA, Ensemble, judge
from ensemble_attacks.models.ask import Function
from ensemble_attacks.models.view import look
from ensemble_attacks.scores import bounded_below, differ


class Without(nn.Module):
    """A network that can answer all classes but one."""

    def __init__(self, net: nn.Module, absent: int, score: float) -> None:
        super().__init__()
        self.net, self.absent, self.score = net, absent, score

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).index_fill(1, torch.tensor(self.absent), self.score)


class Scaled(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 30 * self.net(x)


@pytest.mark.parametrize("vote", ["softmax", "voting", "logits"])
@pytest.mark.parametrize("make", [MORA, MORA.published, MORA.released, APGD])
def test_attacks_find_what_they_find_where_the_class_is_only_very_unlikely(vote: str, make: Callable[..., Attack]) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(16, 5)) for _ in range(3)]
    images = torch.rand(10, 1, 4, 4)
    right = []
    for score in (-1e4, -torch.inf):
        members = [Without(net, absent, score) for net, absent in zip(nets, (4, 4, 3), strict=True)]
        members[0] = Without(members[0], 3, score)
        model = Ensemble(members, vote=vote).eval()
        labels = model(images).argmax(1)
        options = {} if make is APGD else {"betas": (0.5, 0.0)}
        right.append(model(make(model, eps=0.1, steps=4, **options)(images, labels)).argmax(1) == labels)
    assert right[0].sum() < 8
    assert right[0].equal(right[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_seen_of_a_model_is_finite_and_in_the_same_order(dtype: torch.dtype) -> None:
    scores = torch.tensor([[30.0, -torch.inf, -40.0], [0.0, 2.0, 1.0]], dtype=dtype)
    seen = look(Function(lambda x: scores), torch.rand(2, 4)).scores_NK
    assert torch.equal(seen.argsort(1), scores.argsort(1))
    assert torch.equal(seen[scores.isfinite()], scores[scores.isfinite()])
    assert (seen[:, :1] - seen).isfinite().all()


def test_the_judge_sees_the_scores_as_they_are() -> None:
    """A member of small weight rules a class out that another one, of large scores, prefers."""
    torch.manual_seed(0)
    net, sure = (nn.Sequential(nn.Flatten(), nn.Linear(16, 5)) for _ in range(2))
    model = Ensemble([Without(net, 0, -torch.inf), Scaled(sure)], vote="logits", weights=[0.001, 0.999]).eval()
    images = torch.rand(50, 1, 4, 4)
    labels = torch.zeros(50, dtype=torch.long)
    assert not model(images).argmax(1).eq(0).any()
    assert judge(model, images, labels, images, eps=0.1).accuracy == 0


def test_noise_is_seen_beside_a_class_that_cannot_be() -> None:
    scores = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert differ(scores, scores + torch.tensor([[0.0, 0.01, 0.0]]))
    assert differ(scores, torch.tensor([[1.0, -torch.inf, 2.0]]))
    assert not differ(scores, scores)


def test_scores_that_decide_nothing_stay_as_they_are() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf], [torch.inf, -torch.inf], [torch.nan, -torch.inf]])
    assert torch.equal(bounded_below(scores).nan_to_num(7), scores.nan_to_num(7))
