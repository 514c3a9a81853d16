"""Several devices: members that lie on different ones, runs that are shared among them; results are those of one CPU."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import APGD, MORA, Ensemble, as_ensemble, evaluate, judge
from ensemble_attacks.evaluation import chains, engines
from ensemble_attacks.evaluation.chains import run_chain
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.units import chain_of
from ensemble_attacks.models.ask import device_of, moved
from ensemble_attacks.models.spread import Spread, spread
from ensemble_attacks.models.tuning import twin_for
from tests.evaluation.test_ledger import ledger_in, read, summary
from tests.helpers import make_ensemble, make_member
from tests.simulated_device import AVAILABLE, DEVICE, SECOND, Waits, judged

needs_devices = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no hooks for devices written in Python")
PLACES = {"two": (DEVICE, SECOND, SECOND), "with the CPU": (DEVICE, torch.device("cpu"), SECOND)}


@pytest.fixture
def devices() -> Iterator[Waits]:
    with judged() as waits:
        yield waits


def lying(model: Any, places: tuple[torch.device, ...]) -> Any:
    for member, place in zip(model.members, places, strict=True):
        member.to(place)
    return model


@needs_devices
def test_tensors_of_two_devices_do_not_mix(devices: Waits) -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x.to(SECOND)
    assert (y.device, devices.waits) == (SECOND, 0)
    with pytest.raises(RuntimeError, match="same device"):
        x + y
    (slope,) = torch.autograd.grad((2 * y).sum().to(DEVICE), x)
    assert slope.device == DEVICE
    assert slope.cpu().tolist() == [2, 2, 2]


@needs_devices
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("random", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_members_on_several_devices(places: str, random: bool, devices: Waits, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:12], batch[1][:12]

    def model() -> Any:
        plain = make_ensemble()
        return RandomizedEnsemble(list(plain.members), seed=0).eval() if random else plain

    def attacked(net: nn.Module) -> Tensor:
        attack = MORA(net, eps=0.1, steps=4, betas=(0.5, 0.0))
        attack.eot_iter = 2 if random else None
        return attack(images, labels).cpu()

    here, there = model(), lying(model(), PLACES[places])
    adversarial = attacked(here)
    torch.testing.assert_close(attacked(there), adversarial, rtol=0, atol=1e-9)
    verdict = judge(there, images, labels, adversarial, eps=0.1, draws=2 if random else 1)
    assert verdict.summary() == judge(here, images, labels, adversarial, eps=0.1, draws=2 if random else 1).summary()


@needs_devices
def test_a_second_device_makes_no_step_wait(devices: Waits, batch: tuple[Tensor, Tensor]) -> None:
    counts = []
    for steps in (4, 12):
        attack = MORA(lying(make_ensemble(), PLACES["two"]), eps=0.03, steps=steps, betas=(0.5,), aimed=False)
        images, labels = (t[:12].to(DEVICE) for t in batch)
        before = devices.waits
        attack(images, labels)
        counts.append(devices.waits - before)
    assert counts[0] == counts[1]


@needs_devices
def test_a_run_leaves_members_where_they_lie(
    devices: Waits, batch: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batch[0][:4].float(), batch[1][:4]
    found, twins = [], []

    def watched(*given: Any, **options: Any) -> nn.Module:
        twins.append(twin_for(*given, **options))
        return twins[-1]

    monkeypatch.setattr(chains, "twin_for", watched)
    for index, places in enumerate([(torch.device("cpu"),) * 2, PLACES["two"][:2]]):
        model = lying(make_ensemble(members=2, dtype=torch.float32), places)
        run_of = evaluate(model, data, eps=0.1, attacks="ea-apgd-ce?steps=2", out=tmp_path / str(index))
        assert [device_of(member, torch.device("meta")) for member in model.members] == list(places)
        found.append(run_of.summary["cells"][0])
    shares = [{name: row["robust"] for name, row in cell["attacks"].items()} for cell in found]
    assert shares[0] == shares[1]
    assert twins[1] is not model
    members: Any = twins[1].members
    assert [device_of(member, torch.device("meta")) for member in members] == [DEVICE, SECOND]


def test_a_model_on_one_device_is_moved() -> None:
    model = moved(nn.Linear(2, 2), "meta")
    assert device_of(model, torch.device("cpu")).type == "meta"
    both = Ensemble([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    assert moved(both, "cpu") is both
    assert device_of(both.members[1], torch.device("cpu")).type == "meta"


NETS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        if x.device.index == 0 and len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return self.net(x)

def make():
    return Small().eval()
"""


