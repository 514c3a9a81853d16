"""What an attack cannot do is said before any work, or it is left out with a flag: alike at every entrance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from ensemble_attacks import AutoAttack, Ensemble, NotAnEnsembleError
from ensemble_attacks.cli.group import main
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.hosts.original import run_autoattack
from tests.hosts.test_door import quick


class Flat(nn.Module):
    """A linear model of any shape and number of classes, which counts its passes."""

    def __init__(self, classes: int, shape: tuple[int, ...] = (1, 6, 6)) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(classes)
            self.layer = nn.Linear(torch.Size(shape).numel(), classes)
        self.passes = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        scores: Tensor = self.layer(x.flatten(1))
        return scores


def of(model: nn.Module, *shape: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    return x, model(x).argmax(1)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (2, ["autoattack", "autoattack-rand", "apgd-t", "ea-apgd-dlr", "ea-apgd-t"]),
        (3, ["autoattack", "apgd-t", "ea-apgd-t"]),
    ],
)
def test_a_named_attack_is_refused_before_any_work(classes: int, names: list[str]) -> None:
    model = Flat(classes)
    x, y = of(model, 1, 6, 6)
    for name in names:
        model.passes = 0
        with pytest.raises(ValueError, match=rf"'{name}' cannot attack this model: it needs at least \d classes"):
            evaluate(model, x, y, ["ea-apgd-ce", name], Settings(0.05))
        assert model.passes < 60
    for name in ("autoattack-adaptive", "auto", "ea-apgd-ce"):
        assert evaluate(model, x, y, [name], Settings(0.6))["worst_case"]["accuracy"] < 1


@pytest.mark.parametrize(("version", "classes"), [("standard", 3), ("rand", 2)])
def test_the_originals_suite_by_itself(version: str, classes: int) -> None:
    model = Flat(classes)
    x, y = of(model, 1, 6, 6)
    with pytest.raises(ValueError, match=f"needs at least {classes + 1} classes, the model has {classes}"):
        run_autoattack(model, x, y, eps=0.1, version=version)


def test_shapes_that_an_attack_cannot_do() -> None:
    model = Flat(5, (1, 5, 7))
    x, y = of(model, 1, 5, 7)
    for name in ("square", "eot-square"):
        with pytest.raises(ValueError, match="in L2 it needs squares of at least 5 x 5 pixels, not 5 x 7 ones"):
            evaluate(model, x, y, [name], Settings(0.3, norm="L2"))
    failed: dict[str, str] = {}
    _, flags = run_autoattack(model, x, y, eps=0.3, norm="L2", attacks=["apgd-ce", "square"], on_failure=failed.__setitem__)
    assert list(flags) == ["apgd-ce"]
    assert "it needs squares" in failed["square"]


@pytest.mark.parametrize("version", ["standard", "plus", "rand", "ensemble", "adaptive", "auto"])
def test_versions_leave_out_what_does_not_fit(version: str) -> None:
    model = Ensemble([Flat(2), Flat(2)]).eval()
    x, y = of(model, 1, 6, 6)
    adversary = quick(AutoAttack(model, eps=0.6, seed=0, verbose=False, version=version))
    adversary.run_standard_evaluation(x, y)
    assert adversary.robust_accuracy < 1
    assert not {"apgd-t", "apgd-dlr"} & set(adversary.stages)
    assert not adversary.failed
    expected = {"standard": 1, "plus": 2, "rand": 1, "ensemble": 1}.get(version, 0)
    assert [flag.name for flag in adversary.flags].count("few_classes") == expected


@pytest.mark.parametrize(
    ("attacks", "norm", "shape", "classes", "flag"),
    [
        (["apgd-t"], "Linf", (1, 6, 6), 3, "few_classes"),
        (["ea-apgd-t"], "Linf", (1, 6, 6), 3, "few_classes"),
        (["square"], "L2", (1, 5, 7), 5, "left_out"),
        (["ea-apgd-ce", "pgd"], "L1", (1, 6, 6), 5, "left_out"),
    ],
)
def test_what_is_left_out_is_flagged_and_nothing_left_is_an_error(
    attacks: list[Any], norm: str, shape: tuple[int, ...], classes: int, flag: str
) -> None:
    model = Flat(classes, shape)
    x, y = of(model, *shape)
    with pytest.raises(ValueError, match=f"no attack is left to run \\({attacks[0]}: "):
        AutoAttack(model, norm, 0.1, 0, False, attacks).run_standard_evaluation(x, y)
    adversary = quick(AutoAttack(model, norm, 0.1, 0, False, [*attacks, "apgd-ce"]))
    adversary.run_standard_evaluation(x, y)
    assert list(adversary.stages) == ["apgd-ce"]
    assert [one.name for one in adversary.flags] == [flag] * len(attacks)
    assert adversary.flags[0].message.startswith(f"{attacks[0]} is left out: ")


def test_needs_of_a_users_choice_are_an_error_and_of_ours_a_flag() -> None:
    model = Flat(5)
    x, y = of(model, 1, 6, 6)
    with pytest.raises(NotAnEnsembleError):
        AutoAttack(model, eps=0.1, verbose=False, attacks_to_run=["apgd-ce", "mora"]).run_standard_evaluation(x, y)


def test_diagnose_refuses_a_named_attack_that_does_not_fit() -> None:
    arguments = ["diagnose", "--model", "standard_convnet_3", "--eps", "0.1", "--n", "4", "--attack", "square"]
    assert "AutoAttack's own" in CliRunner().invoke(main, arguments).output
