"""Implement A3, Adaptive Auto Attack (Liu et al., "Practical Evaluation of Adversarial Robustness via Adaptive Auto Attack",
CVPR 2022).

Restarts begin where seven steps along a random direction in the space of logits lead (adaptive direction initialisation),
and ever more steps go to ever fewer samples, the most promising ones (online statistics-based discarding).

The released code takes the signs of two entries of the direction from what succeeded in an earlier restart, over all images.
Here they have the signs that it finds in general: against the label, towards one wrong class after the other, so that no
sample's direction depends on the others. Nor does the schedule change, as there, with the success of the directions or with
fewer than a tenth of the samples left; and of its last restart's fifty repetitions ten are made.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.descent.objectives import Goal, lead, of_scores
from ensemble_attacks.descent.stages import Direction, Stage
from ensemble_attacks.descent.steps import ConstantSteps, DecayingSteps
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.validation import check_count

INITIAL_STEPS = 7
SCHEDULE = (  # of restarts: steps, share of the robust samples
    *[(8, 1.0)] * 3,
    *[(25, 0.7), (30, 0.6), (30, 0.5), (35, 0.4), (40, 0.3), (45, 0.2)],
    *[(50, 0.1)] * 5,
    *[(55, 0.065)] * 4,
    *[(60, 0.03)] * 10,
)


def any_direction(noise_NK: Tensor, labels: Tensor, ranked_NK: Tensor) -> Tensor:
    return noise_NK


def towards_class(rank: int) -> Direction:
    """Return a maker of directions that lower the label's score and raise one wrong class's; other entries are random."""

    def direction(noise_NK: Tensor, labels: Tensor, ranked_NK: Tensor) -> Tensor:
        scale = noise_NK.shape[1] / 10
        own = noise_NK.gather(1, labels[:, None])
        directed = noise_NK.scatter(1, labels[:, None], scale * (-0.2 + 0.3 * own))  # uniform in [-0.5, 0.1]
        return directed.scatter(1, ranked_NK[:, rank % ranked_NK.shape[1]][:, None], scale * 0.8)

    return direction


def along(outputs: Outputs, goal: Goal) -> Tensor:
    """Return ``w . z``, (N,), the scores along the goal's direction."""
    assert goal.direction is not None
    return (goal.direction * outputs.scores_NK).sum(1)


class A3(DescentAttack):
    r"""An attack with A3 on any classifier, in the norms Linf and L2 (Liu et al., CVPR 2022).

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        n_restarts (int): how many of the schedule's 28 restarts are run; the first has no directed start. (Default: 28)
        seed (int): seed of the random starts and directions. (Default: 0)
        batch_size (int): samples per pass. (Default: None: all at once)
        box (Box): the values that images can take. (Default: [0, 1])
        mask (Tensor): what may move, bool, of one image or of each. (Default: None: all)

    Samples compete for passes: beyond a hundred robust ones, a sample's result depends on which others are in the call.

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images
    """

    step_rule = DecayingSteps

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        n_restarts: int = len(SCHEDULE),
        seed: int = 0,
        *,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            "A3", model, norm=norm, eps=eps, steps=SCHEDULE[0][0], seed=seed, batch_size=batch_size, box=box, mask=mask
        )
        self.n_restarts = n_restarts
        self.supported_mode = ["default"]
        self._check()

    def _check(self) -> None:
        super()._check()
        check_count("n_restarts", self.n_restarts)
        if self.n_restarts > len(SCHEDULE):
            raise ValueError(
                f"n_restarts must be at most {len(SCHEDULE)}, as many as the schedule has, got {self.n_restarts}"
            )

    def _stages(self, num_classes: int) -> list[Stage]:
        stages = []
        whole_steps = partial(ConstantSteps, share=1.0)
        for restart, (steps, share) in enumerate(SCHEDULE[: self.n_restarts]):
            if restart:
                direction = towards_class(restart - 2) if restart > 1 else any_direction
                stages.append(
                    Stage(
                        along,
                        restart=restart,
                        direction=direction,
                        steps=INITIAL_STEPS,
                        step_rule=whole_steps,
                        share=share,
                    )
                )
            stages.append(Stage(of_scores(lead), restart=restart, steps=steps, resume=restart > 0))
        return stages
