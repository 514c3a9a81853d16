"""A class that a member gives no probability at all, a logit of -inf, costs no attack its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks import APGD, MORA, Ensemble
from ensemble_attacks.models.ask import ask, ask_members
from ensemble_attacks.scores import bounded_below


class Without(nn.Module):
    """A network that can answer all classes but one."""

    def __init__(self, net: nn.Module, absent: int, score: float) -> None:
        super().__init__()
        self.net, self.absent, self.score = net, absent, score

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).index_fill(1, torch.tensor(self.absent), self.score)


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


def test_what_is_asked_of_a_model_is_finite_and_in_the_same_order() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 3.0], [0.0, 2.0, 1.0]])
    asked = ask(lambda x: scores, torch.rand(2, 4))
    assert torch.equal(asked.argsort(1), scores.argsort(1))
    assert torch.equal(asked[scores.isfinite()], scores[scores.isfinite()])
    assert asked.isfinite().all()

    class Members:
        def member_logits(self, x: Tensor) -> Tensor:
            return torch.stack([scores, scores])

    assert ask_members(Members(), torch.rand(2, 4)).isfinite().all()


def test_scores_that_decide_nothing_stay_as_they_are() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf], [torch.inf, -torch.inf], [torch.nan, -torch.inf]])
    assert torch.equal(bounded_below(scores).nan_to_num(7), scores.nan_to_num(7))
