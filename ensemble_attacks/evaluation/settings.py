"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shared:
    """What all cells of a run share.

    Attributes:
        draws: fresh forward passes by which the judge decides on each image of a random model.
        eot_iter: of a random model, draws of every iterate; ``None``: the model is deterministic.
        amp: craft in mixed precision; the judge does not.
    """

    norm: str = field(default="Linf", kw_only=True)
    batch_size: int = field(default=250, kw_only=True)
    draws: int = field(default=1, kw_only=True)
    eot_iter: int | None = field(default=None, kw_only=True)
    amp: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Settings(Shared):
    """What all attacks of one evaluation share.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1].
    """

    eps: float
    seed: int = 0
