"""The loop that every attack runs: active set, best iterate, stages, restarts, trace. Written once.

One forward pass per iterate serves both the success test and the gradient; the last iterate is tested too. A sample leaves
the batch the moment it is fooled. The clean image is the centre of the ball in every stage.

For a random model every one of these, loss, gradient, success, and which iterate is best, is the mean over draws, and a
sample leaves only when no draw of many is right.

Shape suffixes: M members, N samples, K classes, E outcomes of a random model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.noise import direction_noise, sample_keys, start_noise
from ensemble_attacks.objectives import best_other, gather, margin, mask_class, targeted_margin
from ensemble_attacks.projections import Ball, make_ball
from ensemble_attacks.steps import StepRule
from ensemble_attacks.validation import check_label_range

NEVER = 2**31 - 1  # the stage in which a sample that held out was fooled
FEWEST = 100  # samples that a stage takes, if there are as many, however small its share
CLOSEST = 0  # target rank of the class that has come closest so far
CONFIRMING = 20  # further draws of a sample that no draw has been right on, before it leaves
NO_GRADIENT = (
    "the model's scores have no gradient: stand in for the part that stops it (BPDAIdentity, Surrogate), estimate it "
    "(ZeroOrder), or use an attack that needs none (square)"
)
TIE = 1e-3  # what the mean margin counts beside the probability of being right


class Outputs(NamedTuple):
    """What one forward pass shows.

    Attributes:
        scores_NK: what is differentiated: the model's scores, or its surrogate's.
        logits_MNK: the members', of an ensemble.
        verdict_ENK: the scores that decide success, where they are others: of each outcome, by the ``weights_E`` that sum
            to 1, of a model that is random, or of the one outcome of a model that a surrogate stands for.
    """

    scores_NK: Tensor
    logits_MNK: Tensor | None = None
    verdict_ENK: Tensor | None = None
    weights_E: Tensor | None = None


Forward = Callable[[Tensor], Outputs]
Objective = Callable[[Outputs, Tensor, Tensor | None], Tensor]  # (outputs, labels, targets) -> loss (N,)
Direction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (noise, labels, ranked classes) -> direction (N, K)


@dataclass(frozen=True)
class Stage:
    """One descent from one random start.

    Attributes:
        objective: what to maximise.
        target_rank: aim at the wrong class of this rank, 1 the likeliest, by the scores of the clean image; `CLOSEST`: at
            the one whose score has come closest to the label's in all iterates so far, among those that the fewest stages
            of as many steps or more have aimed at; ``None``: at none.
        restart: which of the sample's random starts.
        direction: a random direction in the space of scores, to be the objective's target (N, K): made of noise (N, K),
            uniform in [-1, 1], the labels, and the wrong classes (N, K - 1) ranked by the scores of the clean image.
        steps, step_rule: where they are not the attack's.
        resume: go on where the stage before ended, on the samples that it took.
        share: of the robust samples, those of the smallest margin that are worth the passes; `FEWEST` at least.
    """

    objective: Objective
    target_rank: int | None = None
    restart: int = 0
    direction: Direction | None = None
    steps: int | None = None
    step_rule: Callable[..., StepRule] | None = None
    resume: bool = False
    share: float = 1.0


@dataclass(eq=False)
class Trace:
    """Convergence of an attack, one row per step of every stage, summed over batches.

    Rows hold ``stage``, ``step``, ``fooled`` (samples first fooled here), ``forwards`` and ``backwards`` (image passes
    spent here), and ``loss`` (mean over the samples of the pass, ``None`` where it was not needed). The row of stage -1 is
    the pass of the clean images, and of a start.

    Attributes:
        fooled_in: for each call of the attack, the stage (N,) in which each sample was fooled: -1 if the clean image was
            already wrong, `NEVER` if it held out.
    """

    _sums: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 4), repr=False)
    fooled_in: list[Tensor] = field(default_factory=list, repr=False)

    def add(self, stage: int, step: int, fooled: int, forwards: int, backwards: int, loss: Tensor | float) -> None:
        sums = self._sums[stage, step]
        for column, value in enumerate((fooled, forwards, backwards, loss)):
            sums[column] += float(value)

    def rows(self) -> list[dict[str, Any]]:
        """The table, in the order of the run, with ``robust``: the samples not fooled so far."""
        rows, robust = [], sum(map(len, self.fooled_in))
        for (stage, step), (*counts, loss) in sorted(self._sums.items()):
            fooled, forwards, backwards = map(int, counts)
            robust -= fooled
            mean_loss = loss / backwards if backwards else None
            row = dict(stage=stage, step=step, fooled=fooled, robust=robust, forwards=forwards, backwards=backwards)
            rows.append({**row, "loss": mean_loss})
        return rows


@dataclass(frozen=True)
class Draws:
    """How a random model is looked at.

    Attributes:
        count: forward passes of every iterate.
        per_pass: how many of them go through the model as one batch; more than one only where a model draws for every
            image of a batch by itself.
    """

    count: int
    per_pass: int = 1


class Point(NamedTuple):
    """What was seen at iterates (N, C, H, W): the mean over draws of scores and loss, and the loss's gradient.

    ``margin_N`` is negative where the sample is fooled: the margin of a deterministic model; else the probability of being
    right, with the mean margin to break ties.
    """

    scores_NK: Tensor
    margin_N: Tensor
    loss_N: Tensor
    gradient: Tensor | None
    forwards: int
    backwards: int

    @classmethod
    def joined(cls, points: Sequence[Point]) -> Point:
        """Of all batches."""
        scores, margins, losses, gradients, forwards, backwards = zip(*points, strict=True)
        gradient = None if gradients[0] is None else torch.cat(gradients)
        return cls(torch.cat(scores), torch.cat(margins), torch.cat(losses), gradient, sum(forwards), sum(backwards))

    def at(self, rows: Tensor) -> Point:
        """Of some samples; the passes have been counted."""
        gradient = None if self.gradient is None else self.gradient[rows]
        return Point(self.scores_NK[rows], self.margin_N[rows], self.loss_N[rows], gradient, 0, 0)


def success_margin(scores: Tensor, labels: Tensor, aim: Tensor | None) -> Tensor:
    """Negative where the prediction is wrong or, with ``aim``, where it is the class aimed at; (..., N)."""
    return margin(scores, labels) if aim is None else targeted_margin(scores, aim)


def expected_margin(right_N: Tensor, margin_N: Tensor) -> Tensor:
    """Orders samples by the probability of being right, then by mean margin; negative where that probability is 0."""
    closeness_N = 0.5 + margin_N.atan() / math.pi
    return torch.where(right_N > 0, right_N, -1.0) + TIE * closeness_N


def verdict(outputs: Outputs, labels: Tensor, aim: Tensor | None) -> tuple[Tensor, Tensor]:
    """The probability of being right, or of not being where an attack aims, and the mean margin; (N,), (N,)."""
    if outputs.verdict_ENK is None:
        margin_N = success_margin(outputs.scores_NK.detach(), labels, aim)
        return (~(margin_N < 0)).to(margin_N), margin_N
    margin_EN = success_margin(outputs.verdict_ENK.detach(), labels, aim)
    weights_E = torch.ones(1) if outputs.weights_E is None else outputs.weights_E
    weights_E = weights_E.to(margin_EN)
    return weights_E @ (~(margin_EN < 0)).to(margin_EN), weights_E @ margin_EN


def look(
    forward: Forward,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    targeted: bool,
    objective: Objective | None,
    draws: Draws | None,
) -> Point:
    """Scores, success and, with an ``objective``, its loss and gradient at ``x``: one forward pass serves all three.

    The draws of a random model are accumulated, so that memory does not grow with their number.
    """
    count, at_once = (1, 1) if draws is None else (draws.count, draws.per_pass)
    x = x.detach().requires_grad_(objective is not None)
    right_N = margin_N = loss_N = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    scores_NK = torch.zeros((), dtype=x.dtype, device=x.device)
    gradient: Tensor | None = None
    random, backwards = draws is not None, 0
    for copies in _chunks(count, at_once):
        at, to = tile(labels, copies), None if targets is None else tile(targets, copies)
        with torch.set_grad_enabled(objective is not None):
            outputs = forward(tile(x, copies))
        right, lead = verdict(outputs, at, to if targeted else None)
        right_N, margin_N = right_N + total(right, copies), margin_N + total(lead, copies)
        scores_NK = scores_NK + total(outputs.scores_NK.detach(), copies)
        random = random or outputs.weights_E is not None
        if objective is None or (draws is None and not right.any()):
            continue
        with torch.enable_grad():
            loss = objective(outputs, at, to)
        (part,) = torch.autograd.grad(loss.sum(), x, allow_unused=True) if loss.requires_grad else (None,)
        if part is None:
            raise ValueError(NO_GRADIENT)
        gradient = part if gradient is None else gradient + part
        loss_N = loss_N + total(loss.detach(), copies)
        backwards += copies * len(x)
    if objective is not None and gradient is None:
        gradient = torch.zeros_like(x)  # all are fooled
    forwards, seen = count * len(x), torch.full_like(right_N, count)
    doubtful = torch.nonzero(right_N == 0).squeeze(-1) if draws is not None else ()
    if len(doubtful):  # before a sample leaves on these draws, others have to confirm them
        forwards += CONFIRMING * len(doubtful)
        seen[doubtful] += CONFIRMING
        aim = targets[doubtful] if targeted and targets is not None else None
        for copies in _chunks(CONFIRMING, at_once):
            with torch.no_grad():
                outputs = forward(tile(x.detach()[doubtful], copies))
            again = verdict(outputs, tile(labels[doubtful], copies), None if aim is None else tile(aim, copies))
            right_N[doubtful] += total(again[0], copies)
            margin_N[doubtful] += total(again[1], copies)
    if random:
        margin_N = expected_margin(right_N / seen, margin_N / seen)
    return Point(scores_NK / count, margin_N, loss_N / count, gradient, forwards, backwards)


def tile(t: Tensor, copies: int) -> Tensor:
    """(N, ...) -> (copies * N, ...)."""
    return t if copies == 1 else t.repeat(copies, *[1] * (t.dim() - 1))


def total(t: Tensor, copies: int) -> Tensor:
    """(copies * N, ...) -> (N, ...), summed over copies."""
    return t if copies == 1 else t.view(copies, -1, *t.shape[1:]).sum(0)


def _chunks(count: int, size: int) -> list[int]:
    """``count`` in parts of ``size``."""
    return [size] * (count // size) + ([count % size] if count % size else [])


def closest_class(gaps_NK: Tensor, aims_NK: Tensor) -> Tensor:
    """The class of the smallest gap among those aimed at least often, (N,)."""
    finite_NK = gaps_NK.nan_to_num(nan=torch.finfo(gaps_NK.dtype).max)
    return finite_NK.masked_fill(aims_NK > aims_NK.amin(1, keepdim=True), torch.inf).argmin(1)


def descend(
    forward: Forward,
    objective: Objective,
    ball: Ball,
    start: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    targeted: bool,
    gaps_NK: Tensor,
    step_rule: StepRule,
    steps: int,
    draws: Draws | None,
    record: Callable[[int, int, int, int, Tensor | float], None],
    first: Point | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise ``objective`` over the ball from ``start`` (N, C, H, W).

    ``gaps_NK``, the smallest lead of the label's score over each class's so far, is brought up to date in place. ``first``
    is what has been seen at the start already.

    Returns:
        The iterate of the smallest margin (`Point`) for every sample; that margin, (N,), below zero where it is fooled; and
        the last iterate. The margin is that of the model's own prediction, whatever the objective.
    """
    best_x, last_x, best_margin = start.clone(), start.clone(), torch.full_like(labels, torch.inf, dtype=start.dtype)
    active = torch.arange(len(start), device=start.device)
    x = previous = start
    for step in range(steps + 1):
        last = step == steps
        if first is None or step:
            point = look(forward, x, labels, targets, targeted, None if last else objective, draws)
        else:
            point = first
        gaps_NK[active] = gaps_NK[active].fmin(gather(point.scores_NK, labels).unsqueeze(-1) - point.scores_NK)
        margin_N = point.margin_N.to(best_margin.dtype)
        improved = margin_N < best_margin[active]
        rows = active[improved]
        best_x[rows], best_margin[rows] = x[improved], margin_N[improved]
        keep = ~(margin_N < 0)
        alive = int(keep.sum())
        record(step, len(x) - alive, point.forwards, point.backwards, point.loss_N.sum() * (point.backwards / len(x)))
        if last or not alive:
            last_x[active] = x
            break
        loss_N, gradient = point.loss_N, point.gradient
        assert gradient is not None
        if alive < len(x):
            active, x, previous, gradient = (t[keep] for t in (active, x, previous, gradient))
            loss_N, margin_N = loss_N[keep], margin_N[keep]
            labels, targets = labels[keep], None if targets is None else targets[keep]
            ball = ball.select(keep)
            step_rule.select(keep)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        previous, x = step_rule.move(step, ball, previous, x, gradient, loss_N, margin_N)
    return best_x, best_margin, last_x


