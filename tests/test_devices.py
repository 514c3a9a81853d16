"""On a device as on the CPU: the same images and flags, whatever is where.

The device is simulated (`simulated_device`), so that this needs none; docs/devices.md says what it cannot show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from benchmarks import matrix
from benchmarks.behaviours import BEHAVIOURS, Case
from defenses import load_model
from ensemble_attacks import APGD, MORA, judge
from ensemble_attacks.cli import main
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.models.twins import prepare
from tests.attacks import test_contract as contract
from tests.helpers import make_ensemble
from tests.simulated_device import AVAILABLE, DEVICE, Waits, judged

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no hooks for devices written in Python")
QUICK = {"mora": "Linf", "apgd-ce": "L2", "eot-apgd": "Linf", "crossmax": "L2"}
ROUNDING = 1e-9  # in float64: sums over other batches, as a device lets samples leave later


@pytest.fixture
def device() -> Iterator[Waits]:
    with judged() as waits:
        yield waits


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (lambda x: x + torch.ones(3), "same device"),
        (lambda x: x.numpy(), "to numpy"),
        (lambda x: torch.zeros(3)[x.long()], "indices"),
        (lambda x: torch.rand(3, device=DEVICE, generator=torch.Generator()), "generator"),
    ],
)
def test_the_simulated_device_refuses_what_a_gpu_refuses(device: Waits, refused: Callable[[Tensor], Any], why: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=why):
        refused(torch.zeros(3).to(DEVICE))


def test_the_simulated_device_counts_what_a_gpu_waits_for(device: Waits) -> None:
    x = torch.ones(3, device=DEVICE)
    torch.where(x > 0, x, 2 * x)[torch.arange(2, device=DEVICE)].sum()
    assert device.waits == 0
    waiting: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: x[x > 0],
        lambda: x[torch.tensor([0])],
        lambda: torch.nonzero(x),
        lambda: x.cpu(),
        lambda: torch.ones(2).to(DEVICE),
    ]
    for count, wait in enumerate(waiting, start=1):
        wait()
        assert device.waits == count
    early = x.sum().to("cpu", non_blocking=True)
    event = torch.Event(DEVICE)
    event.record()
    assert early != 3
    event.synchronize()
    assert early == 3
    assert device.waits == len(waiting)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=() if QUICK.get(name) == norm else pytest.mark.slow)
        for name in contract.ATTACKS
        for norm in ("Linf", "L2")
    ],
)
def test_attacks_end_where_they_end_on_the_cpu(name: str, norm: str, batch: tuple[Tensor, Tensor], device: Waits) -> None:
    images, labels = batch[0][:16], batch[1][:16]
    here = matrix.fewer(contract.ATTACKS[name](make_ensemble(), norm))(images, labels)
    attack = matrix.fewer(contract.ATTACKS[name](make_ensemble().to(DEVICE), norm))
    there = attack(images.to(DEVICE), labels.to(DEVICE))
    assert there.device == DEVICE
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", contract.ATTACKS)
@pytest.mark.slow
def test_the_contract_is_kept(
    name: str, norm: str, batch: tuple[Tensor, Tensor], device: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "make_ensemble", lambda **options: make_ensemble(**options).to(DEVICE))

    def there() -> tuple[Tensor, Tensor]:
        return batch[0].to(DEVICE), batch[1].to(DEVICE)  # anew, as a test may write into them

    contract.test_images_are_in_ball_and_box(name, norm, torch.float64, there())
    contract.test_the_result_does_not_depend_on_batch_size(name, norm, 7, there())
    contract.test_the_seed_decides(name, norm, there())
    contract.test_nothing_is_touched(name, norm, 10**6, True, there())
    contract.test_an_empty_batch_and_a_batch_already_wrong(name, norm, there())
    contract.test_a_model_of_nan_fools_nobody(name, norm, there())


def moved(case: Case, what: str) -> Case:
    """Return a case with its model, its images or both on the device."""
    if what != "images":
        for model in (case.model, case.twin, case.rival):
            if isinstance(model, nn.Module):
                model.to(DEVICE)
    if what != "model":
        case.x, case.y = case.x.to(DEVICE), case.y.to(DEVICE)
    return case


def at(entrance: str, behaviour: str, what: str | None, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return what an entrance gives; `matrix` checks it by plain passes of the model."""
    plain_pass = matrix.right_of

    def right_of(model: nn.Module, case: Case, images: Tensor) -> Tensor:
        own = next(model.parameters()).device
        there = Case(case.model, case.twin, case.x.to(own), case.y.to(own), random=case.random)
        return plain_pass(model, there, images.to(own)).cpu()

    monkeypatch.setattr(matrix, "right_of", right_of)
    case = BEHAVIOURS[behaviour]()
    case = case if what is None else moved(case, what)
    with matrix.few_steps():
        return matrix.ENTRANCES[entrance](case, case.model)


