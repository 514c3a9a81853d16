"""How often attacks wait for a device; `benchmarks/waits.py` has the figures of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.waits import measured, ours
from ensemble_attacks import FrontEndReversal
from ensemble_attacks.data import load_dataset
from ensemble_attacks.devices import numbers, unlike
from ensemble_attacks.models.preserve import preserved
from tests.attacks.test_contract import behind_a_front_end
from tests.helpers import make_ensemble, slow_but
from tests.simulated_device import AVAILABLE, DEVICE, SECOND, simulated

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no hooks for devices written in Python")
MOST = 0.2  # waits for a step, where an attack takes a hundred or more


def test_steps_cost_no_waits() -> None:
    few, many = (measured(f"ea-apgd-ce?steps={steps}", *load_dataset("digits", n=2), eps=0.01) for steps in (4, 12))
    assert many[1] >= few[1] + 8
    assert few[0].waits == many[0].waits < 10


@pytest.mark.parametrize("name", slow_but((), ours()))
def test_no_attack_waits_at_every_step(name: str) -> None:
    device, steps = measured(name, *load_dataset("digits", n=4), eps=0.02)
    assert device.waits <= MOST * max(steps, 100)


def test_what_is_carried_back_through_a_front_end_costs_no_waits(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:4], batch[1][:4]
    counts = []
    for steps in (4, 12):
        with simulated() as device:
            fronted = behind_a_front_end(make_ensemble()).to(DEVICE)
            attack = FrontEndReversal(fronted, eps=0.01, steps=steps, amplification=1.0)
            here = images.to(DEVICE), labels.to(DEVICE)
            device.waits = 0
            attack(*here)
            counts.append(device.waits)
    assert counts[0] == counts[1] < 50


def test_numbers_are_read_at_once() -> None:
    with simulated() as device:
        values: list[Tensor | float] = [torch.tensor(2.0).to(DEVICE), 3, torch.tensor(4.0), torch.tensor(5.0).to(DEVICE)]
        device.waits = 0
        assert numbers(values) == [2, 3, 4, 5]
        assert device.waits == 1
        assert numbers([*values, torch.tensor(6.0).to(SECOND)]) == [2, 3, 4, 5, 6]
    assert numbers([]) == []


def test_what_has_changed_is_found_at_once() -> None:
    with simulated() as device:
        same, changed = torch.zeros(2).to(DEVICE), torch.ones(3).to(DEVICE)
        device.waits = 0
        pairs = [(same, same.clone()), (changed, changed + 1), (torch.zeros(1), torch.zeros(1))]
        assert [pair[0] is changed for pair in unlike(pairs)] == [True]
        assert device.waits == 1


class Counter(nn.Module):
    def __init__(self, buffers: int) -> None:
        super().__init__()
        for index in range(buffers):
            self.register_buffer(f"count_{index}", torch.zeros(3))


def test_a_model_is_put_back_by_one_wait_however_many_buffers_it_has() -> None:
    with simulated() as device:
        model = Counter(20).to(DEVICE)
        device.waits = 0
        with preserved(model):
            model.get_buffer("count_7").add_(1)
        assert device.waits == 1
        assert not sum(buffer.abs().sum().item() for buffer in model.buffers())
