"""One attack's failure costs that attack: what the others find is kept and judged, and a flag says what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_attacks import AutoAttack
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.errors import AttackFailedError, PartError, none_completed, out_of_memory, reason
from ensemble_attacks.evaluation import suite
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.hosts import original
from ensemble_attacks.hosts.original import run_autoattack
from tests.hosts.test_door import Linear, attacked, images, quick

EPS = 0.05


class Raising(torchattacks.attack.Attack):
    """Raises at its n-th call, and every one after it."""

    def __init__(self, model: nn.Module, error: BaseException, call: int = 1) -> None:
        super().__init__("Raising", model)
        self.error, self.left = error, [call - 1]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if not self.left[0]:
            raise self.error
        self.left[0] -= 1
        return torchattacks.FGSM(self.model, eps=EPS)(images, labels)


def test_what_the_others_found_is_kept_and_a_flag_says_why() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(1)
    alone, expected = attacked(model, x, y, ["apgd-ce", "square"])
    error = RuntimeError("view size is not compatible\nwith more")
    adversary, found = attacked(model, x, y, [Raising(model, error), "apgd-ce", "square"])
    assert torch.equal(found, expected)
    assert adversary.robust_accuracy == alone.robust_accuracy
    assert list(adversary.stages) == ["apgd-ce", "square"]
    assert adversary.failed == {"Raising": "RuntimeError: view size is not compatible"}
    (flag,) = (flag for flag in adversary.flags if flag.name == "failed")
    assert flag.value == 6
    assert flag.message == "Raising is left out on so many images: RuntimeError: view size is not compatible"
    each = quick(AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=[Raising(model, error), "apgd-ce"]))
    assert list(each.run_standard_evaluation_individual(x, y)) == ["apgd-ce"]
    assert list(each.failed) == ["Raising"]
    assert "failed" in {flag.name for flag in each.flags}


def test_what_an_attack_found_before_it_raised_is_kept() -> None:
    model, x = Linear(), images(8)
    y = model(x).argmax(1)
    adversary, found = attacked(model, x, y, [Raising(model, OSError("disk"), call=2), "torchattacks:VANILA"])
    assert (found[:4] != x[:4]).any()
    assert (model(found).argmax(1) == y).double().mean() == adversary.robust_accuracy < 1
    assert not (found[4:] != x[4:]).any()  # the second batch


class Wrong(torchattacks.attack.Attack):
    def __init__(self, model: nn.Module) -> None:
        super().__init__("Wrong", model)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images[:, :, :4]


def test_images_of_another_shape_are_a_failure() -> None:
    model, x = Linear(), images()
    adversary, _ = attacked(model, x, model(x).argmax(1), [Wrong(model), "apgd-ce"])
    assert "returned images of shape (4, 1, 4, 8), not (4, 1, 8, 8)" in adversary.failed["Wrong"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("no"), AttackFailedError),
        (ValueError("bad"), ValueError),
        (TypeError("bad"), TypeError),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(3), SystemExit),
    ],
)
def test_where_nothing_is_left_or_nobody_is_to_blame_it_is_raised(error: BaseException, kind: Any) -> None:
    model, x = Linear(), images()
    with pytest.raises(kind):
        attacked(model, x, model(x).argmax(1), [Raising(model, error)])
    if not isinstance(error, Exception) or out_of_memory(error):
        with pytest.raises(kind):
            attacked(model, x, model(x).argmax(1), ["apgd-ce", Raising(model, error)], eps=1e-6)


def test_a_failed_attack_is_tried_again_by_the_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Linear(), images()

    def run() -> AutoAttack:
        attacks = ["apgd-ce", Raising(model, RuntimeError("once"))]
        adversary = quick(AutoAttack(model, eps=1e-6, seed=0, verbose=False, attacks_to_run=attacks))
        adversary.run_standard_evaluation(x, model(x).argmax(1), state_path=tmp_path / "state")
        return adversary

    assert list(run().failed) == ["Raising"]
    monkeypatch.setattr(Raising, "forward", lambda self, images, labels: images)
    again = run()
    assert not again.failed
    assert list(again.stages) == ["apgd-ce", "Raising"]
    assert "failed" not in {flag.name for flag in again.flags}


def test_memory_is_told_from_failures() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("x"))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not out_of_memory(RuntimeError("mat1 and mat2"))
    assert reason(RuntimeError()) == "RuntimeError"
    failed = none_completed({"a": RuntimeError("no\nmore"), "b": OSError("never")})
    assert str(failed) == "no attack could be run to its end: a: RuntimeError: no; b: OSError: never"


def test_a_part_of_the_originals_suite_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    make = original.make_adversary

    def broken(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        made.square.n_queries, made.apgd.n_iter = 5, 3
        made.square.perturb = lambda x, y: 1 / 0
        return made

    monkeypatch.setattr(original, "make_adversary", broken)
    model, x = Linear(), images()
    y, failed = model(x).argmax(1), dict[str, str]()
    _, flags = run_autoattack(model, x, y, eps=0.005, attacks=["apgd-ce", "square"], on_failure=failed.__setitem__)
    assert list(flags) == ["apgd-ce"]
    assert failed == {"square": "ZeroDivisionError: division by zero"}
    with pytest.raises(AttackFailedError, match="square: ZeroDivisionError: division by zero"):
        run_autoattack(model, x, y, eps=0.005, attacks=["square"])
    monkeypatch.setitem(suite.PIPELINES, "autoattack", suite._original("apgd-ce", "square"))
    row = evaluate(model, x, y, ["autoattack"], Settings(0.005))["attacks"]["autoattack"]
    assert row["failed"] == failed
    assert list(row["stages"]) == ["apgd-ce"]


def test_evaluate_lists_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> suite.Crafted:
        raise RuntimeError("never")

    monkeypatch.setitem(suite.PIPELINES, "eot-square", broken)
    model, x = Linear(), images()
    y = model(x).argmax(1)
    reported: list[str] = []
    names = ["eot-square", "ea-apgd-ce"]
    summary = evaluate(model, x, y, names, Settings(EPS), report=lambda name, row: reported.append(name))
    assert summary["failed"] == {"eot-square": "RuntimeError: never"}
    assert list(summary["attacks"]) == ["ea-apgd-ce"]
    assert summary["worst_case"]["accuracy"] == summary["attacks"]["ea-apgd-ce"]["accuracy"] < 1
    assert reported == ["clean", "ea-apgd-ce", "worst case"]
    with pytest.raises(AttackFailedError, match="eot-square: RuntimeError: never"):
        evaluate(model, x, y, ["eot-square"], Settings(EPS))


class Purified(nn.Module):
    """A front end that changes the shape, so that the identity cannot stand in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend, self.net = nn.Upsample(scale_factor=2), Linear()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(F.avg_pool2d(self.frontend(x), 2))
        return scores