FEW = ("judge", "AutoAttack rand", "torchattacks:PGD?steps=3", "pgd, targeted")
CASES = ("vote: mean logits", "random: dropout", "vote: CrossMax", "a lambda", "counts its images in a buffer")


@pytest.mark.parametrize(
    ("entrance", "behaviour"),
    [
        pytest.param(entrance, behaviour, marks=() if (entrance in FEW and behaviour == CASES[0]) else pytest.mark.slow)
        for entrance in matrix.ENTRANCES
        for behaviour in CASES
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_entrances_give_what_they_give_on_the_cpu(
    entrance: str, behaviour: str, device: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random models the entrance checks itself that its figures are those of plain passes."""
    found: list[float | str] = []
    for what in (None, "both"):
        try:
            found.append(at(entrance, behaviour, what, monkeypatch))
        except (TypeError, ValueError) as error:
            found.append(str(error))
    if not BEHAVIOURS[behaviour]().random:
        assert found[0] == found[1]
    else:
        assert type(found[0]) is type(found[1])


@pytest.mark.parametrize(
    ("entrance", "what"),
    [
        ("judge", "model"),
        ("judge", "images"),
        ("evaluate", "model"),
        pytest.param("evaluate", "images", marks=pytest.mark.slow),
        pytest.param("diagnose", "model", marks=pytest.mark.slow),
        pytest.param("AutoAttack ensemble", "model", marks=pytest.mark.slow),
    ],
)
def test_the_model_is_here_and_the_images_are_there(
    entrance: str, what: str, device: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert at(entrance, CASES[0], what, monkeypatch) == at(entrance, CASES[0], None, monkeypatch)


def test_images_on_another_device_than_the_attack(device: Waits, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:8], batch[1][:8]
    attack = APGD(make_ensemble().to(DEVICE), eps=0.1, steps=3)
    assert attack(images, labels).device == DEVICE
    assert torch.equal(attack(images, labels), attack(images.to(DEVICE), labels))


def test_a_default_device(device: Waits, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:8], batch[1][:8]
    attack, there = (MORA(model, eps=0.1, steps=4) for model in (make_ensemble(), make_ensemble().to(DEVICE)))
    before = attack(images, labels)
    try:
        torch.set_default_device(DEVICE)
        assert torch.equal(attack(images, labels), before)
        torch.testing.assert_close(there(images.to(DEVICE), labels.to(DEVICE)).cpu(), before, rtol=0, atol=ROUNDING)
        found = judge(make_ensemble().to(DEVICE), images, labels, before, eps=0.1)
    finally:
        torch.set_default_device(None)
    assert found.summary() == judge(make_ensemble(), images, labels, before, eps=0.1).summary()


def test_mixed_precision(device: Waits) -> None:
    model = load_model("gal_convnet_3", dataset="digits").to(DEVICE)
    x = torch.rand(4, 1, 8, 8).to(DEVICE)
    mixed = prepare(model, x, amp=True)
    assert mixed is not model
    scores = mixed(x)
    assert scores.device == DEVICE
    assert 0 < (scores - model(x)).abs().max() < 0.2
    attack = MORA(mixed, eps=0.1, steps=2, betas=(0.5,))
    assert attack(x, model(x).argmax(1)).dtype == torch.float32


def test_pinned_and_unpinned_loaders(device: Waits, batch: tuple[Tensor, Tensor]) -> None:
    """What a loader yields comes to the device as it goes on."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batch[0][:8], batch[1][:8]), batch_size=4)
    attack = APGD(make_ensemble().to(DEVICE), eps=0.1, steps=2)
    parts = [attack(x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)) for x, y in loader]
    assert torch.equal(torch.cat(parts), attack(batch[0][:8], batch[1][:8]))


def test_the_command_line_takes_a_device(device: Waits, tmp_path: Path) -> None:
    command = [
        "evaluate",
        "--model",
        "gal_convnet_3",
        "--dataset",
        "digits",
        "--n",
        "4",
        "--eps",
        "0.1",
        "--attacks",
        "torchattacks:PGD?steps=3",
    ]
    shares = []
    for name in ("cpu", str(DEVICE)):
        out = tmp_path / name.replace(":", "")
        result = CliRunner().invoke(main, [*command, "--device", name, "--out", str(out)])
        assert not result.exit_code, result.output
        (summary,) = out.rglob("summary.json")
        shares.append(
            [cell["attacks"]["torchattacks:PGD?steps=3"]["robust"] for cell in json.loads(summary.read_text())["cells"]]
        )
    assert shares[0] == shares[1]


@pytest.mark.slow
def test_a_diagnosis(device: Waits, batch: tuple[Tensor, Tensor]) -> None:
    x, y = (t[:8].to(DEVICE) for t in (batch[0].float(), batch[1]))
    model = make_ensemble(dtype=torch.float32)
    here = diagnose(model, x.cpu(), y.cpu(), eps=0.1)
    there = diagnose(model.to(DEVICE), x, y, eps=0.1)
    assert [check.name for check in there.checks] == [check.name for check in here.checks]
