"""Define what to differentiate instead of the defended model.

A defense whose gradient misleads is attacked through a `Surrogate` that has the same weights and an aggregation that does
not mislead, or through `straight_through` parts, which are the identity in the backward pass (BPDA; Athalye, Carlini &
Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018). Success is decided by the defended model all the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.devices import placed
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.models.aggregations import log_expected_softmax, log_mean_softmax, log_soft_votes
from ensemble_attacks.models.ask import as_module, ask, ask_members, check_alone, member_probabilities
from ensemble_attacks.models.ensembles import check_members
from ensemble_attacks.models.votes import SOFT_VOTES, SOFTMAX, Aggregate, Vote, check_vote, vote_of
from ensemble_attacks.scores import per_sample
from ensemble_attacks.validation import check_count, check_positive

AGGREGATIONS: dict[str, str | Vote] = {"mean": "logits", "probability": "softmax", "votes": SOFT_VOTES}  # by their vote
EXPECTED = {SOFTMAX.name: log_expected_softmax, SOFT_VOTES: log_soft_votes}  # of a model that draws its members


class Surrogate(nn.Module):
    """A model to be attacked in place of ``target``: its members, aggregated otherwise, or any other model.

    Its forward pass is the surrogate's, so that any attack can craft on it; the attacks of this package also see the
    target's own prediction, and stop where that is wrong.

    Args:
        target: the defended model, images in [0, 1] -> scores (N, K).
        surrogate: ``"mean"`` (mean of the members' raw logits), ``"probability"`` (log of their mean, or for a model that
            draws members their expected, probability), ``"votes"`` (soft votes, each member's at its own gap: the same of
            ``softmax(z^m / gap_m)``), a function (M, N, K) -> (N, K), or a module (N, C, H, W) -> (N, K).

    Raises:
        NotAnEnsembleError: Where an aggregation is given, but ``target`` shows no members to aggregate.
        TypeError: Where one cannot be asked by one process alone (`check_alone`).
        ValueError: Where ``surrogate`` is an unknown name.
    """

    def __init__(self, target: nn.Module, surrogate: str | nn.Module | Callable[[Tensor], Tensor] = "mean") -> None:
        super().__init__()
        if isinstance(surrogate, str) and surrogate not in AGGREGATIONS:
            raise unknown_name("surrogate", surrogate, AGGREGATIONS)
        target = as_module(target)
        if not isinstance(surrogate, nn.Module):
            check_members(target, f"the surrogate {surrogate!r}")
        self.target: Any = target
        self.other: Any = surrogate if isinstance(surrogate, nn.Module) else None
        named = isinstance(surrogate, str)
        self.vote = AGGREGATIONS[surrogate] if named else getattr(self.other, "vote", None)  # type: ignore[index]
        self._aggregate: Aggregate = check_vote(self.vote).aggregate if named else surrogate  # type: ignore
        self.training = target.training
        check_alone(self)

    def forward(self, x: Tensor) -> Tensor:
        return ask(self.other, x) if self.other is not None else self.aggregate(self.member_logits(x))

    def member_logits(self, x: Tensor) -> Tensor:
        """Return the logits of the target's members, or of those of a surrogate that is another ensemble, (M, N, K)."""
        return ask_members(self.target if self.other is None else self.other, x)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        """Return the surrogate's scores (N, K) from the members' logits (M, N, K)."""
        if self.other is not None:
            return self.other.aggregate(logits_MNK)
        probabilities = member_probabilities(self.target)
        if probabilities is not None and self.vote in EXPECTED:
            return EXPECTED[self.vote](logits_MNK, probabilities)
        return self._aggregate(logits_MNK if self.vote is None else vote_of(self.target).over_classes(logits_MNK))


class _Estimated(torch.autograd.Function):
    """A function that returns the model's scores, with a gradient estimated from finite differences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: ZeroOrder) -> Tensor:
        ctx.save_for_backward(x)
        ctx.model = model
        return ask(model.target, x).detach()

    @staticmethod
    def backward(ctx: Any, by_scores: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        model: ZeroOrder = ctx.model
        gradient = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(model.queries):
                u = 2.0 * placed(torch.randint(0, 2, x.shape, generator=model.generator, device="cpu"), x.device).to(x) - 1
                ahead, behind = ask(model.target, x + model.sigma * u), ask(model.target, x - model.sigma * u)
                slope_N = ((ahead - behind) * by_scores).sum(1) / (2 * model.sigma)
                gradient += per_sample(slope_N, x) * u / model.queries
        return gradient, None


class ZeroOrder(nn.Module):
    """A model whose gradient is estimated from its scores alone, along random directions of signs.

    It is a control for gradients that mislead: any attack on it needs no gradient, and PGD on it is zero-order PGD. The
    estimate is that of Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
    Approximation", 1992. The directions come from one generator, one pass after the other: unlike that of other attacks,
    what one on it finds of an image depends on the images beside it, and on their order.

    Args:
        target: images (N, C, H, W) -> scores (N, K). It sees images up to ``sigma`` outside [0, 1].
        queries: the number of directions of every estimate, of two forward passes each.
        sigma: how far to look along each direction, in pixel units of [0, 1].
        seed: the seed of the directions.

    Raises:
        TypeError, ValueError: Where ``queries`` or ``sigma`` cannot be used.
    """

    def __init__(self, target: nn.Module, queries: int = 50, sigma: float = 1e-3, seed: int = 0) -> None:
        super().__init__()
        check_count("queries", queries)
        check_positive("sigma", sigma)
        self.target, self.queries, self.sigma = as_module(target), queries, sigma
        self.generator = torch.Generator().manual_seed(seed)
        self.training = self.target.training

    def forward(self, x: Tensor) -> Tensor:
        return _Estimated.apply(x, self)  # type: ignore[no-untyped-call]


class Expected(nn.Module):
    """A model that returns the expectation of a random one: ``log mean softmax`` of its scores over draws.

    It is meant for attacks that know nothing of randomness, such as AutoAttack's Square.

    Args:
        target: images (N, C, H, W) -> scores (N, K), random.
        draws: the number of forward passes of the target for each forward pass.

    Raises:
        TypeError, ValueError: Where ``draws`` is no whole number of at least 1.
    """

    def __init__(self, target: nn.Module, draws: int = 20) -> None:
        super().__init__()
        check_count("draws", draws)
        self.target, self.draws = as_module(target), draws
        self.training = self.target.training

    def forward(self, x: Tensor) -> Tensor:
        return log_mean_softmax(torch.stack([ask(self.target, x) for _ in range(self.draws)]))
