"""Implement ``randomized``: one member, drawn at random, answers (Boytsov, Joshi & Condessa, arXiv:2402.17018; Pinot et al.,
"Randomization Matters: How to Defend Against Strong Adversarial Attacks", ICML 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defenses.draws import OwnDraws
from ensemble_attacks.models.ask import beside
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.votes import log_expected_softmax
from ensemble_attacks.validation import check_choice, check_same_classes

PER = ("image", "batch")


class RandomizedEnsemble(OwnDraws, Ensemble):
    """An ensemble of classifiers of which one, drawn at random, answers.

    It shows its members and their probabilities, so that an attack can take the expectation exactly; `aggregate` is the
    logarithm of the expected probability, not what a forward pass returns.

    Args:
        members: modules (N, C, H, W) -> (N, K).
        probabilities: the probability of each member, summing to 1; ``None``: all equal.
        per: whether each ``"image"`` draws a member, or each ``"batch"``.
        seed: the seed of the draws; ``None``: fresh ones in every process.

    Raises:
        ValueError: Where there is not one probability per member, one is negative, their sum is not 1, or ``per`` is
            unknown.
    """

    probabilities: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        probabilities: Sequence[float] | None = None,
        *,
        per: str = "image",
        seed: int | None = None,
    ) -> None:
        super().__init__(members)
        self.vote = None
        count = len(self.members)
        values = [1 / count] * count if probabilities is None else [float(p) for p in probabilities]
        if len(values) != count:
            raise ValueError(f"probabilities holds {len(values)} numbers for {count} members: give one for each")
        if min(values) < 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
            raise ValueError(f"probabilities {values} sum to {sum(values):g}: they must be at least 0 and sum to 1")
        check_choice("per", per, PER)
        self.register_buffer("probabilities", torch.tensor(values, dtype=torch.float64), persistent=False)
        self.per = per
        self.own_draws(seed)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        """Return ``log sum_m p_m softmax(z^m)``, (N, K)."""
        return log_expected_softmax(logits_MNK, self.probabilities)

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return super().forward(x)
        count = self.draws_for(len(x)) if self.per == "image" else 1
        generator = self.next_draws()
        chosen = torch.multinomial(self.probabilities.to(generator.device), count, replacement=True, generator=generator)
        if len(chosen) == 1:
            return _answer(self.members[int(chosen)], x)
        rows = [torch.nonzero(chosen == index).squeeze(-1).to(x.device) for index in range(len(self.members))]
        parts = [_answer(member, x[own]) for member, own in zip(self.members, rows, strict=True) if len(own)]
        check_same_classes(parts, "members drawn")
        return torch.cat(parts)[torch.cat(rows).argsort()]


def _answer(member: nn.Module, x: Tensor) -> Tensor:
    return member(beside(member, x)).to(x.device)
