"""Find out what a model is made of, as far as an attack has to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import PartError
from ensemble_attacks.models.ask import as_module, ask, check_dtype, classes_of, member_probabilities
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.parts import find_parts
from ensemble_attacks.models.votes import VOTES, vote_of
from ensemble_attacks.scores import differ

REPEATS = 5  # forward passes of the same images
FEW, MORE = 2, 25  # images, and forward passes of these: a model may draw once for a whole batch, and seldom otherwise


@dataclass(frozen=True)
class Structure:
    """A record of what a model shows of itself.

    Attributes:
        members: whether it has ``member_logits`` and ``aggregate``.
        own_aggregation: whether its members are put together otherwise than by mean probability, hard votes or mean logits.
        frontend: whether it has parts called ``frontend``.
        random: whether the same images got different scores.
        known_draws: whether it draws its members, and says how likely each is.
        classes: the number of scores of every image.
    """

    members: bool
    own_aggregation: bool
    frontend: bool
    random: bool
    known_draws: bool
    classes: int


def structure_of(model: nn.Module, x: Tensor, seed: int = 0) -> Structure:
    """Return the `Structure` of a model, from its attributes and from its scores of some images (N, C, H, W)."""
    model = as_module(model)
    members = hasattr(model, "member_logits") and hasattr(model, "aggregate")
    known_draws = member_probabilities(model) is not None
    try:
        frontend = bool(find_parts(model, "frontend"))
    except PartError:
        frontend = False
    with guarded(model, seed=seed), torch.no_grad():
        check_dtype(model, x)
        classes = classes_of(model, x)
        scores = [ask(model, x) for _ in range(REPEATS)]
        few = [ask(model, x[:FEW]) for _ in range(MORE)]
    random = any(differ(other, draws[0]) for draws in (scores, few) for other in draws[1:])
    own = members and not known_draws and vote_of(model).name not in VOTES
    return Structure(members, own, frontend, random, known_draws, classes)
