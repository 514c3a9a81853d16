"""Mixed precision only where it shows the same, faster; verdicts always in full precision."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import judge
from ensemble_attacks.devices import full_precision
from ensemble_attacks.models import tuning
from ensemble_attacks.models.tuning import twin_for
from ensemble_attacks.models.twins import Autocast

BACKENDS: Any = torch.backends


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def is_mixed(net: nn.Module) -> bool:
    return any(isinstance(part, Autocast) for part in net.modules())


@pytest.mark.parametrize(
    ("few", "many", "other", "mixed"),
    [
        (1.0, 0.5, False, True),
        (1.9, 0.5, False, True),  # a few images do not fill a device
        (3.0, 0.5, False, False),
        (1.0, 0.95, False, False),
        (1.0, 0.5, True, False),
    ],
)
def test_mixed_precision_is_chosen_where_it_is_faster_and_shows_the_same(
    few: float, many: float, other: bool, mixed: bool, images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(
        tuning, "seconds", lambda net, x: 1.0 if not is_mixed(net) else few if len(x) <= tuning.SEEN else many
    )
    if other:
        plain_pass = Autocast.forward
        monkeypatch.setattr(
            Autocast, "forward", lambda net, x: plain_pass(net, x).flip(1) if len(x) > 8 else plain_pass(net, x)
        )
    model = small()
    assert is_mixed(twin_for(model, images, amp=True)) == mixed
    assert ("is not run in mixed precision" in caplog.text) != mixed
    assert not is_mixed(twin_for(model, images))


def test_a_measurement_leaves_the_model_alone(images: Tensor) -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        assert tuning.seconds(model, images) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Watching(nn.Module):
    """A model that books in what precision it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Linear(4, 2), set[tuple[str, bool, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        allowed = BACKENDS.cudnn.allow_tf32
        self.seen.add((torch.get_float32_matmul_precision(), allowed, torch.is_autocast_enabled("cpu")))
        return self.net(x)


def test_verdicts_are_in_full_precision() -> None:
    model, x, y = Watching(), torch.rand(6, 4), torch.zeros(6).long()
    products, convolutions = torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        BACKENDS.cudnn.allow_tf32 = True
        with torch.autocast("cpu", torch.bfloat16):
            judge(model, x, y, x, eps=0.1)
            assert torch.is_autocast_enabled("cpu")
        assert model.seen == {("highest", False, False)}
        assert torch.get_float32_matmul_precision() == "medium"
        assert BACKENDS.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(products)
        BACKENDS.cudnn.allow_tf32 = convolutions


@pytest.mark.skipif(not hasattr(BACKENDS.cudnn, "conv"), reason="this torch does not set single operations")
def test_full_precision_where_single_operations_are_set() -> None:
    operations = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "tf32"
        BACKENDS.cudnn.rnn.fp32_precision = "ieee"
        with full_precision():
            assert {operation.fp32_precision for operation in operations} == {"ieee"}
        assert {operation.fp32_precision for operation in operations} == {"tf32"}
    finally:
        BACKENDS.cudnn.rnn.fp32_precision = before[1]
        for operation, setting in zip(operations, before, strict=True):
            operation.fp32_precision = setting
