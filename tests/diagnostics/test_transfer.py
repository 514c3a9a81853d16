"""A member that is asked alone says what it says among the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import Ensemble
from ensemble_attacks.diagnostics.transfer import Member
from ensemble_attacks.models.votes import Vote


class Counted(nn.Module):
    """A linear network that counts how often it is asked."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.asked = 0
        self.register_buffer("weight", torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        weight: Any = self.weight
        return x @ weight.T


class Shifted(Ensemble):
    """An ensemble that does something to what its members answer."""

    def member_logits(self, x: Tensor) -> Tensor:
        return super().member_logits(x).flip(-1)


@pytest.mark.parametrize(("kind", "others"), [(Ensemble, 0), (Shifted, 1)])
def test_only_its_own_network_is_run_where_that_is_all(kind: type[Ensemble], others: int) -> None:
    nets = [Counted(0), Counted(1)]
    ensemble = kind(nets, vote="voting")
    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(2))
    expected = ensemble.member_logits(x)[1]
    before = nets[0].asked
    assert torch.equal(Member(ensemble, 1)(x), expected)
    assert nets[0].asked - before == others


def test_a_vote_that_joins_members_is_asked_as_a_whole() -> None:
    def joined(x: Tensor, logits_MNK: Tensor) -> Tensor:
        return logits_MNK + x.sum()

    vote = Vote("joined", lambda logits_MNK: logits_MNK.mean(0), joined=joined)
    ensemble = Ensemble([Counted(0), Counted(1)], vote=vote)
    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(Member(ensemble, 0)(x), ensemble.member_logits(x)[0])
