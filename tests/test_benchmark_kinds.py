"""The kinds of the benchmark are ensembles that say what their originals say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kinds import KINDS, measured
from benchmarks.kinds_given import Training
from tests.helpers import make_member


def test_there_are_thirty() -> None:
    assert len(KINDS) >= 30


@pytest.mark.parametrize("name", ["one expert by a gate", "stacking", "a member drawn at random", "abstaining"])
def test_a_row(name: str) -> None:
    torch.manual_seed(0)
    x, nets = torch.rand(6, 3, 6, 6), [make_member(seed=seed).eval() for seed in range(3)]
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    row = measured(KINDS[name], list(nets), Training(x, y), x, y, eps=1e-6, steps=2, seed=0)
    assert row["lines"] <= 3
    assert row["MORA"] <= row["clean"] + 20  # a random one's answers vary
    if KINDS[name].draws == 1:
        assert row["clean"] == row["clean, inside"]
