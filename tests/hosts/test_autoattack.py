"""AutoAttack's pipeline with our attacks in it: the original's numbers, without the original's defects."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from itertools import product
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from defenses import load_model
from defenses.frontend import DnCNN, FrontEnded
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import EOTAPGD, MORA, AutoAttack, NotAnEnsembleError, judge
from ensemble_attacks.attacks import registry
from ensemble_attacks.diagnostics.advice import adaptive_attacks
from ensemble_attacks.models.structure import structure_of
from tests.attacks.test_random_models import Flipping
from tests.helpers import make_ensemble, make_member, slow_but

EPS = 0.12


def quick(adversary: Any) -> Any:
    adversary.square.n_queries = 50
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 10
    return adversary


def original(model: nn.Module, x: Tensor, y: Tensor, version: str = "standard", **arguments: Any) -> tuple[Tensor, Tensor]:
    adversary = quick(pyautoattack.AutoAttack(model, eps=EPS, seed=0, version=version, **arguments))
    tracer = sys.gettrace()
    try:
        return adversary.run_standard_evaluation(x, y, batch_size=8)
    finally:
        sys.settrace(tracer)


def ours(model: nn.Module, version: str | None = None, **arguments: Any) -> AutoAttack:
    return quick(AutoAttack(model, eps=EPS, seed=0, verbose=False, version=version, **arguments))


class Linear(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


FAST = [("ensemble", "standard"), ("linear", "standard"), ("linear", "plus"), ("linear", "rand")]


@pytest.mark.parametrize(("kind", "version"), slow_but(FAST, product(("ensemble", "linear"), ("standard", "plus", "rand"))))
def test_the_numbers_of_the_original(kind: str, version: str, digits: tuple[Tensor, Tensor]) -> None:
    """Bit for bit, for the same seed and batch size."""
    model = load_model("gal_convnet_3", dataset="digits") if kind == "ensemble" else Linear().eval()
    x = digits[0][:12]
    y = digits[1][:12] if kind == "ensemble" else model(x).argmax(1)
    expected, labels = original(model, x, y, version)
    adversary = ours(model, version)
    found, predicted = adversary.run_standard_evaluation(x, y, bs=8, return_labels=True)
    assert torch.equal(found, expected)
    assert torch.equal(predicted, labels)
    assert torch.equal(adversary.robust, labels == y)
    assert list(adversary.stages) == adversary.attacks_to_run
    assert adversary.robust_accuracy == (labels == y).double().mean()


class NaNCorner(nn.Module):
    """NaN wherever an image is moved at all; no image is ever predicted wrong."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.model, self.clean = Linear(), x

    def forward(self, x: Tensor) -> Tensor:
        moved = (x[:, None] - self.clean).flatten(2).abs().amax(2).amin(1) > 1e-6
        return torch.where(moved[:, None], torch.nan, self.model(x))


def test_nan_is_a_success_there_and_none_here(digits: tuple[Tensor, Tensor]) -> None:
    x = digits[0][:8]
    model = NaNCorner(x).eval()
    y = model(x).argmax(1)
    with_labels: dict[str, Any] = dict(version="custom", attacks=["square"])
    assert (original(model, x, y, **with_labels)[1] == y).double().mean() < 0.5
    adversary = ours(model, attacks_to_run=["square"])
    adversary.run_standard_evaluation(x, y)
    assert adversary.robust_accuracy == 1


def test_nan_on_clean_images_is_flagged(digits: tuple[Tensor, Tensor]) -> None:
    class Half(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0, 0, 3:4] > 0.5, torch.nan, super().forward(x))

    model = Half().eval()
    x = digits[0][:20]
    adversary = ours(model, attacks_to_run=["torchattacks:FGSM"])
    adversary.run_standard_evaluation(x, model(x).argmax(1))
    flags = {flag.name: flag.value for flag in adversary.flags}
    assert flags["non_finite"] == (x[:, 0, 0, 3] > 0.5).sum() > 0


