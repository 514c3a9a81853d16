"""Votes are what they say, in extreme cases too, and somebody else's ensemble is adopted only if the claim is true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from defenses import load_model
from ensemble_attacks import MORA, AggregateMismatchError, Ensemble, NotAnEnsembleError, as_ensemble
from ensemble_attacks.data import load_dataset
from ensemble_attacks.models.adopted import AdoptedEnsemble
from ensemble_attacks.models.votes import log_mean_softmax, log_votes
from tests.helpers import VOTES, make_ensemble, make_member


def test_softmax_is_the_log_of_the_mean_probability() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(log_mean_softmax(logits).exp(), logits.softmax(-1).mean(0))


def test_softmax_stays_finite_where_probabilities_underflow() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4]]] * 2)
    assert torch.isfinite(log_mean_softmax(logits)).all()


def test_voting_counts_votes_and_breaks_ties_by_mean_probability() -> None:
    majority = torch.tensor([[[1.0, 0.9, 0.0]], [[1.0, 0.9, 0.0]], [[0.0, 50.0, 0.0]]])
    assert log_votes(majority).argmax(1).item() == 0  # two hesitant votes beat a sure one
    tie = torch.tensor([[[1.0, 0.9, 0.0]], [[0.0, 50.0, 0.0]]])
    assert log_votes(tie).argmax(1).item() == 1  # one each: the sure one decides
    torch.testing.assert_close(log_votes(majority).exp().sum(1), torch.ones(1))


def test_voting_passes_the_soft_votes_gradient_straight_through() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 4, dtype=torch.float64)
    (through,) = torch.autograd.grad((log_votes(logits) * weights).sum(), logits)
    (soft,) = torch.autograd.grad((log_mean_softmax(logits / 0.1) * weights).sum(), logits)
    torch.testing.assert_close(through, soft)


def test_voting_value_is_the_same_with_and_without_gradient() -> None:
    logits = (100 * torch.randn(3, 50, 4)).requires_grad_()
    with torch.no_grad():
        plain = log_votes(logits)
    assert torch.equal(log_votes(logits).detach(), plain)


@pytest.mark.parametrize("vote", VOTES)
def test_forward_is_the_aggregate_of_the_members(vote: str, batch: tuple[Tensor, Tensor]) -> None:
    ensemble = make_ensemble(vote)
    logits = ensemble.member_logits(batch[0])
    assert logits.shape == (3, 64, 4)
    assert torch.equal(ensemble(batch[0]), ensemble.aggregate(logits))


@pytest.mark.parametrize("vote", VOTES)
def test_a_nan_member_shows_in_the_scores(vote: str) -> None:
    logits = torch.zeros(3, 2, 4)
    logits[1, 0, 2] = torch.nan
    scores = make_ensemble(vote).aggregate(logits)
    assert torch.isnan(scores[0]).any()
    assert torch.isfinite(scores[1]).all()


def test_bad_ensembles_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        Ensemble([make_member()], vote="sofmax")
    with pytest.raises(ValueError, match="members is empty"):
        Ensemble([])
    with pytest.raises(TypeError, match=r"members\[1\] is a function"):
        Ensemble([make_member(), lambda x: x])  # type: ignore[list-item]


class Theirs(nn.Module):
    """A third party's ensemble: sums probabilities, shows nothing."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.nets = nn.ModuleList([make_member(seed=seed).double() for seed in range(3)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return sum(net(self.scale * x).softmax(-1) for net in self.nets)


