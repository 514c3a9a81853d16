"""No gradient is asked for more images at once than a batch holds: what is large may not fit into memory otherwise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble_attacks import evaluate


class Watched(nn.Module):
    """A linear network that notes the largest batch of which it was asked for a gradient."""

    largest = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(75, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            Watched.largest = max(Watched.largest, len(x))
        return self.linear(x.flatten(1))


def test_the_twin_is_compared_on_no_more_than_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Watched().eval(), torch.rand(12, 3, 5, 5)
    evaluate(model, (x, model(x).argmax(1)), eps=0.1, attacks="apgd-ce?steps=2", batch_size=3, out=tmp_path / "run")
    assert 0 < Watched.largest <= 3