class Leaping(torchattacks.attack.Attack):
    """Inverts the image, and adds 2: far out of any ball."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("Leaping", model)
        self.seed = None

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return 2 - images

    perturb = forward


def test_an_image_outside_the_ball_is_believed_there_and_rejected_here(digits: tuple[Tensor, Tensor]) -> None:
    model = load_model("gal_convnet_3", dataset="digits")
    x, y = digits[0][:8], digits[1][:8]
    adversary = pyautoattack.AutoAttack(model, eps=EPS, version="custom", attacks=["square"])
    adversary.square = Leaping(model)
    tracer = sys.gettrace()
    moved, predicted = adversary.run_standard_evaluation(x, y)
    sys.settrace(tracer)
    assert (predicted != y).any()
    assert (moved - x).abs().max() > 1
    checked = ours(model, attacks_to_run=[Leaping(model), "apgd-ce"])
    images = checked.run_standard_evaluation(x, y)
    right = model(x).argmax(1) == y
    assert torch.equal(checked.stages["Leaping"], right)
    assert isinstance(images, Tensor)
    assert (images - x).abs().max() <= EPS + 1e-6
    assert [(flag.name, flag.value) for flag in checked.flags] == [("outside_ball", right.sum())]


@pytest.mark.parametrize("several", slow_but([False], [False, True]))
def test_resuming_returns_all_images(digits: tuple[Tensor, Tensor], tmp_path: Path, several: bool) -> None:
    """The original restores its flags, and forgets the images behind them."""
    ensemble: Any = load_model("gal_convnet_3", dataset="digits")
    model = ensemble if several else ensemble.members[0]
    x, y = digits[0][:12], digits[1][:12]
    whole, labels = ours(model, "standard").run_standard_evaluation(x, y, bs=8, return_labels=True)
    where = tmp_path / "state"
    stopped = ours(model, "standard")
    stopped.on_attack = lambda name: 1 / 0 if name == "apgd-t" else None
    with pytest.raises(ZeroDivisionError):
        stopped.run_standard_evaluation(x, y, bs=8, state_path=where)
    again = ours(model, "standard")
    ran: list[str] = []
    again.on_attack = ran.append
    images, predicted = again.run_standard_evaluation(x, y, bs=8, return_labels=True, state_path=where)
    assert ran == ["fab-t", "square"]
    assert torch.equal(images, whole)
    assert torch.equal(predicted, labels)
    with pytest.raises(ValueError, match=r"is of a run with seed = 0, not 1: choose another, or delete it"):
        quick(AutoAttack(model, eps=EPS, seed=1, verbose=False)).run_standard_evaluation(x, y, bs=8, state_path=where)
    where.write_bytes(b"no state")
    with pytest.raises(ValueError, match="holds no state of this AutoAttack"):
        again.run_standard_evaluation(x, y, bs=8, state_path=where)


def test_a_stop_within_an_attack_is_resumed_at_the_next_batch(
    digits: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("gal_convnet_3", dataset="digits")
    x, y = digits[0][:20], digits[1][:20]
    whole = ours(model, attacks_to_run=["mora?steps=10"]).run_standard_evaluation(x, y, bs=8)
    crafted: list[int] = []

    def craft(name: Any, *batch: Tensor) -> tuple[Tensor, Tensor | None]:
        if stopped and len(crafted) == 2:
            raise KeyboardInterrupt
        crafted.append(len(batch[0]))
        return AutoAttack._craft(adversary, name, *batch)

    for stopped in (True, False):
        adversary = ours(model, attacks_to_run=["mora?steps=10"])
        monkeypatch.setattr(adversary, "_craft", craft)
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                adversary.run_standard_evaluation(x, y, bs=8, state_path=tmp_path / "state")
    resumed = adversary.run_standard_evaluation(x, y, bs=8, state_path=tmp_path / "state")
    assert isinstance(whole, Tensor)
    assert isinstance(resumed, Tensor)
    assert torch.equal(resumed, whole)
    assert len(crafted) == 3


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_fewer_than_ten_classes(classes: int, digits: tuple[Tensor, Tensor]) -> None:
    model = Linear(classes).eval()
    x = digits[0][:8]
    y = model(x).argmax(1)
    if classes == 4:
        with pytest.raises(IndexError):
            original(model, x, y)
    adversary = ours(model, "standard")
    adversary.run_standard_evaluation(x, y)
    assert [flag.name for flag in adversary.flags] == (["few_classes"] if classes < 4 else [])
    assert adversary.robust_accuracy < 1


@pytest.mark.slow
def test_of_a_random_model_the_images_that_are_right_in_the_fewest_draws_are_kept(digits: tuple[Tensor, Tensor]) -> None:
    """Also where most draws are still right: what an attack of the suite leaves, the suite leaves no more of."""
    model = RandomizedEnsemble(load_model("dverge_convnet_3", dataset="digits").members, seed=0).eval()
    x, y = digits[0][:30], digits[1][:30]
    adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=["eot-apgd"])
    images = adversary.run_standard_evaluation(x, y, bs=30)
    assert isinstance(images, Tensor)
    alone = EOTAPGD(model, eps=EPS, seed=0, eot_iter=adversary.eot_iter)(x, y)
    ours_, theirs = (judge(model, x, y, found, eps=EPS, draws=50).accuracy for found in (images, alone))
    assert ours_ <= theirs + 0.03
    shares = judge(model, x, y, images, eps=EPS, draws=50).correct.double().mean(0)
    assert ((shares > 0.5) & (shares < 0.95)).any()


def test_a_random_model_is_judged_on_fresh_draws() -> None:
    """AutoAttack's own flags say that less than 90% are robust (`test_random_models`)."""
    x, y = torch.rand(200, 3, 4, 4), torch.zeros(200, dtype=torch.long)
    adversary = ours(Flipping().eval(), "rand")
    adversary.run_standard_evaluation(x, y)
    assert 0.93 < adversary.robust_accuracy < 0.97
    assert adversary.robust.all()


