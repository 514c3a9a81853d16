"""Small ensembles that tests share, and which members of a family of tests run always."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ensemble_attacks import Ensemble

VOTES = ("softmax", "voting", "logits")


def slow_but(kept: Container[Any], family: Iterable[Any]) -> list[Any]:
    """Return a family of parameters, all marked slow but those that are kept, which stand for it in the default run."""
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=[] if one in kept else pytest.mark.slow)
        for one in family
    ]


def make_member(classes: int = 4, seed: int = 0) -> nn.Module:
    """An untrained network on 3x6x6 images, with batch norm and dropout, whose statistics are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed writes tracebacks for each accelerator
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(288, classes),
        )
        net.get_buffer("1.running_mean").normal_(std=0.1)
        net.get_buffer("1.running_var").uniform_(0.5, 1.5)
    return net.eval()


def make_ensemble(vote: str = "softmax", members: int = 3, classes: int = 4, dtype: torch.dtype = torch.float64) -> Ensemble:
    return Ensemble([make_member(classes, seed) for seed in range(members)], vote).to(dtype).eval()
