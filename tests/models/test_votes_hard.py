"""Votes without gradient are attacked as strongly as those with one; false claims are errors or flags."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses import load_model
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import APGD, MORA, AggregateMismatchError, AutoAttack, CrossMaxTransfer, Ensemble, as_ensemble, judge
from ensemble_attacks.data import load_dataset
from ensemble_attacks.models.adopted import AdoptedEnsemble
from ensemble_attacks.models.softening import scores_of, softened
from ensemble_attacks.models.votes import Vote, as_vote
from tests.helpers import make_member

WEIGHTS = (0.4, 0.35, 0.25)


def counted(logits_MNK: Tensor) -> Tensor:
    votes_MNK = F.one_hot(logits_MNK.argmax(-1), logits_MNK.shape[-1]).to(logits_MNK.dtype)
    return torch.einsum("m,mnk->nk", torch.tensor(WEIGHTS).to(logits_MNK), votes_MNK)


def winner(logits_MNK: Tensor) -> Tensor:
    return F.one_hot(counted(logits_MNK).argmax(-1), logits_MNK.shape[-1]).to(logits_MNK.dtype)


def sure_ones(logits_MNK: Tensor) -> Tensor:
    """Count the members that are sure."""
    probabilities_MNK = logits_MNK.softmax(-1)
    return (probabilities_MNK * 0 + (probabilities_MNK > 0.6)).sum(0).detach()


class Counting(nn.Module):
    """Somebody else's ensemble, of which only the forward pass is known."""

    def __init__(self, members: list[nn.Module], vote: Callable[[Tensor], Tensor] = counted) -> None:
        super().__init__()
        self.nets, self.vote = nn.ModuleList(members), vote

    def forward(self, x: Tensor) -> Tensor:
        return self.vote(torch.stack([net(x) for net in self.nets]))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return load_dataset("digits", n=32)


@functools.cache
def members() -> list[nn.Module]:
    return list(load_model("gal_convnet_3", dataset="digits").members)


