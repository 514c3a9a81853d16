"""Define the settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shared:
    """A record of what all cells of a run share.

    Attributes:
        norm: the norm of the ball.
        batch_size: the number of images per pass.
        draws: the number of fresh forward passes by which the judge decides on each image of a random model.
        eot_iter: the number of draws of every iterate of a random model; ``None``: the model is deterministic.
        amp: whether to craft in mixed precision; the judge does not.
    """

    norm: str = field(default="Linf", kw_only=True)
    batch_size: int = field(default=250, kw_only=True)
    draws: int = field(default=1, kw_only=True)
    eot_iter: int | None = field(default=None, kw_only=True)
    amp: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Settings(Shared):
    """A record of what all attacks of one evaluation share.

    Attributes:
        eps: the radius of the ball, in pixel units of [0, 1].
        seed: the seed of all attacks, and of the models' randomness while they run.
    """

    eps: float
    seed: int = 0