@needs_devices
def test_memory_that_runs_out_on_one_device_halves_the_batches_there(devices: Waits, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    whole = {"models": (f"{tmp_path}/nets.py:make",), "dataset": "digits", "attacks": ("ea-apgd-ce?steps=3",)}
    ledger = ledger_in(tmp_path / "run", n=12, shard_size=6, batch_size=6, **whole)
    sizes = []
    for index, place in enumerate((DEVICE, SECOND)):
        assert run_chain(str(ledger.folder), index, str(place)) == []
        sizes.append({read(ledger, unit).info["batch_size"] for unit in chain_of(ledger.manifest, index)})
    assert sizes == [{1}, {6}]  # 6, 3, 1
    run(again := ledger_in(tmp_path / "again", n=12, shard_size=6, batch_size=6, **whole))
    assert flags(again) == flags(ledger)


def flags(ledger: Ledger) -> list[bool]:
    units = [unit for index in range(2) for unit in chain_of(ledger.manifest, index)]
    return torch.cat([read(ledger, unit).tensors["robust"].bool() for unit in units]).tolist()


@pytest.mark.slow
def test_workers_keep_a_device_each(tmp_path: Path) -> None:
    """The CPU by another name stands for a second device."""
    run(ledger_in(tmp_path / "one"))
    run(ledger_in(tmp_path / "two"), devices=["cpu", "cpu:0"])
    assert summary(tmp_path / "one") == summary(tmp_path / "two")


def test_each_device_has_a_worker_where_there_is_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chain needs no processes, and shares its batches."""
    asked: list[str] = []
    monkeypatch.setattr(engines, "run_chain", lambda folder, index, device: asked.append(device))
    engines.local(ledger_in(tmp_path / "run"), [0], lambda chain: None, devices=["cuda:0", "cuda:1"])
    assert asked == ["cuda:0,cuda:1"]


@needs_devices
@pytest.mark.parametrize("ensemble", [True, False])
def test_a_batch_is_shared_among_devices(ensemble: bool, devices: Waits, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:11], batch[1][:11]
    model: Any = make_ensemble() if ensemble else make_member().double()
    there = copy.deepcopy(model).to(DEVICE)
    shared = spread(there, [str(DEVICE), str(SECOND)], images[:4].to(DEVICE))
    assert isinstance(shared, Spread)
    assert [device_of(one, torch.device("meta")) for one in shared.copies] == [DEVICE, SECOND]
    attack = partial(MORA, eps=0.1, steps=4, betas=(0.5, 0.0)) if ensemble else partial(APGD, eps=0.1, steps=4)
    torch.testing.assert_close(attack(shared)(images, labels).cpu(), attack(model)(images, labels), rtol=0, atol=1e-9)
    before = devices.waits
    x = images.to(DEVICE)
    with torch.no_grad():
        assert shared(x).device == DEVICE
        assert shared(x[:1]).device == DEVICE  # fewer images than devices
    assert devices.waits == before + 1  # of bringing the images


@needs_devices
def test_what_cannot_be_shared_stays(devices: Waits, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.rand(4, 3, 6, 6, dtype=torch.double).to(DEVICE)
    places = [str(DEVICE), str(SECOND)]
    random = RandomizedEnsemble(list(make_ensemble().members), seed=0).eval().to(DEVICE)
    elsewhere = lying(make_ensemble(), PLACES["two"])
    claimed = as_ensemble(make_ensemble().to(DEVICE), ["members.0", "members.1", "members.2"], "softmax")
    fronted = nn.Sequential(OrderedDict(frontend=nn.Identity(), backbone=make_member().double())).eval().to(DEVICE)
    obstacles = (random, "it is random"), (elsewhere, "on several devices"), (claimed, "claimed"), (fronted, "front end")
    for model, why in obstacles:
        assert spread(model, places, images) is model
        assert why in caplog.text
    assert spread(random, places[:1], images) is random


@needs_devices
def test_a_run_of_a_programs_own_model_on_two_devices(
    devices: Waits, batch: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batch[0][:4].float(), batch[1][:4]
    shared: list[nn.Module] = []

    def watched(*given: Any) -> nn.Module:
        shared.append(spread(*given))
        return shared[-1]

    monkeypatch.setattr(chains, "spread", watched)
    found: list[dict[str, Any]] = []
    for place in ("cpu", f"{DEVICE},{SECOND}"):
        given: dict[str, Any] = {"eps": 0.1, "attacks": "ea-apgd-ce?steps=2", "device": place}
        model = make_ensemble(members=2, dtype=torch.float32)
        found.append(evaluate(model, data, out=tmp_path / str(len(found)), **given).summary)
    assert [isinstance(net, Spread) for net in shared] == [False, True]
    shares = [{name: row["robust"] for name, row in cell["attacks"].items()} for (cell,) in (one["cells"] for one in found)]
    assert shares[0] == shares[1]
