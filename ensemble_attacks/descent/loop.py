"""Run the loop that every attack shares.

One forward pass per iterate serves both the success test and the gradient; the last iterate is tested too. A sample leaves
the batch the moment it is fooled, or on a device a few steps later (`batch`). The clean image is the centre of the ball in
every stage.

For a random model every one of these, loss, gradient, success, and which iterate is best, is the mean over draws, and a
sample leaves only when no draw of many is right.

Shape suffixes: M members, N samples, K classes, E outcomes of a random model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ensemble_attacks.descent.batch import Batch, Descent, Rhythm
from ensemble_attacks.descent.look import Draws, Point, look
from ensemble_attacks.descent.objectives import Goal, Objective
from ensemble_attacks.descent.progress import Progress, Start
from ensemble_attacks.descent.stages import Stage, Trace
from ensemble_attacks.descent.steps import StepRule
from ensemble_attacks.devices import placed
from ensemble_attacks.models.view import Forward
from ensemble_attacks.norms import UNIT, Box

Record = Callable[[int, Tensor, Point], None]  # (step, which are fooled there for the first time, what was seen)


def attack(
    forward: Forward,
    images: Tensor,
    goal: Goal,
    plan: Sequence[Stage],
    *,
    norm: str,
    eps: float,
    steps: int,
    step_rule: Callable[..., StepRule],
    seed: int,
    start: Tensor | None = None,
    draws: Draws | None = None,
    batch_size: int | None = None,
    trace: Trace | None = None,
    box: Box = UNIT,
    scale: Tensor | None = None,
) -> Tensor:
    """Run the stages one after another, each on samples that the ones before it left robust, the smallest margin first.

    Args:
        forward: images (N, C, H, W) -> `Outputs`.
        images: clean images in the ``box``.
        goal: the classes to leave, or to reach.
        plan: the stages to run. The first may be an opening, which shares the pass that shows the clean images' scores.
        norm, eps: the norm and radius of the ball; eps in the images' units.
        steps: the number of gradient steps of each stage that does not say its own.
        step_rule: the maker of the step rule of each stage that does not say its own.
        seed: the seed of the random starts and directions.
        start: where the opening, or the first restart, starts, (N, C, H, W), which is put into the ball; ``None``: the
            opening at the clean images, restarts at random.
        draws: how a random model is looked at; ``None``: the model is deterministic.
        batch_size: the number of samples per pass; ``None``: all at once.
        trace: a record that is filled with what each step found and spent.
        box: the values that images can take.
        scale: the radius of each feature beside the others' (`Ball`), for all images or for each; ``None``: 1.

    Returns:
        Adversarial images, (N, C, H, W): the first iterate that succeeded; failing that, of all iterates and the clean
        image, the one of the smallest margin.
    """
    batch_size = batch_size or max(len(images), 1)
    progress = Progress(images, start, goal, plan, norm=norm, eps=eps, seed=seed, steps=steps, box=box, scale=scale)
    if trace is not None:
        trace.begin(progress.fooled_in)

    def run(index: int, rows: Tensor, seen: Point | None = None) -> None:
        stage = plan[index]
        begun = progress.begin(stage, rows, seen)
        rule = (stage.step_rule or step_rule)(begun.x, eps=eps, steps=progress.steps_of(stage))
        record = partial(trace.step, index) if trace is not None else (lambda *row: None)
        found = descend(forward, stage.objective, begun, rule, progress.steps_of(stage), draws, record)
        progress.book(index, rows, found)

    opening = plan[0] if plan and plan[0].opening else None
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        at_once = opening.objective if opening is not None else None
        seen = [look(forward, images[rows], goal.select(rows), at_once if start is None else None, draws)]
        if start is not None:
            seen.append(look(forward, progress.opening(rows), goal.select(rows), at_once, draws))
        progress.see(rows, seen)
        if trace is not None:
            trace.look((progress.fooled_in[rows] < 0).sum(), seen)
        if opening is not None and len(chosen := progress.rows(opening, rows)):
            run(0, chosen, seen[-1].at(placed(chosen - first, images.device)))
    for index, stage in enumerate(plan):
        chosen = torch.arange(0) if stage.opening else progress.rows(stage)
        for rows in chosen.split(batch_size) if len(chosen) else ():
            run(index, rows)
    return progress.adversarial


def descend(
    forward: Forward,
    objective: Objective,
    begun: Start,
    step_rule: StepRule,
    steps: int,
    draws: Draws | None,
    record: Record,
    rhythm: Rhythm | None = None,
) -> Descent:
    """Maximise ``objective`` over the ball; success, and which iterate is best, go by the model's own prediction."""
    x, ball, goal, gaps_NK, seen = begun
    batch, previous = Batch(x, gaps_NK, rhythm), x
    for step in range(steps + 1):
        last = step == steps
        aim = None if last else objective
        point = seen if seen is not None and not step else look(forward, x, goal, aim, draws, batch.robust)
        record(step, batch.book(x, point, goal), point)
        if last or not batch.alive():
            break
        loss_N, gradient, margin_N = point.loss_N, point.gradient, point.margin_N
        assert gradient is not None
        if (stay := batch.leave()) is not None:
            x, previous, gradient, loss_N, margin_N = (t[stay] for t in (x, previous, gradient, loss_N, margin_N))
            goal, ball = goal.select(stay), ball.select(stay)
            step_rule.select(stay)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        previous, x = step_rule.move(step, ball, previous, x, gradient, loss_N, margin_N)
    return batch.found(x)