def attack(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    stages: Callable[[int], Sequence[Stage]],
    *,
    norm: str,
    eps: float,
    steps: int,
    step_rule: Callable[..., StepRule],
    seed: int,
    opening: Stage | None = None,
    aim: Tensor | None = None,
    start: Tensor | None = None,
    draws: Draws | None = None,
    batch_size: int | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Run the stages one after another, each on the samples that the ones before it left robust, cheapest first.

    Args:
        forward: images (N, C, H, W) -> `Outputs`.
        images, labels: clean images in [0, 1] and the classes to leave, (N,).
        stages: what to run, by the number of classes.
        norm, eps: the ball; eps in pixel units of [0, 1].
        steps: gradient steps of each stage.
        opening: what to run before ``stages``, from ``start`` or the clean images: the pass that shows their scores is its
            first.
        aim: the class to reach, (N,), for a targeted attack: success is then its prediction. ``None``: success is any
            prediction but the label.
        start: where ``opening``, or the first restart, starts, (N, C, H, W), in the ball, if not at the clean images, or at
            random.
        draws: how a random model is looked at; ``None``: the model is deterministic.
        batch_size: samples per pass; ``None`` is all at once.

    Returns:
        Adversarial images, (N, C, H, W): the first iterate that succeeded; failing that, of all iterates and the clean
        image, the one of the smallest margin.
    """
    batch_size = batch_size or max(len(images), 1)
    add = trace.add if trace is not None else (lambda *row: None)

    def checked(x: Tensor) -> Outputs:
        outputs = forward(x)
        check_label_range(labels, outputs.scores_NK.shape[1])
        if aim is not None:
            check_label_range(aim, outputs.scores_NK.shape[1], "target labels")
        return outputs

    def survey(x: Tensor, objective: Objective | None) -> Point:
        """Of all samples."""
        parts = torch.arange(len(x), device=x.device).split(batch_size)
        targeted = aim is not None
        return Point.joined(
            [look(checked, x[i], labels[i], None if aim is None else aim[i], targeted, objective, draws) for i in parts]
        )

    loss = None if opening is None else opening.objective
    surveys = [survey(images, loss if start is None else None)]
    clean_NK, margins = surveys[0].scores_NK, surveys[0].margin_N
    margins = margins.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # any finite score is less
    ranked_NK = mask_class(clean_NK, labels).argsort(dim=-1, descending=True, stable=True)
    adversarial, ended = images.clone(), images.clone()
    if start is not None:
        surveys.append(survey(start, loss))
        closer = surveys[1].margin_N < margins
        adversarial[closer], margins = start[closer], margins.fmin(surveys[1].margin_N)
    origin, begun = images if start is None else start, surveys[-1]
    if aim is not None:  # a caller who knows only the class to reach passes it as the label, too
        labels = torch.where(labels == aim, best_other(clean_NK, aim), labels)
    gaps_NK = gather(clean_NK, labels).unsqueeze(-1) - clean_NK
    plan = [*([] if opening is None else [opening]), *stages(clean_NK.shape[1])]
    never_NK = F.one_hot(labels, clean_NK.shape[1]) * NEVER
    aims = {stage.steps or steps: never_NK.clone() for stage in plan}  # at each class, by stages of as many steps or more
    fooled_in = torch.full_like(labels, NEVER).masked_fill(margins < 0, -1)
    if trace is not None:
        trace.fooled_in.append(fooled_in)
    add(-1, 0, int((margins < 0).sum()), sum(seen.forwards for seen in surveys), begun.backwards, begun.loss_N.sum())

    keys = sample_keys(images)
    chosen = torch.arange(0)
    for index, stage in enumerate(plan):
        robust = ~(margins < 0)
        if not robust.any():
            break
        if stage.resume:
            chosen = chosen[robust[chosen]]
        else:
            chosen = torch.nonzero(robust).squeeze(-1)
            chosen = chosen[margins[chosen].argsort(stable=True)]
            chosen = chosen[: max(math.ceil(stage.share * len(chosen)), FEWEST)]
        if not len(chosen):
            continue
        stage_steps = stage.steps or steps
        for rows in chosen.split(batch_size):
            ball = make_ball(norm, images[rows], eps)
            own_keys = [keys[row] for row in rows.tolist()]
            if stage.resume:
                begin = ended[rows]
            elif stage is opening:
                begin = origin[rows]
            elif start is not None and stage.restart == 0:
                begin = ball.project(start[rows])
            else:
                begin = ball.start(start_noise(own_keys, images[rows], seed=seed, restart=stage.restart, norm=norm))
            targets = aim if aim is None else aim[rows]
            if stage.direction is not None:
                noise_NK = direction_noise(own_keys, clean_NK[rows], seed=seed, restart=stage.restart)
                targets = stage.direction(noise_NK, labels[rows], ranked_NK[rows, :-1])
            elif stage.target_rank is not None:
                closest = stage.target_rank == CLOSEST
                aimed_NK = aims[stage_steps][rows]
                targets = closest_class(gaps_NK[rows], aimed_NK) if closest else ranked_NK[rows, stage.target_rank - 1]
                for length, aims_NK in aims.items():
                    aims_NK[rows, targets] += int(length <= stage_steps)
            closest_NK = gaps_NK[rows]
            best_x, best_margin, ended[rows] = descend(
                forward,
                stage.objective,
                ball,
                begin,
                labels[rows],
                targets,
                aim is not None,
                closest_NK,
                (stage.step_rule or step_rule)(begin, eps=eps, steps=stage_steps),
                stage_steps,
                draws,
                lambda *row, index=index: add(index, *row),
                begun.at(rows) if stage is opening else None,
            )
            gaps_NK[rows] = closest_NK
            better = best_margin < margins[rows]
            adversarial[rows[better]], margins[rows[better]] = best_x[better], best_margin[better].to(margins.dtype)
            fooled_in[rows[best_margin < 0]] = index
    return adversarial