def test_any_mix_of_attacks(digits: tuple[Tensor, Tensor]) -> None:
    model = load_model("gal_convnet_3", dataset="digits")
    x, y = digits[0][:10], digits[1][:10]
    mixed = ["torchattacks:PGD?steps=3&alpha=0.05", torchattacks.FGSM(model, eps=EPS), torchattacks.FGSM(model, eps=0.01)]
    adversary = ours(model, attacks_to_run=[*mixed, MORA(model, eps=EPS, steps=5), "apgd-ce"])
    images = adversary.run_standard_evaluation(x, y)
    assert list(adversary.stages) == ["torchattacks:PGD?steps=3&alpha=0.05", "FGSM", "FGSM#2", "MORA", "apgd-ce"]
    assert isinstance(images, Tensor)
    assert judge(model, x, y, images, eps=EPS).accuracy == adversary.robust_accuracy
    each = ours(model, attacks_to_run=["apgd-ce", "mora?steps=10"]).run_standard_evaluation_individual(
        x, y, return_labels=True
    )
    assert list(each) == ["apgd-ce", "mora?steps=10"]
    for images, predicted in each.values():
        assert torch.equal(model(images).argmax(1), predicted)


def test_nothing_is_attacked_once_nothing_is_robust(digits: tuple[Tensor, Tensor]) -> None:
    model = Linear().eval()
    adversary = ours(model, attacks_to_run=["torchattacks:FGSM", "apgd-ce", "pgd"])
    adversary.run_standard_evaluation(digits[0][:4], (model(digits[0][:4]).argmax(1) + 1) % 10)
    assert adversary.robust_accuracy == 0
    assert list(adversary.stages) == adversary.attacks_to_run


def test_what_the_original_takes_and_prints(digits: tuple[Tensor, Tensor], tmp_path: Path, capsys: Any) -> None:
    model, log = Linear(), tmp_path / "log.txt"
    x = digits[0][:8]
    y = model(x).argmax(1)
    adversary = AutoAttack(model, "Linf", EPS, 0, True, ["apgd-ce"], "custom", log_path=log)
    state = torch.get_rng_state()
    tracer = lambda *args: None  # noqa: E731
    sys.settrace(tracer)
    try:
        adversary.run_standard_evaluation(x, y)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(None)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [flag.name for flag in adversary.flags] == ["training_mode"]
    assert adversary.clean_accuracy(x, y) == 1
    printed = capsys.readouterr().out
    assert "robust accuracy after APGD-CE" in printed
    assert printed == log.read_text()
    adversary.draws = 3
    adversary.set_version("rand")
    assert adversary.attacks_to_run == ["apgd-ce", "apgd-dlr"]
    assert adversary.draws == 3


