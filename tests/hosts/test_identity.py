"""A state is gone on with by the same run alone: all that decides its result is part of its identity."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import nn

from ensemble_attacks import APGD, PGD, AutoAttack, BPDAIdentity, CrossMaxTransfer, Ensemble
from ensemble_attacks.hosts.identity import ATTACKED, described, difference
from tests.hosts.test_door import Linear, images

EPS = 0.05


def run(path: Path, model: nn.Module, attacks: list[Any], slot: str = "apgd", **settings: Any) -> AutoAttack:
    adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=attacks)
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 3
    adversary.square.n_queries = 5
    vars(getattr(adversary, slot)).update(settings)
    x = images()
    adversary.run_standard_evaluation(x, model(x).argmax(1), bs=4, state_path=path)
    return adversary


@pytest.mark.parametrize(
    ("name", "slot", "settings"),
    [
        ("apgd-ce", "apgd", {"n_iter": 4}),
        ("apgd-ce", "apgd", {"n_restarts": 2}),
        ("apgd-ce", "apgd", {"eot_iter": 2}),
        ("apgd-t", "apgd_targeted", {"n_target_classes": 2}),
        ("fab-t", "fab", {"alpha_max": 0.2}),
        ("square", "square", {"p_init": 0.3}),
    ],
)
def test_settings_of_the_originals_attacks(name: str, slot: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, path = Linear(), tmp_path / "state"
    run(path, model, [name])
    ((key, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"is of a run with attacks\.{name}\.{key} = .*, not {value}: choose another"):
        run(path, model, [name], slot, **settings)
    other = {"square": "fab"}.get(slot, "square")
    run(path, model, [name], other, seed=7)  # of an attack that does not run, and what the loop sets


@pytest.mark.parametrize("norm", ["Linf", "L1"])
def test_the_same_adversary_goes_on(norm: str, tmp_path: Path) -> None:
    """Its attacks' attributes are, after a run, as they were before."""
    model, x = Linear(), images()
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    adversary = AutoAttack(model, norm, EPS, 0, False, [*names, PGD(model, eps=EPS, steps=3)][: 5 if norm == "Linf" else 4])
    adversary.apgd.use_largereps = norm == "L1"
    adversary.apgd.n_iter_orig = adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 10
    adversary.square.n_queries = 5
    slots = adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square
    before = [dict(vars(slot)) for slot in slots]
    for _ in range(2):
        adversary.run_standard_evaluation(x, model(x).argmax(1), bs=4, state_path=tmp_path / "state")
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = before[1]["n_target_classes"]
    assert [dict(vars(slot)) for slot in slots] == [
        one | ({"n_target_classes": before[1]["n_target_classes"]} if "n_target_classes" in one else {}) for one in before
    ]


def attacks_of(model: nn.Module, other: nn.Module) -> dict[str, Any]:
    return {
        "PGD": PGD(model, eps=EPS, steps=3, n_restarts=1),
        "PGD of more steps": PGD(model, eps=EPS, steps=4, n_restarts=1),
        "PGD on another model": PGD(other, eps=EPS, steps=3, n_restarts=1),
        "torchattacks' PGD": torchattacks.PGD(model, eps=EPS, steps=3),
        "of more steps": torchattacks.PGD(model, eps=EPS, steps=4),
        "on another model": torchattacks.PGD(other, eps=EPS, steps=3),
        "several": torchattacks.MultiAttack([torchattacks.PGD(model, steps=3), torchattacks.FGSM(model)]),
        "several others": torchattacks.MultiAttack([torchattacks.PGD(model, steps=3), torchattacks.FGSM(model, eps=0.1)]),
        "transfer": CrossMaxTransfer(model, attack=APGD, surrogate=other, refine=None, eps=EPS, steps=3),
        "transfer from itself": CrossMaxTransfer(model, attack=APGD, surrogate=model, refine=None, eps=EPS, steps=3),
        "parts": BPDAIdentity(model, parts="layer", eps=EPS),
        "other attack": BPDAIdentity(model, attack=PGD, parts="layer", eps=EPS),
    }


def test_what_an_attack_holds_is_told_apart_and_found_again() -> None:
    model, same, other = Linear(), Linear(), Linear(1)
    found = {name: described(attack, (model,)) for name, attack in attacks_of(model, other).items()}
    again = {name: described(attack, (same,)) for name, attack in attacks_of(same, Linear(1)).items()}
    assert found == again
    assert len({str(one) for one in found.values()}) == len(found)
    assert found["PGD"]["model"] == ATTACKED


def test_functions_containers_and_the_rest() -> None:
    def make(factor: float) -> Any:
        return lambda x: factor * x

    assert described(make(2.0)) == described(make(2.0)) != described(make(3.0))
    assert described(functools.partial(max, 1)) != described(functools.partial(max, 2))
    assert described([1, {"a": (2, torch.ones(2))}]) == described([1, {"a": (2, torch.ones(2))}])
    assert described({3, 1}) == described({1, 3})
    assert described(float("nan")) == "nan"
    assert described(torch.Generator()) == "torch._C.Generator"
    holder: dict[str, Any] = {}
    holder["self"] = holder
    assert described(holder) == {"self": "itself"}
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert difference({"a": 1}, {"a": 1}) is None


def test_an_attack_on_another_model_is_another_run(tmp_path: Path) -> None:
    model, path = Ensemble([Linear(), Linear(1)]).eval(), tmp_path / "state"
    run(path, model, [APGD(Linear(2), eps=EPS, steps=3)])
    run(path, model, [APGD(Linear(2), eps=EPS, steps=3)])
    with pytest.raises(ValueError, match=r"is of a run with attacks\.APGD\.model\.state"):
        run(path, model, [APGD(Linear(3), eps=EPS, steps=3)])
    with pytest.raises(ValueError, match=r"is of a run with order"):
        run(path, model, ["apgd-ce"])


def test_the_order_counts(tmp_path: Path) -> None:
    run(tmp_path / "state", Linear(), ["apgd-ce", "square"])
    with pytest.raises(ValueError, match="order"):
        run(tmp_path / "state", Linear(), ["square", "apgd-ce"])


def test_what_stands_in_an_originals_place_counts(tmp_path: Path) -> None:
    model, x = Linear(), images()

    def with_square(eps: float) -> AutoAttack:
        adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=["square"])
        adversary.square = torchattacks.FGSM(model, eps=eps)
        adversary.square.perturb = adversary.square.forward
        return adversary

    y = model(x).argmax(1)
    with_square(0.01).run_standard_evaluation(x, y, state_path=tmp_path / "state")
    with_square(0.01).run_standard_evaluation(x, y, state_path=tmp_path / "state")
    with pytest.raises(ValueError, match=r"attacks\.square\.eps = 0\.01, not 0\.02"):
        with_square(0.02).run_standard_evaluation(x, y, state_path=tmp_path / "state")
