"""The loop that every attack runs: active set, best iterate, stages, restarts, trace. Written once.

One forward pass per iterate serves both the success test and the gradient; the last iterate is tested too. A sample leaves
the batch the moment it is fooled. The clean image is the centre of the ball in every stage.

For a random model every one of these, loss, gradient, success, and which iterate is best, is the mean over draws, and a
sample leaves only when no draw of many is right.

Shape suffixes: M members, N samples, K classes, E outcomes of a random model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.descent.balls import Ball, make_ball
from ensemble_attacks.descent.look import Draws, Point, look
from ensemble_attacks.descent.noise import direction_noise, sample_keys, start_noise
from ensemble_attacks.descent.stages import CLOSEST, FEWEST, NEVER, Objective, Stage, Trace
from ensemble_attacks.descent.steps import StepRule
from ensemble_attacks.models.view import Forward, Outputs
from ensemble_attacks.scores import best_other, gather, mask_class
from ensemble_attacks.validation import check_label_range


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
