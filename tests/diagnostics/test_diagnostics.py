"""A zoo of broken defenses, each of which must raise its own flag, and honest models, which must raise none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torchattacks import FGSM
from torchattacks.attack import Attack

from defenses import load_model
from defenses.crossmax import CrossMax
from defenses.frontend import DnCNN, FrontEnded
from ensemble_attacks import MORA, PGD, AutoAttack, Ensemble
from ensemble_attacks.attacks.registry import registered
from ensemble_attacks.cli.group import main
from ensemble_attacks.data import load_dataset
from ensemble_attacks.diagnostics import binarization, diagnose, indicators
from ensemble_attacks.diagnostics.findings import Diagnosis
from tests.helpers import slow_but

EPS = 0.1
ALONE = 4  # images that are looked at one by one


def standard() -> Ensemble:
    return load_model("standard_convnet_3", dataset="digits")


class Broken(nn.Module):
    """A trained network with something before it and something after it."""

    def __init__(
        self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Tensor] = lambda scores: scores
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = standard().members[0], before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


class Shattered(Broken):
    """A fine ripple, too small to change a prediction, whose gradient drowns the network's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.01 * torch.sin(3000 * x))


class RandomCrop(Broken):
    def forward(self, x: Tensor) -> Tensor:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return self.net(x.roll((down, right), (2, 3)))


class Reseeding(Broken):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return self.net(x + 0.02 * torch.randn_like(x))


class Stateful(Broken):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x.roll(self.calls % 2, 3))


class NaNCorner(Broken):
    def forward(self, x: Tensor) -> Tensor:
        lit = x[:, 0, 0, :1] > 0
        return torch.where(lit, torch.nan, self.net(x))


class DetachedMember(Ensemble):
    def member_logits(self, x: Tensor) -> Tensor:
        first, *others = self.members
        return torch.stack([first(x).detach(), *(member(x) for member in others)])


