"""The loop that every attack runs: active set, best iterate, stages, restarts, trace. Written once.

One forward pass per iterate serves both the success test and the gradient; the last iterate is tested too. A sample leaves
the batch the moment it is fooled. The clean image is the centre of the ball in every stage.

Shape suffixes: M members, N samples, K classes.
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


class Outputs(NamedTuple):
    """What one forward pass shows: the model's scores and, for an ensemble, its members' logits."""

    scores_NK: Tensor
    logits_MNK: Tensor | None = None


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
            have aimed at; ``None``: at none.
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
    the clean forward pass.

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


def success_margin(scores_NK: Tensor, labels: Tensor, aim: Tensor | None) -> Tensor:
    """Negative where the prediction is wrong or, with ``aim``, where it is the class aimed at; (N,)."""
    return margin(scores_NK, labels) if aim is None else targeted_margin(scores_NK, aim)


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
    record: Callable[[int, int, int, int, Tensor | float], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise ``objective`` over the ball from ``start`` (N, C, H, W).

    ``gaps_NK``, the smallest lead of the label's score over each class's so far, is brought up to date in place.

    Returns:
        The iterate of the smallest margin for every sample; that margin, (N,), below zero where it is fooled; and the last
        iterate. The margin is that of the model's own prediction, whatever the objective.
    """
    best_x, last_x, best_margin = start.clone(), start.clone(), torch.full_like(labels, torch.inf, dtype=start.dtype)
    active = torch.arange(len(start), device=start.device)
    x = previous = start
    for step in range(steps + 1):
        last = step == steps
        x = x.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            outputs = forward(x)
        scores_NK = outputs.scores_NK.detach()
        gaps_NK[active] = gaps_NK[active].fmin(gather(scores_NK, labels).unsqueeze(-1) - scores_NK)
        margin_N = success_margin(scores_NK, labels, targets if targeted else None).to(best_margin.dtype)
        improved = margin_N < best_margin[active]
        rows = active[improved]
        best_x[rows], best_margin[rows] = x.detach()[improved], margin_N[improved]
        keep = ~(margin_N < 0)
        alive = int(keep.sum())
        if last or not alive:
            last_x[active] = x.detach()
            record(step, len(x) - alive, len(x), 0, 0.0)
            break
        with torch.enable_grad():
            loss_N = objective(outputs, labels, targets)
        (gradient,) = torch.autograd.grad(loss_N.sum(), x)
        x, loss_N = x.detach(), loss_N.detach()
        record(step, len(x) - alive, len(x), len(x), loss_N.sum())
        if alive < len(x):
            active, x, previous, gradient, loss_N = (t[keep] for t in (active, x, previous, gradient, loss_N))
            labels, targets = labels[keep], None if targets is None else targets[keep]
            ball = ball.select(keep)
            step_rule.select(keep)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        x, gradient = step_rule.observe(step, x, loss_N, gradient)
        ahead = ball.project(x + step_rule.size(step, x) * ball.steepest(gradient))
        share = step_rule.momentum if step else 1.0
        x, previous = ball.project(x + share * (ahead - x) + (1 - share) * (x - previous)), x
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
    aim: Tensor | None = None,
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
        aim: the class to reach, (N,), for a targeted attack: success is then its prediction. ``None``: success is any
            prediction but the label.
        batch_size: samples per pass; ``None`` is all at once.

    Returns:
        Adversarial images, (N, C, H, W): the first iterate that succeeded; failing that, of all iterates and the clean
        image, the one of the smallest margin.
    """
    batch_size = batch_size or max(len(images), 1)
    add = trace.add if trace is not None else (lambda *row: None)
    with torch.no_grad():
        clean_NK = torch.cat([forward(batch).scores_NK for batch in images.split(batch_size)])
        check_label_range(labels, clean_NK.shape[1])
        if aim is not None:
            check_label_range(aim, clean_NK.shape[1], "target labels")
        margins = success_margin(clean_NK, labels, aim)
        ranked_NK = mask_class(clean_NK, labels).argsort(dim=-1, descending=True, stable=True)
        if aim is not None:  # a caller who knows only the class to reach passes it as the label, too
            labels = torch.where(labels == aim, best_other(clean_NK, aim), labels)
    gaps_NK = gather(clean_NK, labels).unsqueeze(-1) - clean_NK
    aims_NK = F.one_hot(labels, clean_NK.shape[1]) * NEVER
    fooled_in = torch.full_like(labels, NEVER).masked_fill(margins < 0, -1)
    if trace is not None:
        trace.fooled_in.append(fooled_in)
    add(-1, 0, int((margins < 0).sum()), len(images), 0, 0.0)

    adversarial, ended = images.clone(), images.clone()
    keys = sample_keys(images)
    chosen = torch.arange(0)
    for index, stage in enumerate(stages(clean_NK.shape[1])):
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
        stage_steps = steps if stage.steps is None else stage.steps
        for rows in chosen.split(batch_size):
            ball = make_ball(norm, images[rows], eps)
            own_keys = [keys[row] for row in rows.tolist()]
            if stage.resume:
                start = ended[rows]
            else:
                start = ball.start(start_noise(own_keys, images[rows], seed=seed, restart=stage.restart, norm=norm))
            targets = aim if aim is None else aim[rows]
            if stage.direction is not None:
                noise_NK = direction_noise(own_keys, clean_NK[rows], seed=seed, restart=stage.restart)
                targets = stage.direction(noise_NK, labels[rows], ranked_NK[rows, :-1])
            elif stage.target_rank is not None:
                closest = stage.target_rank == CLOSEST
                targets = closest_class(gaps_NK[rows], aims_NK[rows]) if closest else ranked_NK[rows, stage.target_rank - 1]
                aims_NK[rows, targets] += 1
            closest_NK = gaps_NK[rows]
            best_x, best_margin, ended[rows] = descend(
                forward,
                stage.objective,
                ball,
                start,
                labels[rows],
                targets,
                aim is not None,
                closest_NK,
                (stage.step_rule or step_rule)(start, eps=eps, steps=stage_steps),
                stage_steps,
                lambda *row, index=index: add(index, *row),
            )
            gaps_NK[rows] = closest_NK
            better = best_margin < margins[rows]
            adversarial[rows[better]], margins[rows[better]] = best_x[better], best_margin[better].to(margins.dtype)
            fooled_in[rows[best_margin < 0]] = index
    return adversarial
