"""Every behaviour of real models meets some entrances here, and all of them outside CI (`benchmarks/matrix.py`)."""

from __future__ import annotations

import pytest

from benchmarks.behaviours import BEHAVIOURS
from benchmarks.matrix import ENTRANCES, cells

DEAR = ("AutoAttack", "diagnose", "caa", "robustbench", "zero-order", "mora-mt", "evaluate")
CHEAP = [name for name in ENTRANCES if not name.startswith(DEAR)]
FEW = [name for name in ENTRANCES if name.startswith(("AutoAttack", "evaluate"))]
SHARE = 25  # a behaviour meets one of so many of the cheap entrances, the next one others


@pytest.mark.parametrize("index", range(len(BEHAVIOURS)), ids=[*BEHAVIOURS])
def test_is_right_or_one_typed_error(index: int) -> None:
    entrances = CHEAP[index % SHARE :: SHARE] + [FEW[index // 7 % len(FEW)]] * (index % 7 == 0)
    found = cells(["judge", *entrances], [[*BEHAVIOURS][index]])
    assert not [cell for cell in found if cell.outcome not in ("right", "typed")]


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_at_every_entrance(behaviour: str) -> None:
    assert not [cell for cell in cells([*ENTRANCES], [behaviour]) if cell.outcome not in ("right", "typed")]
