"""Small promises: a trace can be pickled, an attack that wants more than a model says so."""

from __future__ import annotations

import pickle

import pytest
import torch

from ensemble_attacks import APGD, CAA
from ensemble_attacks.attacks.registry import find_attack
from ensemble_attacks.descent.stages import Trace
from tests.helpers import make_ensemble


def test_a_trace_can_be_pickled() -> None:
    attack = APGD(make_ensemble(dtype=torch.float32), eps=0.1, steps=3)
    attack.trace = Trace()
    x = torch.rand(4, 3, 6, 6)
    attack(x, torch.zeros(4, dtype=torch.long))
    again = pickle.loads(pickle.dumps(attack.trace))  # noqa: S301
    assert again.rows() == attack.trace.rows()
    assert all(map(torch.equal, again.fooled_in, attack.trace.fooled_in))
    again.add(0, 99, 0, 1, 1, 0.0)
    assert len(again.rows()) == len(attack.trace.rows()) + 1


def test_caas_descents_are_those_of_the_policy_or_in_their_proportion() -> None:
    attack = CAA(make_ensemble())
    assert [stage.steps or attack.steps for stage in attack._stages(4)] == [50] * 3 + [25] * 3 + [125]
    attack.steps = 2
    assert [stage.steps or attack.steps for stage in attack._stages(3)] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("name", ["MultiAttack", "LGV"])
def test_attacks_that_want_more_than_a_model(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be had by its name: .* pass an instance"):
        find_attack(f"torchattacks:{name}")