class BatchMean(Broken):
    """Batch norm in training mode, in spirit: centred by the batch."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        return scores - scores.mean(0, keepdim=True)


def front_ended() -> nn.Module:
    frontend = DnCNN(1, depth=3, width=4)
    last = frontend.residual[-1]
    assert isinstance(last, nn.Conv2d)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(last.weight, std=0.02)
    return FrontEnded(standard().members[0], frontend, ((0.5,), (0.5,)))


def in_training_mode() -> nn.Module:
    model = nn.Sequential(standard().members[0], nn.BatchNorm1d(10))
    return model.eval().train()


ZOO: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "probabilities": (lambda: Broken(after=lambda s: s.softmax(1)), "probabilities"),
    "quantised": (lambda: Broken(lambda x: (x * 16).round() / 16), "zero_gradients"),
    "shattered": (Shattered, "shattered"),
    "logits / 1e4": (lambda: Broken(after=lambda s: s / 1e4), "scale"),
    "logits x 1e6": (lambda: Broken(after=lambda s: s * 1e6), "saturation"),
    "random crop": (RandomCrop, "random"),
    "reseeding": (Reseeding, "reseeds"),
    "detached member": (lambda: DetachedMember(list(standard().members)), "detached_member"),
    "votes without a gradient": (
        lambda: Broken(after=lambda s: s.argmax(1, True).eq(torch.arange(10)).float()),
        "zero_gradients",
    ),
    "hard votes": (lambda: load_model("gal_convnet_3", dataset="digits", vote="voting"), "transfer_gap"),
    "training mode": (in_training_mode, "training_mode"),
    "batch statistics": (BatchMean, "batch_dependence"),
    "nan corner": (NaNCorner, "non_finite"),
    "stateful": (Stateful, "stateful"),
    "crossmax": (lambda: CrossMax(list(standard().members)), "aggregation"),
    "front end": (front_ended, "frontend"),
    "everything everywhere": (lambda: load_model("multiresolution_convnet_1", dataset="digits"), "transfer_gap"),
}
HONEST: dict[str, Callable[[], nn.Module]] = {
    "one network": lambda: standard().members[0],
    "softmax": standard,
    "logits": lambda: load_model("standard_convnet_3", dataset="digits", vote="logits"),
    "adversarially trained": lambda: load_model("dverge_at_convnet_3", dataset="digits"),
    "adp": lambda: load_model("adp_convnet_3", dataset="digits", vote="logits"),
    "log-probabilities": lambda: Broken(after=lambda s: s.log_softmax(1)),
}


FAST = ("quantised", "shattered", "random crop", "detached member", "hard votes", "nan corner", "crossmax", "front end")


@pytest.fixture(scope="module")
def images(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][:64], digits[1][:64]


def prepared(make: Callable[[], Any]) -> Any:
    model = make()
    return model if make is in_training_mode else model.eval()


@cache
def diagnosed(name: str) -> Diagnosis:
    """Return the diagnosis of a model of the zoo, which several tests read."""
    x, y = load_dataset("digits", n=64)
    few: dict[str, Any] = {"alone": ALONE} if name in FAST else {}
    return diagnose(prepared(ZOO[name][0]), x, y, eps=EPS, **few)


@pytest.mark.parametrize("name", slow_but(FAST, ZOO))
def test_a_broken_defense_raises_its_own_flag(name: str) -> None:
    found, expected = diagnosed(name), ZOO[name][1]
    assert expected in found.flags, found.flags
    assert all(attack in registered() or attack in ("apgd-ce", "apgd-t", "fab-t", "square") for attack in found.attacks)
    assert found.attacks


@pytest.mark.parametrize("name", slow_but(["softmax", "adversarially trained"], HONEST))
def test_an_honest_model_raises_none(name: str, images: tuple[Tensor, Tensor]) -> None:
    assert diagnose(prepared(HONEST[name]), *images, eps=EPS, alone=ALONE).flags == []


class Careless(Attack):
    """Climbs as PGD does, and gives back the clean images."""

    def __init__(self, model: nn.Module, eps: float) -> None:
        super().__init__("Careless", model)
        self.inner = sound(model, eps)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        self.inner(images, labels)
        return images


def sound(model: nn.Module, eps: float) -> Attack:
    return PGD(model, eps=eps, steps=50, n_restarts=1)


def short(model: nn.Module, eps: float) -> Attack:
    return PGD(model, eps=eps, alpha=eps / 40, steps=10, n_restarts=1)


def confined(model: nn.Module, eps: float) -> Attack:
    return PGD(model, eps=1e-3, steps=50, n_restarts=1)


FAILURES: dict[str, tuple[Callable[[nn.Module, float], Attack], str, str | None]] = {
    "unavailable_gradients": (sound, "quantised", None),
    "unstable_predictions": (sound, "crossmax", None),
    "silent_success": (Careless, "one network", None),
    "incomplete_optimization": (short, "one network", None),
    "transfer_failure": (sound, "one network", "adversarially trained"),
    "unconstrained_attack_failure": (confined, "one network", None),
}


@pytest.fixture(scope="module")
def working(images: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The indicators of an attack that works."""
    return indicators(sound, prepared(HONEST["one network"]), images[0][:8], images[1][:8], eps=EPS).means()


@pytest.mark.parametrize("indicator", FAILURES)
def test_the_six_indicators_of_attack_failure(
    indicator: str, working: dict[str, float], images: tuple[Tensor, Tensor]
) -> None:
    attack, name, target = FAILURES[indicator]
    models = {**HONEST, **{broken: make for broken, (make, _) in ZOO.items()}}
    other = prepared(models[target]) if target else None
    failing = indicators(attack, prepared(models[name]), images[0][:8], images[1][:8], eps=EPS, target=other).means()
    assert failing[indicator] > 0.1 > working[indicator]


def test_an_attack_that_looks_at_the_members_or_leaves_the_ball(images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0][:6], images[1][:6]
    found = indicators(lambda net, eps: MORA(net, eps=eps, steps=20), standard(), x, y, eps=EPS)
    assert found.silent_success.sum() == found.incomplete_optimization.sum() == 0
    far = indicators(lambda net, eps: PGD(net, eps=0.9, steps=50, n_restarts=1), standard(), x, y, eps=1e-3)
    assert far.silent_success.sum() == 0
    blind = indicators(lambda net, eps: Blind("Blind", net), standard(), x, y, eps=EPS)
    assert blind.silent_success.isnan().all()