@pytest.mark.parametrize("version", ["adaptive", pytest.param("auto", marks=pytest.mark.slow)])
def test_an_attack_that_we_chose_never_ends_the_run(version: str) -> None:
    model, x = Purified(), images(8)
    adversary = quick(AutoAttack(model, eps=EPS, seed=0, verbose=False, version=version))
    adversary.run_standard_evaluation(x, model(x).argmax(1), bs=8)
    assert "keep the shape" in adversary.failed["bpda"]
    assert "apgd-ce" in adversary.stages
    summary = evaluate(model, x, model(x).argmax(1), ["bpda", "ea-apgd-ce"], Settings(EPS))
    assert summary["failed"]["bpda"].startswith("PartError")
    with pytest.raises(PartError):
        evaluate(model, x, model(x).argmax(1), ["bpda"], Settings(EPS))


def test_a_check_that_cannot_be_made_is_a_finding() -> None:
    model, x = Purified(), images(8)
    diagnosis = diagnose(model, x, model(x).argmax(1), eps=EPS)
    found = {check.name: check for check in diagnosis.checks}
    assert "keep the shape" in found["frontend_agrees"].meaning
    assert "keep the shape" in found["frontend_gap"].meaning
    assert {"single_step", "white_box", "shattered"} <= set(found)
