"""The peer is the real standard AutoAttack, run as its authors run it."""

from __future__ import annotations

import sys
import types
from typing import Any

import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from defenses import load_model
from ensemble_attacks.hosts import original as autoattack
from ensemble_attacks.hosts.original import STANDARD, run_autoattack
from tests.helpers import make_ensemble, slow_but


@pytest.mark.parametrize("whole", slow_but([False], [False, True]))
def test_segments_equal_the_originals_run(
    digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Bit for bit, with fewer queries for Square so that the test is quick."""
    x, y = digits[0][:12], digits[1][:12]
    ensemble: Any = load_model("standard_convnet_3", dataset="digits")
    model = ensemble if whole else ensemble.members[0]

    def quick(made: Any) -> Any:
        made.square.n_queries = 100
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 20
        return made

    original = quick(pyautoattack.AutoAttack(model, norm="Linf", eps=0.12, seed=0, version="standard"))
    tracer = sys.gettrace()
    expected, predicted = original.run_standard_evaluation(x, y, batch_size=5)
    sys.settrace(tracer)
    make = autoattack.make_adversary
    monkeypatch.setattr(autoattack, "make_adversary", lambda *args, **kw: quick(make(*args, **kw)))
    images, flags = run_autoattack(model, x, y, eps=0.12, seed=0, batch_size=5)
    assert list(flags) == list(STANDARD)
    assert torch.equal(images, expected)
    assert torch.equal(flags["square"], predicted == y)
    assert flags["apgd-ce"].sum() >= flags["apgd-t"].sum() >= flags["square"].sum()


def test_fewer_than_ten_classes_and_an_untouched_process(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch[0][:6].float(), batch[1][:6]
    model = make_ensemble(classes=4, dtype=torch.float32)
    tracer = lambda *args: None  # noqa: E731
    sys.settrace(tracer)
    before = torch.get_rng_state()
    try:
        images, _ = run_autoattack(model, x, y, eps=0.05, attacks=("apgd-t",))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert (images - x).abs().max() <= 0.05 + 1e-6


def test_parameter_gradients_are_left_alone(digits: tuple[Tensor, Tensor]) -> None:
    """FAB's own code calls backward()."""
    model = load_model("standard_convnet_3", dataset="digits")
    with pytest.MonkeyPatch.context() as patch:
        make = autoattack.make_adversary

        def quick(*args: Any, **kw: Any) -> Any:
            made = make(*args, **kw)
            made.fab.n_iter = 2
            return made

        patch.setattr(autoattack, "make_adversary", quick)
        run_autoattack(model, digits[0][:4], digits[1][:4], eps=0.1, attacks=("fab-t",))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_too_few_classes_for_apgd_t() -> None:
    model = make_ensemble(classes=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs at least 4 classes, the model has 3"):
        run_autoattack(model, torch.rand(2, 3, 6, 6), torch.tensor([0, 1]), eps=0.1)


def test_fra31s_interface(monkeypatch: pytest.MonkeyPatch, batch: tuple[Tensor, Tensor]) -> None:
    """A stand-in with the signature of fra31's ``autoattack``, which is not on PyPI: other names, labels if asked for."""
    seen: dict[str, Any] = {}

    class AutoAttack:
        attacks_to_run: list[str]

        def __init__(
            self,
            model: nn.Module,
            norm: str = "Linf",
            eps: float = 0.3,
            seed: int | None = None,
            verbose: bool = True,
            attacks_to_run: tuple[str, ...] = (),
            version: str = "standard",
            is_tf_model: bool = False,
            device: str = "cuda",
            log_path: str | None = None,
        ) -> None:
            seen.update(eps=eps, device=str(device), verbose=verbose, seed=seed, version=version)
            self.apgd_targeted, self.fab = types.SimpleNamespace(), types.SimpleNamespace()

        def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int = 250, return_labels: bool = False) -> object:
            seen.update(bs=bs, attacks=self.attacks_to_run, targets=self.apgd_targeted.n_target_classes)
            images = (x + 0.01).clamp(0, 1)
            return (images, (y + 1) % 4) if return_labels else images

    module: Any = types.ModuleType("autoattack")
    AutoAttack.__module__ = "autoattack.autoattack"
    module.AutoAttack = AutoAttack
    monkeypatch.setitem(sys.modules, "autoattack", module)
    x, y = batch[0].float(), batch[1]
    images, flags = run_autoattack(
        make_ensemble(dtype=torch.float32), x, y, eps=0.05, seed=3, batch_size=9, attacks=("apgd-ce",)
    )
    assert seen == {
        **{"eps": 0.05, "device": "cpu", "verbose": False, "seed": 3, "version": "standard"},
        **{"bs": 9, "attacks": ["apgd-ce"], "targets": 3},
    }
    torch.testing.assert_close(images, (x + 0.01).clamp(0, 1))
    assert not flags["apgd-ce"].any()


def test_an_unknown_attack_of_the_suite() -> None:
    with pytest.raises(ValueError, match="did you mean 'apgd-t'"):
        run_autoattack(make_ensemble(), torch.rand(1, 3, 6, 6), torch.tensor([0]), eps=0.1, attacks=("apgd_t",))
