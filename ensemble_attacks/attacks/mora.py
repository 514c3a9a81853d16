"""Implement MORA, Model-Reweighing Attack (Yu, Gao, Xu, "MORA: Improving Ensemble Robustness Evaluation with
Model-Reweighing Attack", NeurIPS 2022).

It breaks ensembles whose members were trained to have diverse gradients: instead of the ensemble's own gradient, in which
members far from their boundary drown or cancel the others, it follows the members whose change moves the vote most
(equations 7-12; see `mora`), with a cosine step and momentum 0.75 (Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.attacks.mora_as_written import ReleasedTargetedSteps, check_written, published, released
from ensemble_attacks.descent.objectives import Goal, cross_entropy, normalize_margin
from ensemble_attacks.descent.stages import CLOSEST, Stage
from ensemble_attacks.descent.steps import CosineSteps
from ensemble_attacks.models.aggregations import log_expected_softmax, log_mean_softmax
from ensemble_attacks.models.softening import softened
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.models.votes import Vote, vote_of
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.scores import best_other, gather, margin, mask_class
from ensemble_attacks.validation import check_choice, check_count, check_fractions, check_positive

TARGETED_BETA = 0.5  # of the multi-targeted stage (MORA, section 4.1)
SHORT, FEWEST_STEPS = 6, 5  # descents of an eighth of the first beta's steps, where that is not less than so many
WEIGHT_RULES = ("derivative", "published", "runner-up", "code", "equal")
READINGS: dict[str, Callable[..., Tensor]] = {"published": published, "released": released}  # but for `mora`, the default


def log_reweighing(logits_MNK: Tensor, labels: Tensor, others: Tensor, rule: str = "derivative") -> Tensor:
    """Return the logarithm of MORA's member weights without their constant 1 / (tau M), (M, N).

    ``logits_MNK`` are already divided by the temperature; ``others`` is the class to overtake y, (N,).

    With E = mean_m softmax(z^m / tau), k^m = z_y - z_other moved through z_y, the weight is the derivative of E_y - E_other
    (MORA, eq. 10). ``rule`` chooses the reading of that equation:

    - ``"derivative"``: s_y (1 - s_y + s_other), the true derivative;
    - ``"published"``: s_y (1 + s_y - s_other), as printed;
    - ``"runner-up"``: s_other (1 + s_y - s_other), the derivative with k^m moved through z_other;
    - ``"code"``: s_other ((1 + s_other) / E_other - s_y / E_y), as the released code computes it;
    - ``"equal"``: 1, no reweighing.

    The computation is in log-space; for the default rule 1 - s_y is the sum of the other probabilities, never a difference,
    so that a confident member (s_y = 1 in floating point) keeps its true, tiny weight.
    """
    if rule == "equal":
        return torch.zeros_like(logits_MNK[..., 0])
    log_s_MNK = logits_MNK.log_softmax(-1)
    log_s_y, log_s_other = gather(log_s_MNK, labels), gather(log_s_MNK, others)
    if rule == "derivative":
        log_rest = mask_class(log_s_MNK, labels).logsumexp(-1)  # log(1 - s_y)
        return log_s_y + torch.logaddexp(log_rest, log_s_other)
    if rule == "published":
        return log_s_y + torch.log1p(log_s_y.exp() - log_s_other.exp())
    if rule == "runner-up":
        return log_s_other + torch.log1p(log_s_y.exp() - log_s_other.exp())
    log_e_NK = log_mean_softmax(logits_MNK)
    log_e_y, log_e_other = gather(log_e_NK, labels), gather(log_e_NK, others)
    first = torch.log1p(log_s_other.exp()) - log_e_other
    second = log_s_y - log_e_y
    return log_s_other + first + torch.log(-torch.expm1((second - first).clamp_max(0)))


def reweigh(
    logits_MNK: Tensor,
    labels: Tensor,
    others: Tensor,
    *,
    masked: bool,
    rule: str,
    probabilities: Tensor | None = None,
    log_own: Tensor | None = None,
) -> Tensor:
    """Return MORA's member weights (M, N), which sum to 1 over the members (MORA, eq. 10 and the indicator of eq. 11).

    With ``masked``, members that already prefer ``others`` to y weigh nothing; where that, or the rule, leaves no member,
    all weigh the same. Of a model that draws members with ``probabilities`` (M,), the weights are those of the expected
    vote, and the members that weigh nothing are those that are wrong already, whichever class they prefer. Where the vote
    itself weighs its members, E is their weighted mean, and ``log_own``, (M, N) or (M, 1), are these weights' logarithms.
    """
    log_weights_MN = log_reweighing(logits_MNK, labels, others, rule)
    if log_own is not None:
        log_weights_MN = log_weights_MN + log_own
    if probabilities is not None:
        log_weights_MN = log_weights_MN + probabilities.to(log_weights_MN).log().unsqueeze(-1)
    if masked:
        lead_MN = gather(logits_MNK, labels) - gather(logits_MNK, others)
        if probabilities is not None:
            lead_MN = margin(logits_MNK, labels)
        log_weights_MN = log_weights_MN.masked_fill(lead_MN <= 0, -torch.inf)
    nobody_N = log_weights_MN.amax(0) == -torch.inf
    return log_weights_MN.masked_fill(nobody_N, 0.0).softmax(0)


def mora(
    logits_MNK: Tensor,
    scores_NK: Tensor,
    goal: Goal,
    *,
    beta: float,
    vote: Vote,
    tau: float | None = None,
    rule: str = "derivative",
    probabilities: Tensor | None = None,
    normalized: bool = True,
) -> Tensor:
    """Return MORA's loss, (N,) (Yu et al., NeurIPS 2022, eq. 7-12).

    It is the cross-entropy of a mixture of the ensemble's own scores and its members' logits, reweighed towards the members
    whose change moves the vote most.

    Args:
        logits_MNK: the members' logits.
        scores_NK: the ensemble's scores; used where the vote has no soft form (`Vote.soft`), or the members are drawn.
        goal: the classes to leave, and those to reach instead; where there are none, the ensemble's best other class, at
            every step anew.
        beta: the share of the reweighed members, in [0, 1]; the rest is the ensemble's. With mean logits and the true
            derivative it makes no difference: every member moves the mean by 1 / M.
        vote: the ensemble's vote, which decides temperature, indicator and ensemble term (`Vote`).
        tau: the temperature of the members' softmax; ``None``: the vote's.
        rule: the reading of eq. 10 (`log_reweighing`).
        probabilities: the probabilities with which a random model draws each member, (M,).
        normalized: whether both terms are divided by their margin (eq. 12).
    """
    leave, reach = goal.overtaken(scores_NK), goal.reach
    vote = softened(vote, logits_MNK)
    log_own = None if vote.log_weights is None else vote.log_weights(logits_MNK.detach())
    logits_MNK = vote.over_classes(logits_MNK)
    detached_MNK = logits_MNK.detach()
    temperature = vote.temperature(detached_MNK) if tau is None else tau
    if probabilities is not None:
        ensemble_NK = log_expected_softmax(logits_MNK / temperature, probabilities)
    else:
        ensemble_NK = scores_NK if vote.soft is None else vote.soft(logits_MNK, temperature)
    others = best_other(ensemble_NK.detach(), leave) if reach is None else reach
    if (vote.linear and rule == "derivative") or logits_MNK.shape[-1] != scores_NK.shape[-1]:
        # E is the mean of the logits: its derivative by k^m is 1 / M for every member; or nobody knows what they say of y
        members_NK = ensemble_NK
    else:
        weights_MN = reweigh(
            detached_MNK / temperature,
            leave,
            others,
            masked=vote.masked,
            rule=rule,
            probabilities=probabilities,
            log_own=log_own,
        )
        members_NK = torch.einsum("mn,mnk->nk", weights_MN, logits_MNK)  # eq. 11

    if normalized:  # eq. 12
        ensemble_NK, members_NK = (normalize_margin(part_NK, leave, reach) for part_NK in (ensemble_NK, members_NK))
    mixture_NK = (1 - beta) * ensemble_NK + beta * members_NK
    return cross_entropy(mixture_NK, Goal(leave, reach))


class MORA(DescentAttack):
    r"""An attack with MORA on an ensemble, in the norms Linf and L2 (Yu, Gao, Xu, NeurIPS 2022).

    It makes a descent for each beta, then, with ``targets``, that many more at the beta 0.5; each only on the samples that
    are still robust, those with the smallest margin first. The first beta's steps are spent in seven descents, as most
    samples need few steps, and most others the right class rather than many: one from the clean image, untargeted, then six
    of an eighth of the steps, if these are at least five. These and the later ones start at random and aim, sample by
    sample, at the wrong class that has come closest in all iterates so far, among those that the fewest descents of as many
    steps or more have aimed at.

    It departs from the paper (`MORA.published`). Figures are what stays robust of 100 digits, Linf 0.12, in hard votes of
    the `standard`, `gal`, `trs` and `adp` networks, at 5 x 100 steps (`benchmarks/ablation.py`): this 21, 3, 8, 25; as
    published 26, 24, 19, 26; as released (`MORA.released`) 20, 5, 10, 25.

    - Under hard votes tau is each member's own gap, not 0.1, and the ensemble's term the logarithm of the mean probability,
      which counts where y no longer leads it, too: with nothing else, beta 0 and five untargeted descents, 21, 5, 12, 27.
    - Under other votes tau is each member's gap, too, but at least 1: the probabilities of members that are sure of
      themselves have no gradient, and one that is not would drown them. Of three public CIFAR-10 networks, one of them
      adversarially trained, mean probability, Linf 1/255, n = 64, 5 x 50 steps: 37.5; with tau 1, 51.6.
    - The weights of eq. 10 are the true derivative, not the printed one, and sum to 1; members are masked where they prefer
      the class to overtake, not any other; with mean logits, where all weigh the same, none is. On these four it makes no
      difference: equal weights leave 21, 3, 8, 24.
    - All descents but the first, which starts at the clean image, aim; the paper's do not (``aimed=False``: 22, 7, 10,
      23), where different betas mostly end at the same class.

    Arguments:
        model (nn.Module): an ensemble: ``member_logits(x) -> (M, N, K)`` and ``aggregate(member_logits) -> (N, K)``.
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): gradient steps for each beta, and for each target. (Default: 100)
        betas (sequence of float): shares of the reweighed members, eq. 11, in order. (Default: (0.5, 0, 0.25, 0.75, 1))
        targets (int): descents at single classes after the sweep; at most one less than there are classes. (Default: 0)
        tau (float): temperature of the members' softmax, eq. 10. (Default: None: each member's gap,
            at least 1 where the vote is not a hard one)
        seed (int): seed of the random starts. (Default: 0)
        aimed (bool): whether the first beta's descent is cut, and all but the first aim at single classes. (Default: True)
        weight_rule (str): the reading of eq. 10: ``"derivative"``, ``"published"``, ``"runner-up"``, ``"code"`` or
            ``"equal"``. (Default: ``"derivative"``)
        eot_iter (int): draws of every iterate of a random model. (Default: None: the model is deterministic)
        batch_size (int): samples per pass. (Default: None: all at once)
        box (Box): the values that images can take. (Default: [0, 1])
        mask (Tensor): what may move, bool, of one image or of each. (Default: None: all)

    Raises:
        NotAnEnsembleError: Where ``model`` shows no members; `as_ensemble` can name them.

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images

    Examples::
        >>> import torch
        >>> from ensemble_attacks import MORA, Ensemble
        >>> members = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)]
        >>> images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> attack = MORA(Ensemble(members, vote="softmax"), eps=0.01, steps=10)
        >>> attack(images, labels).shape
        torch.Size([5, 3, 2, 2])
    """

    needs_members = True
    step_rule = CosineSteps
    reading = "default"  # or one of `READINGS`

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        betas: Sequence[float] = (0.5, 0.0, 0.25, 0.75, 1.0),
        targets: int = 0,
        tau: float | None = None,
        seed: int = 0,
        *,
        aimed: bool = True,
        weight_rule: str = "derivative",
        eot_iter: int | None = None,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            "MORA", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask
        )
        self.eot_iter = eot_iter
        self.betas, self.targets, self.tau, self.aimed, self.weight_rule = betas, targets, tau, aimed, weight_rule
        self._check()

    @classmethod
    def published(cls, model: nn.Module, norm: str = "Linf", eps: float | Tensor = 8 / 255, **options: Any) -> MORA:
        """Return the attack exactly as the paper writes it (eq. 7-12, Algorithm 1); ``options`` are MORA's.

        Its loss is `mora_as_written.published`. Descents start anywhere in the ball; those of the sweep are untargeted,
        those at ``targets`` aim at the likeliest wrong classes of the clean image, in order.

        Raises:
            NotAnEnsembleError: Where ``model`` shows no members.
            ValueError: Where its vote is not one of the paper's three, or an option is settled by the paper.
        """
        return cls._as_written("published", model, norm, eps, options)

    @classmethod
    def released(cls, model: nn.Module, norm: str = "Linf", eps: float | Tensor = 8 / 255, **options: Any) -> MORA:
        """Return the attack exactly as the authors' released code computes it; ``options`` are MORA's.

        Its loss is `mora_as_written.released`. Descents start on the ball's sphere; those of the sweep are untargeted, those
        at ``targets`` aim at the likeliest wrong classes of the clean image, in order. Success goes by the model's own
        vote, as always here; the code's hard votes are soft ones of a low temperature, its ball is smaller by 1.9e-8.

        Raises:
            NotAnEnsembleError: Where ``model`` shows no members.
            ValueError: Where its vote is not one of the paper's three, or an option is settled by the code.
        """
        return cls._as_written("released", model, norm, eps, options)

    @classmethod
    def _as_written(cls, reading: str, model: nn.Module, norm: str, eps: float | Tensor, options: dict[str, Any]) -> MORA:
        if settled := [name for name in ("aimed", "weight_rule") if name in options]:
            raise ValueError(f"{settled[0]} is settled in MORA.{reading}: leave it out, or use MORA(model, ...)")
        attack = cls(model, norm, eps, aimed=False, **options)
        attack.reading = reading
        check_written(vote_of(attack.model), f"MORA.{reading}")
        return attack

    def _check(self) -> None:
        super()._check()
        check_fractions("betas", self.betas)
        check_count("targets", self.targets, at_least=0)
        if self.tau is not None:
            check_positive("tau", self.tau)
        check_choice("weight_rule", self.weight_rule, WEIGHT_RULES)

    def sweep(self) -> list[tuple[float, int]]:
        """Return the beta and the steps of each descent, but for those at ``targets``."""
        first, *others = self.betas
        eighth = self.steps // 8
        short = [(first, eighth)] * (SHORT if self._aims and eighth >= FEWEST_STEPS else 0)
        return [(first, self.steps - eighth * len(short)), *short, *((beta, self.steps) for beta in others)]

    @property
    def _aims(self) -> bool:
        return self.aimed and not self.targeted

    def _stages(self, num_classes: int) -> list[Stage]:
        vote = vote_of(self.model)
        if self.reading in READINGS:
            return self._written_stages(vote, min(self.targets, num_classes - 1))
        sweep = [(partial(self._loss, beta, vote=vote), steps) for beta, steps in self.sweep()]
        targets = 0 if self.targeted else min(self.targets, num_classes - 1)
        aimed = [(partial(self._loss, TARGETED_BETA, vote=vote), self.steps)] * targets
        opening: list[Stage] = []
        if self._aims:
            (loss, steps), *others = sweep
            opening, sweep, aimed = [Stage(loss, steps=steps, opening=True)], [], [*others, *aimed]
        untargeted = [Stage(loss, restart=r, steps=steps) for r, (loss, steps) in enumerate(sweep)]
        restarts = enumerate(aimed, start=len(sweep))
        return [
            *opening,
            *untargeted,
            *(Stage(loss, target_rank=CLOSEST, restart=r, steps=steps) for r, (loss, steps) in restarts),
        ]

    def _written_stages(self, vote: Vote, targets: int) -> list[Stage]:
        """Return a descent for each beta, then one for each of the likeliest wrong classes of the clean image."""
        check_written(vote, f"MORA.{self.reading}")
        uniform, aimed_rule = self.reading == "published", ReleasedTargetedSteps if self.reading == "released" else None
        loss = {beta: partial(self._loss, beta, vote=vote) for beta in (*self.betas, TARGETED_BETA)}
        sweep = [Stage(loss[beta], restart=restart, uniform=uniform) for restart, beta in enumerate(self.betas)]
        ranks = range(1, 1 if self.targeted else targets + 1)
        return [
            *sweep,
            *(
                Stage(loss[TARGETED_BETA], target_rank=rank, restart=restart, uniform=uniform, step_rule=aimed_rule)
                for restart, rank in enumerate(ranks, start=len(sweep))
            ),
        ]

    def _loss(self, beta: float, outputs: Outputs, goal: Goal, vote: Vote | None = None) -> Tensor:
        assert outputs.logits_MNK is not None
        vote = vote or vote_of(self.model)
        if written := READINGS.get(self.reading):
            return written(outputs.logits_MNK, outputs.scores_NK, goal, beta=beta, vote=vote, tau=self.tau)
        return mora(
            outputs.logits_MNK,
            outputs.scores_NK,
            goal,
            beta=beta,
            vote=vote,
            probabilities=outputs.weights_E,
            tau=self.tau,
            rule=self.weight_rule,
        )