class Blind(Attack):
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock = standard().members[0], threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_what_cannot_be_tested_is_a_note(images: tuple[Tensor, Tensor]) -> None:
    for found in (diagnose(Locked().eval(), *images, eps=EPS, alone=1), diagnosed("random crop")):
        (check,) = [check for check in found.checks if check.name == "binarization"]
        assert check.verdict == "note"
        assert "no binarization test" in check.meaning
    raising = lambda net, eps: PGD(net, eps=-1)  # noqa: E731
    found = diagnose(standard(), images[0][:16], images[1][:16], eps=EPS, attack=raising, alone=1)
    assert found.flags == ["attack"]


@pytest.mark.slow
def test_honest_on_cifar10_too(cifar10_dir: Path) -> None:
    x, y = load_dataset("cifar10", data_dir=cifar10_dir, n=16)
    found = diagnose(load_model("dverge_at_resnet20_3"), x, y, eps=0.03)
    assert found.flags == []


def test_the_binarization_test_tells_an_attack_that_works_from_one_that_does_not(images: tuple[Tensor, Tensor]) -> None:
    pgd = partial(sound, eps=EPS)
    for make in (standard, lambda: load_model("adp_convnet_3", dataset="digits", vote="logits")):
        found = binarization(pgd, make(), images[0][:10], eps=EPS)
        assert found.score == 1
        assert found.by_chance.double().mean() < 0.5
        assert found.skipped == 0
    model = CrossMax(list(standard().members)).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert binarization(pgd, model, images[0][:10], eps=EPS).score < 0.95
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert binarization(partial(FGSM, eps=1e-4), standard(), images[0][:10], eps=EPS).score < 0.95
    with pytest.raises(ValueError, match="cannot do with binary read-outs"):
        binarization(pgd, in_training_mode(), images[0][:4], eps=EPS)
    with pytest.raises(ValueError, match="no linear layer with 10 outputs"):
        binarization(pgd, nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), images[0][:4], eps=EPS)


def test_what_is_recommended() -> None:
    assert diagnosed("crossmax").attacks[:2] == ["mora", "crossmax-transfer"]
    assert diagnosed("front end").attacks[0] == "bpda"
    assert "eot-apgd" in diagnosed("random crop").attacks


def test_nothing_is_left_changed(images: tuple[Tensor, Tensor]) -> None:
    model = in_training_mode()
    statistics = model.get_buffer("1.running_mean").clone()
    state = torch.get_rng_state()
    diagnose(model, *images, eps=EPS, alone=1)
    assert model.training
    assert torch.equal(model.get_buffer("1.running_mean"), statistics)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="number of images must be at least 4"):
        diagnose(model, images[0][:2], images[1][:2], eps=EPS)


def test_auto_runs_what_the_diagnosis_asks_for(images: tuple[Tensor, Tensor], capsys: Any) -> None:
    model = load_model("gal_convnet_3", dataset="digits", vote="voting")
    x, y = images[0][:20], images[1][:20]
    adversary = AutoAttack(model, eps=0.12, seed=0, version="auto")
    adversary.square.n_queries = 50
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 20
    adversary.run_standard_evaluation(x, y)
    printed = capsys.readouterr().out
    assert "transfer_gap" in printed
    assert "so these are run: mora" in printed
    assert adversary.robust_accuracy <= 0.1
    assert len(adversary.stages) <= len(adversary.diagnosis.attacks)


def test_diagnose_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["diagnose", "--model", "gal_convnet_3", "--vote", "voting", "--eps", "0.12", "--n", "16"]
    arguments += ["--attack", "torchattacks:PGD?steps=10"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"Run: --attacks {','.join(found['attacks'])}" in result.output.replace("\n", "")
    refused = CliRunner().invoke(main, [*arguments[:-1], "apgd-ce"])
    assert refused.exit_code == 2
    assert "is AutoAttack's own: choose from bpda" in " ".join(refused.output.split())
    assert any(check["name"] == "silent_success" for check in found["checks"])
    assert {"name", "verdict", "figure", "threshold", "meaning", "next", "source"} == set(found["checks"][0])
