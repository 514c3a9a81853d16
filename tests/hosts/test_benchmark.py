"""RobustBench's benchmark around our pipeline: one figure, nothing left changed, bad arguments told before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensemble_attacks.hosts.robustbench as host
from ensemble_attacks import judge

pytestmark = pytest.mark.filterwarnings("ignore")  # of what robustbench imports
EPS = 1 / 255


class Net(nn.Sequential):
    """Batch norm, whose statistics move in training mode, and dropout."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            super().__init__(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10))
        self.get_buffer("0.running_mean").fill_(0.5)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Instead of CIFAR-10: random images, most with the label that the network gives them."""
    host.ensure()
    import robustbench.data
    from robustbench.model_zoo.enums import BenchmarkDataset

    x = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = Net().eval()(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    monkeypatch.setitem(robustbench.data._clean_dataset_loaders, BenchmarkDataset.cifar_10, lambda n, d, p: (x[:n], y[:n]))
    return x, y


def run(model: Any, **settings: Any) -> tuple[float, float]:
    given: dict[str, Any] = dict(eps=EPS, n_examples=12, batch_size=5, seed=0, attacks_to_run=["ea-apgd-ce"]) | settings
    return host.benchmark(model, **given)


@pytest.mark.parametrize("training", [False, True])
def test_mode_buffers_and_random_state_are_kept(training: bool, data: tuple[Tensor, Tensor]) -> None:
    net = Net().train(training)
    net[2].train(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes, state = [part.training for part in net.modules()], torch.get_rng_state()
    clean, robust = run(net)
    assert clean == pytest.approx(11 / 12)
    assert robust < clean
    assert (clean, robust) == run(Net().eval())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert modes == [part.training for part in net.modules()]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_and_a_model_that_returns_more(data: tuple[Tensor, Tensor]) -> None:
    class Pair(Net):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x.sub_(0)), "features": x}

    net = Net().eval()
    assert run(net.forward) == run(Pair().eval()) == run(net)


class Dropping(Net):
    """Random in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.3)


@pytest.mark.parametrize("state", [False, True])
def test_a_random_model_is_judged_by_its_draws_and_all_figures_are_one(
    state: bool, data: tuple[Tensor, Tensor], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Dropping().eval()
    settings: dict[str, Any] = dict(to_disk=True, model_name="Dropping", attacks_to_run=["eot-apgd"], eps=EPS / 4)
    clean, robust = run(model, **settings, aa_state_path=tmp_path / "state" if state else None)
    x, y = data
    assert clean == judge(model, x, y, x, eps=1.0, draws=20, batch_size=5).accuracy
    assert 0 < robust < clean < 1
    about = json.loads((tmp_path / "model_info/cifar10/Linf/Dropping.json").read_text())
    assert about["clean_acc"] == str(round(100 * clean, 2))
    assert about["external"] == str(round(100 * robust, 2))
    assert about["autoattack_acc"] is None
    assert f"Adversarial accuracy: {robust:.2%}" in capsys.readouterr().out


def test_only_the_whole_standard_autoattack_is_booked_as_such(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model_info/cifar10/Linf/Net.json"
    kept: dict[str, Any] = dict(to_disk=True, model_name="Net")
    _, robust = run(Net().eval(), **kept)
    about = json.loads(path.read_text())
    assert about["autoattack_acc"] is None
    assert about["external"] == str(round(100 * robust, 2))
    path.write_text(json.dumps(about | {"autoattack_acc": "50.0", "venue": "a journal"}))
    run(Net().eval(), **kept)
    assert json.loads(path.read_text()) == about | {"autoattack_acc": "50.0", "venue": "a journal"}
    path.unlink()
    _, robust = run(Net().eval(), **kept, version="standard", attacks_to_run=(), n_examples=2, eps=8 / 255)
    about = json.loads(path.read_text())
    assert about["autoattack_acc"] == str(round(100 * robust, 2))
    assert "external" not in about


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"n_examples": 0}, ValueError, "n_examples must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"dataset": "cifar11"}, ValueError, "did you mean 'cifar10'"),
        ({"threat_model": "linf"}, ValueError, "did you mean 'Linf'"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number above 0"),
        ({"eps": None}, ValueError, "eps is None"),
        ({"to_disk": True}, ValueError, "to_disk=True needs a model_name"),
        ({"device": "gpu"}, ValueError, "cannot be used here"),
        ({"device": ["cpu"]}, TypeError, "one device"),
        ({"aa_state_path": "/nowhere/at/all"}, FileNotFoundError, "aa_state_path .* make it first"),
        ({"log_path": "/nowhere/at/all"}, FileNotFoundError, "log_path .* make it first"),
        ({"version": "standart", "attacks_to_run": ()}, ValueError, "did you mean 'standard'"),
        ({"attacks_to_run": ()}, TypeError, "member"),  # the version "ensemble"
        ({"attacks_to_run": ["bpda"]}, ValueError, "frontend"),
        ({"model": 3}, TypeError, "must be a torch.nn.Module or a function"),
    ],
)
def test_bad_arguments_are_told_before_any_work(bad: dict[str, Any], error: Any, message: str) -> None:
    net = Net().eval()
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=message):
        run(**{"model": net, **bad})
    assert not calls