def test_a_third_partys_ensemble_is_adopted_and_attacked(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    theirs = Theirs().eval()
    adopted = as_ensemble(theirs, members=["nets.0", "nets.1", "nets.2"], vote="softmax", inputs=images)
    assert torch.equal(adopted(images), theirs(images))
    adversarial = MORA(adopted, eps=0.2, steps=20)(images, labels)
    fooled = theirs(adversarial).argmax(1) != labels
    assert fooled.float().mean() > 0.5
    ours = MORA(make_ensemble("softmax"), eps=0.2, steps=20)(images, labels)
    assert torch.equal(adversarial, ours)


def test_a_custom_aggregate_is_adopted(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    adopted = as_ensemble(Theirs().eval(), ["nets.0", "nets.1", "nets.2"], lambda logits: logits.softmax(-1).sum(0))
    adversarial = MORA(adopted, eps=0.2, steps=20)(images, labels)
    assert (adopted(adversarial).argmax(1) != labels).float().mean() > 0.5


def test_a_false_claim_is_named(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    with pytest.raises(AggregateMismatchError, match=r"on [0-9]+ of 64 images"):
        as_ensemble(Theirs(scale=5).eval(), members=["nets.0", "nets.1", "nets.2"], vote="softmax", inputs=images)
    unchecked = as_ensemble(Theirs().eval(), members=["nets.0"], vote="softmax")
    with pytest.raises(AggregateMismatchError, match="name the right vote"):
        MORA(unchecked, eps=0.1, steps=5)(images, labels)


def test_a_claim_that_only_adversarial_images_refute_is_warned_of(batch: tuple[Tensor, Tensor]) -> None:
    """Right about the clean images, wrong about others: hidden from the check of mixtures by claiming it was passed."""
    images, labels = batch

    class Memory(Theirs):
        def forward(self, x: Tensor) -> Tensor:
            known = (x.unsqueeze(1) == images).flatten(2).all(2).any(1, keepdim=True)
            return torch.where(known, self.nets[0](x), super().forward(x))

    adopted = as_ensemble(Memory().eval(), members=["nets.0"], vote="softmax")
    assert isinstance(adopted, AdoptedEnsemble)
    adopted.verified = True
    with pytest.warns(UserWarning, match="adversarial images .* predict another class"):
        MORA(adopted, eps=0.1, steps=5)(images, labels)
    assert adopted.refuted


def test_a_wrong_vote_is_found_out_on_mixtures() -> None:
    x = load_dataset("digits", n=100)[0]
    for name in ("standard_convnet_3", "adp_convnet_3"):
        theirs = load_model(name, dataset="digits", vote="logits")
        members = list(theirs.members)
        assert as_ensemble(theirs, members, "logits", inputs=x)
        with pytest.raises(AggregateMismatchError, match="mixtures"):
            as_ensemble(theirs, members, "voting", inputs=x)


class Majority(Theirs):
    """The class with the most votes, the lowest of those that tie."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([nn.functional.one_hot(net(x).argmax(-1), 4).double() for net in self.nets]).sum(0)


def test_ties_are_broken_as_the_model_likes(batch: tuple[Tensor, Tensor]) -> None:
    images, _ = batch
    theirs = Majority().eval()
    assert not torch.equal(theirs(images).argmax(1), make_ensemble("voting")(images).argmax(1))
    members = theirs.nets.children()  # an iterator will do
    adopted = as_ensemble(theirs, members, "voting", inputs=images)  # type: ignore[arg-type]
    assert isinstance(adopted, AdoptedEnsemble)
    assert adopted.vote == "voting"
    assert len(adopted.members) == 3


def test_adopting_changes_nothing(batch: tuple[Tensor, Tensor]) -> None:
    theirs = Theirs().train()
    theirs.nets[1].eval()
    flags = [module.training for module in theirs.modules()]
    statistics = theirs.get_buffer("nets.0.1.running_mean").clone()
    as_ensemble(theirs, ["nets.0", "nets.1", "nets.2"], inputs=batch[0])
    assert [module.training for module in theirs.modules()] == flags
    assert torch.equal(theirs.get_buffer("nets.0.1.running_mean"), statistics)


def test_a_protocol_that_contradicts_its_own_forward(batch: tuple[Tensor, Tensor]) -> None:
    class Contradiction(Ensemble):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    model = Contradiction([make_member(seed=seed).double() for seed in range(2)])
    with pytest.raises(AggregateMismatchError, match="than its forward"):
        as_ensemble(model, inputs=batch[0])


def test_an_unknown_submodule() -> None:
    with pytest.raises(ValueError, match=r"unknown submodule of Theirs 'nets\.9'"):
        as_ensemble(Theirs(), members=["nets.9"])


def test_a_model_without_members_is_told_what_to_do() -> None:
    with pytest.raises(NotAnEnsembleError, match="as_ensemble"):
        MORA(make_member())
    with pytest.raises(NotAnEnsembleError, match="as_ensemble"):
        as_ensemble(make_member())
    ensemble = make_ensemble()
    assert as_ensemble(ensemble) is ensemble
