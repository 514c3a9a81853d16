"""The process's generators, seeded and put back."""

from __future__ import annotations

import random
import traceback

import numpy as np
import pytest
import torch

from ensemble_attacks.randomness import seeded


def test_seeded_is_what_seeding_each_gives() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    with seeded(2**40):
        drawn = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(2**40)))
    assert drawn[1] == np.random.RandomState(2**40 % 2**32).rand()
    assert drawn[2] == random.Random(2**40).random()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]  # noqa: NPY002


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator, which is seeded, too")
def test_no_traceback_is_taken_for_accelerators_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traceback, "format_stack", lambda *_: 1 / 0)
    with seeded(0):
        pass