def test_bad_arguments(digits: tuple[Tensor, Tensor]) -> None:
    model = Linear().eval()
    for arguments, message in (
        (dict(version="standart"), "did you mean 'standard'"),
        (dict(attacks_to_run=["moar"]), "unknown attack 'moar': did you mean 'mora'"),
        (dict(attacks_to_run=["mora"], version="standard"), "attacks_to_run goes with version='custom', not 'standard'"),
        (dict(is_tf_model=True), "TensorFlow models are not supported"),
        (dict(attacks_to_run=["torchattacks:PDG"]), "unknown attack of torchattacks 'PDG': did you mean 'PGD'"),
        (
            dict(attacks_to_run=["torchattacks:PGD?step=3"]),
            "unknown option of torchattacks' PGD 'step': did you mean 'steps'",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            AutoAttack(model, **arguments)
    with pytest.raises(ValueError, match="version='custom' needs attacks_to_run"):
        ours(model, "custom").run_standard_evaluation(digits[0][:4], digits[1][:4])
    with pytest.raises(TypeError, match=r"dtype torch\.float64, the model torch\.float32"):
        ours(model, "standard").run_standard_evaluation(digits[0][:4].double(), digits[1][:4])
    with pytest.raises(NotAnEnsembleError):
        ours(model, "ensemble").run_standard_evaluation(digits[0][:4], digits[1][:4])
    with pytest.raises(ValueError, match="expected values in"):
        ours(model, "standard").run_standard_evaluation(digits[0][:4] * 255, digits[1][:4])
    labels = model(digits[0][:4]).argmax(1)
    with pytest.raises(ValueError, match="has no parameter norm"):
        AutoAttack(model, "L2", EPS, attacks_to_run=["torchattacks:PGD"]).run_standard_evaluation(digits[0][:4], labels)


def test_what_a_structure_asks_for(digits: tuple[Tensor, Tensor]) -> None:
    x = torch.rand(4, 3, 6, 6)
    member = lambda: FrontEnded(make_member(4), DnCNN(depth=3, width=4)).eval()  # noqa: E731
    plain = structure_of(make_member(4), x)
    assert adaptive_attacks(plain) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert adaptive_attacks(structure_of(member(), x))[0] == "bpda"
    assert adaptive_attacks(structure_of(Flipping().eval(), x)) == ["eot-apgd"]
    masked = load_model("multiresolution_convnet_1", dataset="digits")
    assert adaptive_attacks(structure_of(masked, digits[0][:4])) == ["mora", "crossmax-transfer", "eot-apgd"]
    adversary = AutoAttack(make_ensemble(dtype=torch.float32), eps=EPS, version="adaptive", verbose=False, seed=0)
    quick(adversary).run_standard_evaluation(x, torch.tensor([0, 1, 2, 3]))
    assert next(iter(adversary.stages)) == "mora"


def test_attacks_of_other_packages(monkeypatch: pytest.MonkeyPatch, digits: tuple[Tensor, Tensor]) -> None:
    def entries(name: str) -> Any:
        return lambda group: [EntryPoint(name, "torchattacks:FGSM", group)]

    monkeypatch.setattr(registry, "entry_points", entries("theirs"))
    registry.registered.cache_clear()
    try:
        model = load_model("gal_convnet_3", dataset="digits")
        adversary = ours(model, attacks_to_run=["theirs"])
        adversary.run_standard_evaluation(digits[0][:10], digits[1][:10])
        assert adversary.robust_accuracy < 1
        monkeypatch.setattr(registry, "entry_points", entries("mora"))
        registry.registered.cache_clear()
        with pytest.raises(ValueError, match="attack 'mora' is registered by both ensemble-attacks and torchattacks:FGSM"):
            registry.find_attack("mora")
    finally:
        registry.registered.cache_clear()


def test_fra31s_package_as_the_base(tmp_path: Path) -> None:
    """A stand-in with the signature of fra31's ``autoattack``, which is not on PyPI, in a process of its own."""
    package = tmp_path / "autoattack"
    package.mkdir()
    (package / "__init__.py").write_text(
        textwrap.dedent(
            """
            import pyautoattack

            class AutoAttack(pyautoattack.AutoAttack):
                def __init__(self, model, norm="Linf", eps=.3, seed=None, verbose=True, attacks_to_run=[],
                             version="standard", is_tf_model=False, device="cuda", log_path=None):
                    super().__init__(model, attacks=attacks_to_run or None, device=device, eps=eps, norm=norm,
                                     seed=seed, version=version)
                    self.verbose = verbose
                    if not attacks_to_run and version != "custom":
                        self.set_version(version)

                def set_version(self, version="standard"):
                    self._set_version(version)
            """
        )
    )
    script = """
        import torch, autoattack
        from ensemble_attacks import AutoAttack
        assert AutoAttack.__mro__[1] is autoattack.AutoAttack
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).eval()
        x = torch.rand(8, 3, 2, 2)
        adversary = AutoAttack(model, eps=0.5, seed=0, attacks_to_run=["apgd-ce", "apgd-t", "fab-t", "torchattacks:PGD"])
        assert AutoAttack(model).attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
        adversary.run_standard_evaluation(x, model(x).argmax(1))
        print(adversary.device, adversary.robust_accuracy)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("cpu 0")


class Remembers(nn.Linear):
    """Has more in its state than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.mark.parametrize("name", ["apgd-ce", "square", "ea-apgd-ce"])
def test_any_state_and_any_whole_number(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), Remembers(48, 5)).eval()
    x = torch.rand(6, 3, 4, 4)
    y = model(x).argmax(1).int()
    adversary = AutoAttack(model, eps=0.01, seed=0, verbose=False, attacks_to_run=[name])
    adversary.apgd.n_iter, adversary.square.n_queries = 5, 20
    images = adversary.run_standard_evaluation(x, y)
    assert isinstance(images, Tensor)
    assert images.shape == x.shape
