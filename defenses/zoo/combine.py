"""Put models together by name, as in ``ensemble:A+B?vote=voting``, ``crossmax:A+B?k=1`` or ``randomized:A+B?per=batch``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from defenses.crossmax import CrossMax
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks.models.ensembles import Ensemble


def _ensemble(members: Sequence[nn.Module], vote: str = "softmax") -> Ensemble:
    return Ensemble(members, vote)


def _crossmax(members: Sequence[nn.Module], k: int | None = None) -> CrossMax:
    return CrossMax(members, k)


def _randomized(
    members: Sequence[nn.Module],
    probabilities: Sequence[float] | None = None,
    per: str = "image",
    seed: int | None = None,
) -> RandomizedEnsemble:
    return RandomizedEnsemble(members, probabilities, per=per, seed=seed)


COMBINATIONS: dict[str, Callable[..., Any]] = {"ensemble": _ensemble, "crossmax": _crossmax, "randomized": _randomized}