@pytest.mark.parametrize("vote", [counted, winner, sure_ones])
def test_the_weights_of_a_counted_vote_are_found(vote: Callable[[Tensor], Tensor]) -> None:
    logits_MNK = torch.randn(3, 40, 10, dtype=torch.float64, requires_grad=True)
    soft = softened(as_vote(vote), logits_MNK)
    assert soft.hard
    assert soft.soft is not None
    scores_NK = scores_of(as_vote(vote), logits_MNK)
    assert torch.equal(scores_NK, vote(logits_MNK))
    (gradient,) = torch.autograd.grad(scores_NK[:, 0].sum(), logits_MNK)
    assert gradient.abs().sum((1, 2)).min() > 0
    if vote is counted:
        assert soft.log_weights is not None
        torch.testing.assert_close(
            soft.log_weights(logits_MNK).exp().flatten(), torch.tensor(WEIGHTS).double(), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("vote", [lambda logits: logits.mean(0), lambda logits: logits.median(0).values])
def test_votes_with_a_gradient_stay_as_they_are(vote: Callable[[Tensor], Tensor]) -> None:
    theirs = as_vote(vote)
    logits_MNK = torch.randn(3, 40, 10)
    found = softened(theirs, logits_MNK)
    assert not found.hard
    assert found.aggregate is theirs.aggregate
    if found.soft is not None:  # the same, of less sure members
        torch.testing.assert_close(found.soft(logits_MNK, 2.0), vote(logits_MNK / 2))


def test_looking_for_a_soft_form_draws_nothing() -> None:
    state = torch.get_rng_state()
    softened(as_vote(counted), torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("vote", [counted, pytest.param(winner, marks=pytest.mark.slow), sure_ones])
def test_a_hard_vote_is_attacked_whoever_counts_it(vote: Callable[[Tensor], Tensor], digits: tuple[Tensor, Tensor]) -> None:
    """As a function claimed, as a `Vote` of one's own, and as another's protocol."""
    x, y = (t[:12] for t in digits)
    theirs = Counting(members(), vote).eval()

    class Protocol(Counting):
        def member_logits(self, x: Tensor) -> Tensor:
            return torch.stack([net(x) for net in self.nets])

        def aggregate(self, logits_MNK: Tensor) -> Tensor:
            return self.vote(logits_MNK)

    models = [as_ensemble(theirs, "nets", vote), Ensemble(members(), Vote("mine", vote)).eval(), Protocol(members(), vote)]
    left = [int(judge(m, x, y, MORA(m.eval(), eps=0.12, steps=10)(x, y), eps=0.12).robust.sum()) for m in models]
    assert max(left) <= min(left) + 1
    assert max(left) <= len(x) // 4


def test_attacks_on_scores_craft_on_what_is_claimed(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    adopted = as_ensemble(Counting(members()).eval(), "nets", "voting", weights=WEIGHTS)
    with torch.no_grad():
        assert torch.equal(adopted(x), Counting(members()).eval()(x))
    images = x.clone().requires_grad_()
    assert torch.equal(adopted(images), Counting(members()).eval()(x))
    robust = judge(adopted, x, y, APGD(adopted, eps=0.12, steps=20)(x, y), eps=0.12).robust
    assert robust.sum() < len(x) // 2


def test_a_gradient_that_is_zero_is_none(digits: tuple[Tensor, Tensor]) -> None:
    class Frozen(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * sum(net(x) for net in self.nets)

    adopted = as_ensemble(Frozen(members()).eval(), "nets", counted)
    images = digits[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(adopted(images)[:, 0].sum(), images)
    assert gradient.abs().sum() > 0


def abstaining(logits_MNK: Tensor) -> Tensor:
    """Two of three, or a class more."""
    counts_NK = F.one_hot(logits_MNK.argmax(-1), logits_MNK.shape[-1]).sum(0)
    nobody_N1 = counts_NK.amax(1, keepdim=True) < 2
    return torch.cat([counts_NK * ~nobody_N1, nobody_N1], 1).to(logits_MNK.dtype)


def tie_broken(logits_MNK: Tensor) -> Tensor:
    """Counts, of which autograd sees the tie-breaker alone."""
    return counted(logits_MNK) + 1e-4 * logits_MNK.softmax(-1).mean(0)


@pytest.mark.parametrize("vote", [abstaining, tie_broken])
def test_hard_votes_with_a_class_more_or_a_tie_breaker(
    vote: Callable[[Tensor], Tensor], digits: tuple[Tensor, Tensor]
) -> None:
    x, y = (t[:16] for t in digits)
    adopted = as_ensemble(Counting(members(), vote).eval(), "nets", vote, inputs=x)
    attacks = MORA(adopted, eps=0.12, steps=10), APGD(adopted, eps=0.12, steps=20)
    mora, own = (int(judge(adopted, x, y, attack(x, y), eps=0.12).robust.sum()) for attack in attacks)
    assert mora <= min(len(x) // 4, own + 1)
    assert own < len(x)


def test_members_over_other_classes_are_attacked_by_the_ensembles_scores() -> None:
    def superclasses(logits_MNK: Tensor) -> Tensor:
        return logits_MNK.unflatten(-1, (2, 2)).logsumexp(-1).mean(0)

    x = torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = Counting([make_member(4, seed).double() for seed in range(3)], superclasses).eval()
    y = theirs(x).argmax(1)
    adopted = as_ensemble(theirs, "nets", superclasses, inputs=x)
    robust, own = (judge(theirs, x, y, attack(x, y), eps=0.3).robust for attack in attacks(adopted, theirs))
    assert robust.sum() <= own.sum() + 1
    with pytest.raises(ValueError, match="the surrogate scores 4 classes, the model 2"):
        CrossMaxTransfer(adopted, attack=APGD, refine=None, eps=0.3, steps=2)(x, y)


def attacks(adopted: nn.Module, theirs: nn.Module) -> tuple[MORA, APGD]:
    return MORA(adopted, eps=0.3, steps=10), APGD(theirs, eps=0.3, steps=20)


class Other(nn.Module):
    """A model whose claim is true of some images and false of others: of those with a bright corner, it says class 0."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        scores_NK = torch.stack([net(x) for net in self.nets]).mean(0)
        return torch.where(x[:, 0, 0, :1] > 0.95, -scores_NK, scores_NK)


def test_a_claim_is_checked_on_every_image(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0].clone(), digits[1]
    x[:, 0, 0, 0] = 0
    x[-1, 0, 0, 0] = 1
    adopted = as_ensemble(Other(members()).eval(), "nets", "logits")
    with pytest.raises(AggregateMismatchError, match=r"on 1 of 32 images"):
        as_ensemble(Other(members()).eval(), "nets", "logits", inputs=x)
    MORA(adopted, eps=0.01, steps=2)(x[:8], y[:8])
    with pytest.raises(AggregateMismatchError, match=r"on 1 of 24 images"):
        MORA(adopted, eps=0.01, steps=2, batch_size=5)(x[8:], y[8:])

    class Protocol(Other):
        def member_logits(self, x: Tensor) -> Tensor:
            return torch.stack([net(x) for net in self.nets])

        def aggregate(self, logits_MNK: Tensor) -> Tensor:
            return logits_MNK.mean(0)

    with pytest.raises(AggregateMismatchError, match=r"on 1 of 32 images"):
        MORA(Protocol(members()).eval(), eps=0.01, steps=2, batch_size=5)(x, y)


def test_autoattack_flags_a_false_claim(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0].clone(), digits[1]
    x[:, 0, 0, 0] = 0
    x[-1, 0, 0, 0] = 1
    settings: dict[str, Any] = dict(eps=0.001, seed=0, verbose=False, attacks_to_run=["torchattacks:FGSM"])
    host = AutoAttack(as_ensemble(Other(members()).eval(), "nets", "logits"), **settings)
    host.run_standard_evaluation(x, y, bs=16)
    assert [flag.value for flag in host.flags if flag.name == "claim"] == [1, 1]
    host = AutoAttack(as_ensemble(Other(members()).eval(), "nets", "logits"), **(settings | {"eps": 0.96}))
    host.run_standard_evaluation(x[:8], y[:8])
    flagged = [flag for flag in host.flags if flag.name == "claim"]
    assert ["adversarial" in flag.message for flag in flagged] == [True]


def test_ties_are_no_false_claim(digits: tuple[Tensor, Tensor]) -> None:
    theirs = Counting(members(), lambda logits: F.one_hot(logits.argmax(-1), 10).sum(0).to(logits)).eval()
    host = AutoAttack(as_ensemble(theirs, "nets", "voting"), eps=0.2, seed=0, verbose=False, attacks_to_run=["mora"])
    host.run_standard_evaluation(*digits)
    assert not [flag for flag in host.flags if flag.name == "claim"]


@pytest.mark.parametrize("make", [Ensemble, RandomizedEnsemble, lambda nets: as_ensemble(Counting(nets), "nets")])
def test_members_of_different_sizes_are_named(make: Callable[[list[nn.Module]], nn.Module]) -> None:
    model = make([make_member(4), make_member(3)]).eval()
    x, y = torch.rand(8, 3, 6, 6), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[0\]: 4, members.*\[1\]: 3"):
        MORA(model, eps=0.1, steps=2)(x, y)


@pytest.mark.parametrize(
    "container", [nn.ModuleList, lambda nets: nn.Sequential(*nets), lambda nets: nn.ModuleDict({"b": nets[0], "a": nets[1]})]
)
@pytest.mark.parametrize("named", [True, False])
def test_a_list_of_networks_means_its_children(container: Callable, named: bool) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = container([make_member(seed=seed) for seed in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([net(x) for net in self.nets.children()]).mean(0)

    model = Holder().eval()
    adopted = as_ensemble(model, "nets" if named else model.nets, "logits", inputs=torch.rand(8, 3, 6, 6))
    assert isinstance(adopted, AdoptedEnsemble)
    assert list(adopted.members) == list(model.nets.children())
    if container is nn.ModuleList:
        assert list(as_ensemble(model, ["nets"], "logits").get_submodule("members").children()) == list(adopted.members)


def test_weights_go_with_a_name() -> None:
    with pytest.raises(TypeError, match="weights go with a named vote"):
        as_ensemble(Counting(members()), "nets", counted, weights=WEIGHTS)


def test_one_sequential_network_in_a_list_is_a_member() -> None:
    model = nn.Sequential(make_member())
    assert len(list(as_ensemble(model, ["0"]).get_submodule("members").children())) == 1
